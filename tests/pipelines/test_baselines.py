"""The baselines beside DQO, on a handful of problems."""

import json
import shutil
from dataclasses import replace

import pytest
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from posttrain.config import build, read_yaml
from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.pipelines import baselines, dqo
from posttrain.pipelines.dqo import DQORunConfig, DQOTraining
from posttrain.rollouts.table import read_table
from posttrain.trainers import baselines as trainers
from posttrain.trainers.baselines import BaselineTraining
from recipes.dqo import study

METHODS = ("rejection", "dpo", "kto")
SMALL = DQORunConfig(
    out="",
    train_prompts=8,
    train_samples=4,
    test_prompts=4,
    test_samples=3,
    training=DQOTraining(batch_size=8, critic_warmup_steps=1),
    baselines=METHODS,
    **{method: BaselineTraining(batch_size=4) for method in METHODS},
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("baselines") / "run"
    return out, dqo.run(replace(SMALL, out=str(out)), say=lambda _: None)


@pytest.mark.slow
def test_one_table_has_them_all_and_each_is_an_ordinary_policy(finished):
    out, result = finished
    assert list(result.arms) == ["base", "majority", "oracle", "dqo", *METHODS]
    weights = {"base": load_model("tiny", "cpu", "float32").model.state_dict()["lm_head.weight"]}
    for method in METHODS:
        policy = transformers.AutoModelForCausalLM.from_pretrained(out / method / "policy")
        weights[method] = policy.state_dict()["lm_head.weight"]
        assert not list((out / method).glob("policy-checkpoints*")) and not list(out.rglob("training_args.bin"))
        assert result.manifest["baselines"][method]["rows"] == result.baselines[method].training["rows"]
    names = list(weights)
    assert all(not weights[a].equal(weights[b]) for i, a in enumerate(names) for b in names[:i])


@pytest.mark.slow
def test_each_has_a_card_with_the_figures_of_all(finished):
    out, result = finished
    dqo.publish(result, "a title", "a lead")
    for name in ("dqo", *METHODS):
        folder = out / "policy" if name == "dqo" else out / name / "policy"
        card = ModelCard.load(folder / "README.md")
        assert card.data.tags == ["posttrain", name]
        assert card.data.eval_results[0].metric_value == result.arms[name].accuracy
        assert all(result.arms[arm].title in card.text for arm in ("base", "dqo", *METHODS))
    assert "CriticReranker" in (out / "policy" / "README.md").read_text()


@pytest.mark.slow
def test_the_study_pools_the_problems_of_all_seeds(finished, tmp_path):
    out, result = finished
    dqo.publish(result, "a title", "a lead")
    other = tmp_path / "seed-1"
    shutil.copytree(out, other)
    with pytest.raises(UserError, match="runs: they must be of one recipe, and differ in their seeds"):
        study.study([out, other])
    summary = json.loads((other / "summary.json").read_text())
    summary["manifest"]["config"]["seed"] = 1
    (other / "summary.json").write_text(json.dumps(summary))
    found = study.study([out, other])
    assert list(found) == ["0", "1", "all"] and list(found["all"]) == ["base", "dqo", *METHODS]
    for name, row in found["all"].items():
        assert row["accuracy"] == pytest.approx(result.arms[name].accuracy)
        assert row["tokens"] == pytest.approx(result.arms[name].tokens)
        if name != "dqo":
            assert row["gain"].difference == pytest.approx(result.arms["dqo"].accuracy - row["accuracy"])
            assert row["gain"].problems == 2 * SMALL.test_prompts
        assert len(study.cells("all", name, row)) == len(study.COLUMNS)
    assert found["all"]["dqo"]["ratio"][0] == pytest.approx(result.arms["dqo"].tokens / result.arms["base"].tokens)


@pytest.mark.slow
def test_everything_is_kept(finished, monkeypatch):
    out, result = finished
    monkeypatch.setattr(baselines, "TRAINERS", {})
    again = dqo.run(replace(SMALL, out=str(out)), say=lambda _: None)
    assert [again.arms[method].accuracy for method in METHODS] == [result.arms[method].accuracy for method in METHODS]


@pytest.mark.slow
def test_a_policy_of_other_settings_is_not_overwritten(finished):
    out, _ = finished
    with pytest.raises(UserError, match="policy: .*dpo/policy was trained on other completions or with other settings"):
        dqo.run(replace(SMALL, out=str(out), dpo=BaselineTraining(batch_size=4, beta=0.5)), say=lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_goes_on_to_the_same_parameters(finished, tmp_path, monkeypatch, method):
    out, result = finished
    monkeypatch.setattr(trainers, "SAVE_STEPS", 1)
    table, settings = read_table(out / "train"), BaselineTraining(batch_size=4)
    steps, make = [], baselines.TRAINERS[method]

    def failing(*args):
        trainer = make(*args)
        step = trainer.training_step

        def one(*inputs):
            steps.append(len(steps))
            if len(steps) == 2:
                raise KeyboardInterrupt
            return step(*inputs)

        trainer.training_step = one
        return trainer

    monkeypatch.setitem(baselines.TRAINERS, method, failing)
    arguments = (method, result.policy, table, settings, tmp_path / "policy", SMALL.seed, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        baselines.train(*arguments)
    made = baselines.train(*arguments)
    first, all_steps = 1, int(settings.epochs) * -(-made["rows"] // 4)
    assert len(steps) == first + 1 + all_steps - first, "steps before the interruption were done again"
    whole, resumed = (
        load_file(folder / "model.safetensors") for folder in (out / method / "policy", tmp_path / "policy")
    )
    assert all(value.equal(resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(("name", "out"), [("baselines", "baselines"), ("low_coverage", "low_coverage")])
def test_the_recipes_name_all_of_them(name, out):
    config = build(DQORunConfig, read_yaml(f"recipes/dqo/{name}.yaml"))
    assert config.out == f"runs/dqo/{out}" and config.baselines == METHODS

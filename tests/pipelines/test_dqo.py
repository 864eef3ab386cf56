"""DQO from beginning to end, on a handful of problems. What it must reach: tests/recipes/test_dqo.py."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from posttrain.config import build, read_yaml
from posttrain.decoding.guide import load_guide
from posttrain.decoding.rerank import CriticReranker
from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.models.value import load_critic
from posttrain.pipelines import dqo
from posttrain.pipelines.dqo import DQORunConfig, DQOTraining, run
from posttrain.rollouts.collect import reserved
from posttrain.rollouts.table import read_table

SMALL = DQORunConfig(
    out="",
    train_prompts=6,
    train_samples=4,
    test_prompts=4,
    test_samples=3,
    shard_prompts=3,
    training=DQOTraining(batch_size=8, critic_warmup_steps=1),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("dqo") / "run"
    return out, run(replace(SMALL, out=str(out)), say=lambda _: None)


@pytest.mark.slow
def test_the_policy_is_trained_and_measured(finished):
    out, result = finished
    assert {"base", "majority", "oracle", "dqo"} == set(result.arms)
    transformers.AutoModelForCausalLM.from_pretrained(out / "policy")
    assert result.training["completions"] == 24
    dqo.publish(result, "a title", "a lead")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["arms"]["dqo"]["accuracy"] == result.arms["dqo"].accuracy


@pytest.mark.slow
def test_the_value_model_ranks_completions_of_the_trained_policy_and_guides_no_tokens(finished):
    out, result = finished
    after = load_model(str(out / "policy"), "cpu", "float32")
    ranker = CriticReranker(after, load_critic(out / "policy" / "critic", after))
    row = next(result.trained.rows())
    chosen, scores = ranker.choose(row["prompt_ids"], [row["completion_ids"], row["completion_ids"][:3]], beta=0)
    assert scores.isfinite().all() and scores[0] != scores[1] and chosen == int(scores.argmax())
    with pytest.raises(UserError, match="guide: .*critic holds DQO's value model, which ranks completions"):
        load_guide(out / "policy" / "critic", after)
    with pytest.raises(UserError, match="critic: .*policy holds a 'llama', not a value model"):
        load_critic(out / "policy", after)


@pytest.mark.slow
def test_adapters_are_merged_into_the_policy(finished, tmp_path):
    out, _ = finished
    policy, table = load_model("tiny", "cpu", "float32"), read_table(out / "train")
    settings = DQOTraining(batch_size=8, critic_warmup_steps=0, learning_rate=1e-2, lora_rank=2, value_lora_rank=2)
    dqo.train(policy, table, settings, tmp_path / "policy", say=lambda _: None)
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    before = policy.model.state_dict()
    assert trained.keys() == before.keys()
    assert any(not torch.equal(weight, before[name]) for name, weight in trained.items())


@pytest.mark.parametrize("name", ["lora_rank", "value_lora_rank"])
def test_a_rank_is_positive(name):
    with pytest.raises(UserError, match=f"{name}: must be positive, got 0"):
        DQOTraining(**{name: 0})


@pytest.mark.slow
def test_everything_is_kept(finished):
    out, result = finished
    stamp = (out / "policy" / "model.safetensors").stat().st_mtime_ns
    again = run(replace(SMALL, out=str(out)), say=lambda _: None)
    assert again.arms["dqo"].accuracy == result.arms["dqo"].accuracy
    assert stamp == (out / "policy" / "model.safetensors").stat().st_mtime_ns


@pytest.mark.slow
def test_a_policy_of_other_settings_is_not_overwritten(finished):
    out, _ = finished
    other = replace(SMALL, out=str(out), training=replace(SMALL.training, beta=0.5))
    with pytest.raises(UserError, match="policy: .* was trained on other completions or with other settings"):
        run(other, say=lambda _: None)


@pytest.mark.slow
def test_prompts_may_be_covered_unevenly(tmp_path):
    recipe = build(DQORunConfig, read_yaml("recipes/dqo/low_coverage.yaml"))
    assert (recipe.least_train_samples, recipe.train_samples, dqo.per_prompt(recipe)) == (1, 2, "1 to 2")
    sizes = {"train_prompts": 12, "test_prompts": 2, "test_samples": 1, "baselines": ()}
    training = replace(recipe.training, critic_warmup_steps=0)
    result = run(replace(recipe, out=str(tmp_path), training=training, **sizes), say=lambda _: None)
    counts = [len(samples) for samples in read_table(tmp_path / "train").by_prompt("sample")]
    assert set(counts) == {1, 2} and result.training["completions"] == sum(counts)
    with pytest.raises(UserError, match=r"least_train_samples: must be between 1 and train_samples \(2\), got 3"):
        replace(recipe, least_train_samples=3)


@pytest.mark.slow
def test_completions_of_somebody_else_s_making_are_learned_from(tmp_path):
    """Whose law is not known: without importance weights, or with log-probabilities; and a table is one as it is."""
    rows = [
        {"prompt": f"{i}+1=?", "completion": f"#### {i + right}", "reward": right} for i in range(6) for right in (0, 1)
    ]
    file = tmp_path / "given.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    given = replace(SMALL, out=str(tmp_path / "run"), completions=str(file))
    with pytest.raises(UserError, match=r"logprobs: .* train without importance weights \(importance_cap: null\)"):
        run(given, say=lambda _: None)
    unweighted = replace(given, training=replace(SMALL.training, importance_cap=None))
    assert run(unweighted, say=lambda _: None).training["completions"] == 12
    assert dqo.lead(given) == f"Trained offline on the completions in {file}."
    again = replace(unweighted, out=str(tmp_path / "again"), completions=str(tmp_path / "run" / "train"))
    assert run(again, say=lambda _: None).training["completions"] == 12
    with pytest.raises(UserError, match="completions: no such rollout table or file"):
        run(replace(given, completions="nowhere.jsonl"), say=lambda _: None)


def test_the_recipe_is_one(tmp_path):
    config = build(DQORunConfig, read_yaml("recipes/dqo/arithmetic.yaml"))
    assert config == replace(DQORunConfig(out="runs/dqo/arithmetic"), training=DQOTraining())


@pytest.mark.slow
def test_a_policy_is_trained_by_one_process_at_a_time(finished):
    out, _ = finished
    with reserved(out / "policy"), pytest.raises(UserError, match="out: another run is writing to .*policy"):
        run(replace(SMALL, out=str(out)), say=lambda _: None)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"beta": 0}, r"^training\.beta: must be positive and finite, got 0.0"),
        ({"lam": 1.5}, r"^training\.lam: must be between 0 and 1, got 1.5"),
        ({"batch_size": 0}, r"^training\.batch_size: must be at least 1, got 0"),
        ({"critic_warmup_steps": -1}, r"^training\.critic_warmup_steps: must be at least 0, got -1"),
        (
            {"critic_warmup_steps": 150},
            r"^training\.critic_warmup_steps: must be less than the run's 150 steps \(2400 comp",
        ),
        ({"value_layers": -1}, r"^training\.value_layers: must be at least 0, got -1"),
    ],
)
def test_a_mistake_in_the_training_is_named_as_in_the_configuration(training, message):
    with pytest.raises(UserError, match=message):
        build(DQORunConfig, {"out": "x", "training": training})


def test_a_baseline_is_named_once():
    with pytest.raises(UserError, match="^baselines: dpo stands twice; name each once"):
        build(DQORunConfig, {"out": "x", "baselines": ["dpo", "kto", "dpo"]})


@pytest.mark.parametrize(
    ("completions", "ranks", "batch", "accumulation", "epochs", "steps"),
    [
        (24, 1, 8, 1, 2.0, 6),
        (25, 1, 8, 1, 2.0, 8),
        (25, 1, 8, 3, 2.0, 4),
        (7, 1, 8, 3, 0.5, 1),
        (40, 1, 8, 2, 1.5, 5),
        (25, 2, 4, 3, 2.0, 4),
        (33, 4, 4, 1, 1.0, 3),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(
    completions, ranks, batch, accumulation, epochs, steps, tmp_path, monkeypatch
):
    settings = DQOTraining(batch_size=batch, accumulation=accumulation, epochs=epochs)
    assert settings.steps(completions, ranks) == steps
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        use_cpu=True,
        report_to="none",
    )
    data = [{"x": i} for i in range(completions)]
    trainer = transformers.Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=data)
    part = prepare_data_loader(DataLoader(data, batch_size=batch), num_processes=ranks, process_index=0)
    assert trainer.set_initial_training_values(arguments, part)[-1] == steps


@pytest.mark.slow
def test_a_run_in_which_only_the_value_model_would_learn_is_refused(finished, tmp_path):
    """Before anything is sampled; of a table, whose completions are counted then, before the first step."""
    message = r"^training\.critic_warmup_steps: must be less than the run's 6 steps \(24 completions, 8 a step, epochs 2\), got 6"
    training = replace(SMALL.training, critic_warmup_steps=6)
    with pytest.raises(UserError, match=message):
        replace(SMALL, training=training)
    given = replace(SMALL, out=str(tmp_path), completions=str(finished[0] / "train"), training=training)
    with pytest.raises(UserError, match=message):
        run(given, say=lambda _: None)
    assert not list(tmp_path.rglob("*.safetensors"))  # neither a policy nor the reference's log-probabilities


def test_more_layers_than_there_are_are_refused_before_anything_is_sampled(tmp_path):
    config = replace(SMALL, out=str(tmp_path / "run"), training=replace(SMALL.training, value_layers=5))
    with pytest.raises(UserError, match=r"^training\.value_layers: tiny has 4 layers, got 5"):
        run(config, say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_a_probe_that_is_not_there_is_refused_before_anything_is_sampled(tmp_path):
    config = replace(
        SMALL, out=str(tmp_path / "run"), training=replace(SMALL.training, probe=str(tmp_path / "nowhere"))
    )
    with pytest.raises(UserError, match="probe: .*nowhere has no config.json"):
        run(config, say=lambda _: None)
    assert not (tmp_path / "run").exists()

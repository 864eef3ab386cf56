"""What is published: a folder that plain transformers loads, whose README does what it says."""

import json
import re
import shutil

import pytest
import torch
import transformers
import yaml

from posttrain.cli.main import main
from posttrain.decoding.guided_model import GuidedModel
from posttrain.decoding.rerank import Reranker
from posttrain.errors import UserError
from posttrain.models.features import FeatureSpec
from posttrain.models.load import load_model, model_fingerprint
from posttrain.models.probe import Probe, ProbeCard
from posttrain.models.value import ValueModel, new_value_model, value_fingerprint
from posttrain.pipelines.export import export
from tests.evaluation.recorded import arm, arms, page

BASE = {"model": "tiny", "data": "arithmetic", "train_split": "train"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """guided/ and probed/: as posttrain qsharp and posttrain qprobe leave them, but for the training."""
    root = tmp_path_factory.mktemp("runs")
    policy = load_model("tiny", "cpu", "float32")
    for number in (2, 10):
        folder = root / "guided" / f"round-{number}" / "value"
        new_value_model(policy, "v", layers=1, zero_init=False, seed=number).save_pretrained(folder)
        (folder / "made_by.json").write_text("{}")
    (root / "guided" / "config.yaml").write_text(yaml.safe_dump({**BASE, "beta": 0.3, "guidance": {"candidates": 7}}))
    page(root / "guided", arms(20, arm("qsharp", "Q#, round 1", 0.9, 20, 70, 1, kl=1.0)), [f"{i}+1" for i in range(20)])
    torch.manual_seed(0)
    probe = Probe(ProbeCard(policy.model.config.hidden_size, feature=FeatureSpec(2, "mean"), policy=policy.fingerprint))
    torch.nn.init.normal_(probe.first.weight)
    probe.mean.normal_()
    probe.save_pretrained(root / "probed" / "probe")
    (root / "probed" / "config.yaml").write_text(yaml.safe_dump({**BASE}))
    return root


@pytest.fixture(scope="module")
def exported(runs):
    out = runs / "out"
    assert main(["export", str(runs / "guided"), str(runs / "probed"), "--out", str(out)]) == 0
    return out


def test_policy_value_model_and_probe_stand_beside_each_other(exported):
    assert model_fingerprint(exported) == load_model("tiny").fingerprint
    transformers.AutoModelForCausalLM.from_pretrained(exported)
    made = json.loads((exported / "posttrain.json").read_text())
    assert (made["beta"], made["guidance"]) == (0.3, {"candidates": 7})
    last = ValueModel.from_pretrained(exported.parent / "guided" / "round-10" / "value").state_dict()
    kept = ValueModel.from_pretrained(exported / "value").state_dict()
    assert all(kept[name].equal(weight) for name, weight in last.items())
    assert not list(exported.rglob("*.bin")) and not list(exported.parent.glob(".out*"))


def test_the_snippets_of_the_readme_run(exported):
    text = (exported / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    told: dict = {}
    for block in blocks:
        exec(block, told)
    assert isinstance(told["guided"], GuidedModel) and told["guided"].beta == 0.3
    assert told["guided"].guide.guidance.candidates == 7 and isinstance(told["answer"], str) and told["answer"]
    assert isinstance(told["value"], ValueModel) and told["value"](told["ids"]).shape == told["ids"].shape
    policy = load_model("tiny", "cpu", "float32")
    reranker = Reranker(policy, Probe.from_pretrained(exported / "probe"))
    ids = policy.tokenizer("23+48-17=?6+4=10").input_ids
    prompt, completion = ids[:8], ids[8:]
    assert told["score"](prompt, completion) == pytest.approx(
        float(reranker.score(prompt, [completion])), rel=0.01, abs=0.02
    )


def test_the_card_has_the_figures_with_intervals(exported):
    text = (exported / "README.md").read_text()
    assert "trained by Q# and Q-Probe" in text and "on arithmetic/train, with" in text
    assert "Measured on sums/test:" in text and "| **Q#, round 1** |" in text and "95 % interval" in text
    assert "- name: out\n" in text


@pytest.mark.parametrize(
    ("trained", "exported"), [(("grpo_lambda", "grpo"), "GRPO-lambda"), (("plain", "grpo"), "GRPO")]
)
def test_of_several_trained_policies_the_gated_one_is_exported(tmp_path, trained, exported):
    policy = load_model("tiny", "cpu", "float32")
    for name in trained:
        policy.model.save_pretrained(tmp_path / "run" / name)
        policy.tokenizer.save_pretrained(tmp_path / "run" / name)
        (tmp_path / "run" / name / "made_by.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**BASE, "arms": list(trained)}))
    export([str(tmp_path / "run")], tmp_path / "out")
    assert f"trained by {exported}\n" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_is_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    policy = load_model("tiny", "cpu", "float32")
    model = get_peft_model(policy.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = torch.tensor([policy.tokenizer("1+1=?").input_ids])
    with torch.no_grad():
        expected = model(ids).logits
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(tmp_path / "adapter")
    export([str(tmp_path / "adapter")], tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(found(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert load_model(str(tmp_path / "out")).tokenizer.chat_template == policy.tokenizer.chat_template


def test_a_stage_of_a_pipeline_and_the_whole_of_it(runs, tmp_path):
    pipeline = tmp_path / "pipeline"
    for name, run in (("qsharp", "guided"), ("qprobe", "probed")):
        stage = pipeline / name
        stage.parent.mkdir(exist_ok=True)
        stage.symlink_to(runs / run)
    for run in ("guided", "probed"):
        config = {**BASE, "beta": 0.3, "completions": "given.jsonl"}
        (runs / run / "stage.json").write_text(json.dumps({"key": "0123456789abcdef", "config": config}))
    (pipeline / "config.yaml").write_text(yaml.safe_dump({**BASE, "stages": []}))
    try:
        assert {"value/config.json", "probe/config.json"} <= set(export([str(pipeline)], tmp_path / "all"))
        assert "probe/config.json" not in export([str(pipeline / "qsharp")], tmp_path / "one")
        aside = pipeline / "qsharp-aaaaaaaaaaaa"  # of other settings, once
        shutil.copytree(runs / "guided", aside)
        (aside / "stage.json").write_text(json.dumps({"key": 16 * "a", "config": {**BASE, "beta": 0.7}}))
        export([str(pipeline)], tmp_path / "again")
        assert json.loads((tmp_path / "again" / "posttrain.json").read_text())["beta"] == 0.3
        trained = (arm("qsharp_2", "Q#, round 2", 0.9, 20, 70, 1), arm("grpo_lambda", "GRPO-lambda", 0.9, 20, 70, 1))
        page(pipeline, arms(20, *trained), [f"{i}+1" for i in range(20)])
        export([str(pipeline)], tmp_path / "card")  # whose weights are not those of GRPO
        card = (tmp_path / "card" / "README.md").read_text()
        assert "on given.jsonl, with" in card
        assert "| **Q#, round 2** |" in card and "| GRPO-lambda |" in card
    finally:
        for run in ("guided", "probed"):
            (runs / run / "stage.json").unlink()


def test_a_refused_attempt_changes_nothing_of_a_finished_run(runs, tmp_path):
    run = shutil.copytree(runs / "guided", tmp_path / "run")
    measured = {**BASE, "beta": 0.3, "guidance": {"candidates": 7}}
    (run / "summary.json").write_text(json.dumps({"manifest": {"config": measured}}))
    (run / "config.yaml").write_text(yaml.safe_dump({**measured, "beta": 0.9}))  # asked for, and refused
    export([str(run)], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "posttrain.json").read_text())["beta"] == 0.3


def test_a_value_model_of_preferences_is_not_called_one_of_returns(runs, tmp_path):
    """Nor is the default beta of a run, which only returns are measured with, taken for its own."""
    value = tmp_path / "run" / "round-1" / "value"
    new_value_model(load_model("tiny", "cpu", "float32"), "q", layers=1, preferences=True).save_pretrained(value)
    shutil.copyfile(runs / "guided" / "round-2" / "value" / "made_by.json", value / "made_by.json")
    shutil.copyfile(runs / "guided" / "config.yaml", tmp_path / "run" / "config.yaml")
    export([str(tmp_path / "run")], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "trained by IPL" in text and "towards completions that are preferred (IPL," in text
    assert "Q#" not in text and "come out right" not in text and "Q of every token and V before it" in text
    made = json.loads((tmp_path / "out" / "posttrain.json").read_text())
    assert "beta" not in made and made["guidance"] == {"candidates": 7}


def test_where_rounds_are_averaged_their_mean_is_what_guides(runs, tmp_path):
    shutil.copytree(runs / "guided", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**BASE, "history": 2}))
    mean = tmp_path / "run" / "round-10" / "history"
    new_value_model(load_model("tiny", "cpu", "float32"), "shared", zero_init=False).save_pretrained(mean)
    export([str(tmp_path / "run")], tmp_path / "out")
    assert value_fingerprint(tmp_path / "out" / "value") == value_fingerprint(mean)


def test_what_does_not_go_together_is_one_line(runs, exported, tmp_path):
    other = tmp_path / "other"
    policy = load_model("tiny", "cpu", "float32")
    policy.model.get_input_embeddings().weight.data += 1
    policy.model.save_pretrained(other)
    policy.tokenizer.save_pretrained(other)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("model: tiny\n")
    value = str(runs / "guided" / "round-2" / "value")
    for sources, message in (
        ([value], "source: none of .*value is a policy"),
        (["tiny", str(runs / "guided"), value], "source: these are 2 value models: "),
        (["tiny", str(other)], "source: these are 2 policies"),
        ([str(other), value], "source: the value model in .* is for the policy .*name its own"),
        ([str(tmp_path / "unfinished")], "source: .*unfinished has made no policy, value model or probe"),
        ([str(tmp_path)], "source: .* holds neither a run"),
        (["./nowhere"], "model: no such folder: ./nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            export(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    with pytest.raises(UserError, match="^out: .* is not empty; delete it, or give another folder$"):
        export(["tiny"], exported)

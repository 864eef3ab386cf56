"""What makes a trained value model another one, and who may train into its folder."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from posttrain.decoding.guide import load_guide
from posttrain.errors import UserError
from posttrain.evaluation.intervals import paired_comparison
from posttrain.models.load import TINY, load_model
from posttrain.pipelines.rollout import RolloutConfig, rollout
from posttrain.pipelines.value_training import ValueTraining, train_value
from posttrain.rollouts.collect import reserved
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine

CONFIG = ValueTraining(layers=1, learning_rate=1e-3, epochs=1, batch_size=16, eval_fraction=0.3)


@pytest.fixture(scope="module")
def policy():
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def table(policy, tmp_path_factory):
    config = RolloutConfig("arithmetic", "train", 10, samples=6, sampling=Sampling(max_tokens=192))
    return rollout(policy, config, config.rows(), tmp_path_factory.mktemp("table") / "train", False, lambda _: None)


@pytest.mark.slow
def test_a_base_with_other_weights_is_another_training(policy, table, tmp_path):
    """Its name alone says nothing: a folder is trained on, and then holds another model."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    config = replace(CONFIG, base=str(base))
    made = train_value(policy, [table], config, tmp_path / "value")
    assert train_value(policy, [table], config, tmp_path / "value") == made
    weights = load_file(base / "model.safetensors")
    name = min(weights)
    save_file({**weights, name: weights[name] * 1.5}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="value: .* was trained on other completions or with other settings"):
        train_value(policy, [table], config, tmp_path / "value")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"atoms": (0.0, 0.5, 1.0)}, {"head": "q", "lora_rank": 4}])
def test_histograms_and_adapters_become_guides(policy, table, tmp_path, changes):
    made = train_value(policy, [table], replace(CONFIG, **changes), tmp_path / "value")
    guide = load_guide(tmp_path / "value", policy)
    assert guide.value.config.atoms == (list(changes["atoms"]) if "atoms" in changes else None)
    assert made["metrics"]["auc"] > 0.5
    prompt = tuple(table.column("prompt_ids")[0])
    engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint=policy.fingerprint, guide=guide)
    (done,) = engine.generate([Request(0, prompt, Sampling(max_tokens=24), beta=0.1)])
    assert 0 < done.kl < float("inf")


@pytest.mark.slow
def test_preferences_become_a_guide(policy, table, tmp_path):
    made = train_value(policy, [table], replace(CONFIG, head="q", loss="ipl"), tmp_path / "value")
    assert made["metrics"].keys() == {"loss", "pairs_right"} and made["by_position"] == []
    guide = load_guide(tmp_path / "value", policy)
    assert guide.value.config.preferences
    prompt = tuple(table.column("prompt_ids")[0])
    engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint=policy.fingerprint, guide=guide)
    (done,) = engine.generate([Request(0, prompt, Sampling(max_tokens=24), beta=0.1)])
    assert 0 < done.kl < float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_preferences_raise_accuracy(policy, tmp_path, seed):
    """Of a guide that knows which of two completions is right: 150 test problems, two samples each."""

    def sampled(split, samples, beta=None, guide=None):
        sampling = Sampling(max_tokens=192, seed=seed)
        plan = RolloutConfig("arithmetic", split, 150, samples=samples, sampling=sampling, beta=beta)
        return rollout(policy, plan, plan.rows(), tmp_path / f"{split}-{beta}", False, lambda _: None, guide)

    config = ValueTraining(
        head="q", loss="ipl", layers=2, learning_rate=2e-4, head_learning_rate=6e-4, epochs=2, batch_size=16
    )
    made = train_value(policy, [sampled("train", 8)], config, tmp_path / "value", seed)
    tables = sampled("test", 2, 0.1, load_guide(tmp_path / "value", policy)), sampled("test", 2)
    gain = paired_comparison(*([sum(row) / 2 for row in table.rectangle("correct")] for table in tables))
    assert made["metrics"]["pairs_right"] > 0.7 and gain.low > 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "head: must be q or shared with loss ipl"),
        ({"head": "q", "atoms": (0.0, 1.0)}, "atoms: are of returns, and loss ipl learns from preferences"),
        ({"head": "q", "reduction": "token"}, "reduction: must be row with loss ipl"),
        ({"head": "q", "drop_unanimous": False}, "drop_unanimous: must be true with loss ipl"),
    ],
)
def test_what_preferences_have_no_use_for_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ValueTraining(loss="ipl", **changes)


@pytest.mark.slow
def test_completions_that_all_fail_leave_some_metrics_out(policy, tmp_path):
    """As those of a small model on hard problems do, when prompts of one outcome are kept."""
    (tmp_path / "hard.jsonl").write_text("".join(f'{{"problem": "1{i}+2{i}=?", "answer": "0"}}\n' for i in range(6)))
    plan = RolloutConfig(
        str(tmp_path / "hard.jsonl"), "train", prompt="{problem}", samples=2, sampling=Sampling(max_tokens=16)
    )
    table = rollout(policy, plan, plan.rows(), tmp_path / "table", False, lambda _: None)
    made = train_value(policy, [table], replace(CONFIG, drop_unanimous=False), tmp_path / "value")
    assert made["metrics"].keys() == {"loss", "calibration_error"}
    assert json.loads((tmp_path / "value" / "made_by.json").read_text()) == made


def test_a_folder_is_trained_into_by_one_process_at_a_time(policy, table, tmp_path):
    with (
        reserved(tmp_path / "value"),
        pytest.raises(UserError, match="out: another run is writing to .*value"),
    ):
        train_value(policy, [table], CONFIG, tmp_path / "value")
    assert list((tmp_path / "value").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 99}, r"^value\.layers: must be between 1 and the base's"),
        ({"base": "./nowhere"}, r"^value\.base: no such folder: \./nowhere"),
        ({"eval_fraction": 1e-9}, r"^value\.eval_fraction: 1e-09 of"),
    ],
)
def test_mistakes_are_named_as_in_the_configuration(policy, table, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_value(policy, [table], replace(CONFIG, **changes), tmp_path / "value")

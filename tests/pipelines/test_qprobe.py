import json
import re

import pytest

from posttrain.errors import UserError
from posttrain.models.probe import Probe
from posttrain.pipelines import qprobe as module
from posttrain.pipelines.qprobe import QProbeConfig, publish, run
from posttrain.trainers.probe import ProbeConfig


def small(out, **changes):
    sizes = {"train_prompts": 40, "train_samples": 8, "test_prompts": 30, "k": 4, "shard_prompts": 20, "layers": (0, 2)}
    return QProbeConfig(**{"out": str(out), **sizes, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("qprobe") / "run"
    result = run(small(out), say=lambda _: None)
    publish(result, "A <title>", "What it is.")
    return out, result


@pytest.mark.slow
def test_the_summary_holds_every_arm_and_what_made_it(finished):
    out, result = finished
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["arms"]) == {"base", "majority", "oracle", "qprobe"}
    for arm in summary["arms"].values():
        assert arm["interval"][0] <= arm["accuracy"] <= arm["interval"][1]
        assert arm["tokens"] > 0 and arm["seconds"] > 0
    made = summary["manifest"]
    assert made["policy"]["fingerprint"] == result.policy.fingerprint
    assert made["config"]["seed"] == 0 and "torch" in made["versions"]


@pytest.mark.slow
def test_arms_are_computed_from_the_table(finished):
    _, result = finished
    correct = result.test.rectangle("correct")
    assert result.arms["base"].accuracy == pytest.approx(sum(map(sum, correct)) / 120)
    assert result.arms["oracle"].accuracy == pytest.approx(sum(map(any, correct)) / 30)
    chosen = [
        row[max(range(4), key=scores.__getitem__)] for row, scores in zip(correct, result.scores.tolist(), strict=True)
    ]
    assert result.arms["qprobe"].accuracy == pytest.approx(sum(chosen) / 30, abs=0.02)  # ties are shared
    assert all(arm.curve[0] == pytest.approx(result.arms["base"].accuracy) for arm in result.arms.values())


@pytest.mark.slow
def test_the_report_stands_alone_and_escapes_what_it_is_given(finished):
    out, result = finished
    page = (out / "report.html").read_text()
    assert "A &lt;title&gt;" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page) and "<script" not in page and "@import" not in page
    assert page.count("<svg") == 3
    assert result.test.column("completion")[0].splitlines()[0] in page.replace("&#39;", "'")


@pytest.mark.slow
def test_the_calibration_map_is_fitted_on_prompts_that_the_probe_was_not_trained_on(finished, monkeypatch):
    _, result = finished
    fitted_on = []
    monkeypatch.setattr(module, "fit_logistic", lambda *data: fitted_on.append(data) or (1.0, 0.0))
    publish(result, "title", "lead")
    ((scores, correct),) = fitted_on
    held_out = list(result.fitted.held_out)
    assert scores.tolist() == result.train_scores[held_out].flatten().tolist()
    assert correct.tolist() == [flag for prompt in held_out for flag in result.train.rectangle("correct")[prompt]]


@pytest.mark.slow
def test_the_saved_probe_gives_the_same_scores(finished):
    out, result = finished
    probe = Probe.from_pretrained(out / "probe", result.policy.fingerprint)
    assert probe.card.feature == result.fitted.spec


@pytest.mark.slow
def test_a_second_run_samples_nothing_again(finished):
    out, first = finished
    shards = sorted(out.glob("*/shard-*.parquet"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    again = run(small(out), say=lambda _: None)
    assert [shard.stat().st_mtime_ns for shard in shards] == before
    assert again.scores.equal(first.scores)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"k": 1}, "k"), ({"test_split": "train"}, "test_split"), ({"train_prompts": 1}, "train_prompts")],
)
def test_settings_out_of_range(changes, field):
    with pytest.raises(UserError, match=f"^{field}: "):
        small("nowhere", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_probe_beats_one_sample_by_20_points_and_a_majority_of_8_by_15(tmp_path, seed):
    config = QProbeConfig(out=str(tmp_path), seed=seed, probe=ProbeConfig(seed=seed))
    result = run(config, say=lambda _: None)
    accuracy = {name: arm.accuracy for name, arm in result.arms.items()}
    assert len(result.test.rectangle("correct")) >= 500
    assert accuracy["qprobe"] >= accuracy["base"] + 0.20
    assert accuracy["qprobe"] >= accuracy["majority"] + 0.15

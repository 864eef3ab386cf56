"""The main job, on a handful of problems."""

import json
import re
from pathlib import Path

import pytest

from posttrain.pipelines import demo as module
from posttrain.rollouts.table import read_table
from tests.small_demo import shrink


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(its folder, what it returned, what it said)"""
    out, said = tmp_path_factory.mktemp("demo") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return out, module.demo(out, seed=3, say=said.append), said


def test_the_summary_and_the_report_are_written(finished):
    out, result, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["arms", "frontier", "manifest"]
    assert set(module.ORDER) == set(summary["arms"])
    for name, arm in summary["arms"].items():
        assert {"accuracy", "interval", "tokens", "seconds"} <= set(arm)
        assert arm["accuracy"] == result.arms[name].accuracy
    page = (out / "report.html").read_text()
    assert "posttrain demo" in page and page.count("<svg") == 8
    assert all(arm.title in page for arm in result.arms.values())


def test_the_snippet_of_the_readme_runs_as_it_stands(finished, tmp_path, monkeypatch, capsys):
    out, result, _ = finished
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[2] / "README.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    exec(snippet, {})
    best = result.qprobe.scores[0].argmax()
    assert capsys.readouterr().out.startswith(result.qprobe.test.by_prompt("completion")[0][best])


def test_one_seed_is_everybody_s(finished):
    _, result, _ = finished
    assert result.qprobe.config.seed == result.qprobe.config.probe.seed == result.qsharp.config.seed == 3
    for table in (result.qprobe.train, result.qprobe.test, result.qsharp.guided):
        assert table.manifest["settings"]["seed"] == 3


def test_the_probe_s_line_says_what_was_measured(finished):
    _, result, said = finished
    assert any("held-out prompts" in line and "of the best of 2 (of 4 sampled)" in line for line in said)
    assert len(result.qprobe.fitted.held_out) == result.qprobe.fitted.metrics["validation_prompts"]


def test_the_trained_policies_learned_from_the_same_table_and_answer_the_same_problems(finished):
    out, result, _ = finished
    test = result.qprobe.test.column("prompt_id")
    for name in ("rejection", "dqo"):
        assert result.manifest[name]["policy"] == result.qprobe.policy.fingerprint
        trained = read_table(out / name / "trained")
        assert list(dict.fromkeys(trained.column("prompt_id"))) == list(dict.fromkeys(test))
        assert "kl" not in result.arms[name].measures  # the table does not know it, and it is not 0
    assert result.manifest["dqo"]["completions"] == len(result.qprobe.train)
    assert result.manifest["rejection"]["rows"] == sum(result.qprobe.train.column("correct"))


def test_grpo_starts_from_the_same_policy_and_only_its_penalties_differ(finished):
    out, result, _ = finished
    test = result.qprobe.test.column("prompt_id")
    made = {name: result.manifest[name] for name in ("grpo", "grpo_plain", "grpo_lambda")}
    for name, training in made.items():
        assert training["policy"] == result.qprobe.policy.fingerprint
        assert result.arms[name].title.endswith(", 3 steps")
        steps = [entry["step"] for entry in training["log"] if "completions/mean_length" in entry]
        assert steps == [1, 2, 3]
    for folder in ("grpo", "plain", "grpo_lambda"):
        tried = read_table(out / "online" / f"{folder}-test")
        assert list(dict.fromkeys(tried.column("prompt_id"))) == list(dict.fromkeys(test))
    assert [training["settings"]["gate_fraction"] for training in made.values()] == [0, 1, 0.5]


def test_the_same_run_again_trains_nothing(finished):
    out, result, _ = finished
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(module.dqo, "load_model", None)
        patch.setattr(module.grpo_lambda, "load_model", None)
        patch.setattr(module.baselines, "TRAINERS", {})
        again = module.demo(out, seed=3, say=lambda _: None)
    assert {name: arm.accuracy for name, arm in again.arms.items()} == {
        name: arm.accuracy for name, arm in result.arms.items()
    }

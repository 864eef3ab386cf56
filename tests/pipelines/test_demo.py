"""The main job, on a handful of problems."""

import json
import re
from functools import partial
from pathlib import Path

import pytest

from posttrain.pipelines import demo as module
from posttrain.pipelines.qprobe import QProbeConfig

SMALL = {"train_prompts": 10, "train_samples": 4, "test_prompts": 6, "k": 4, "layers": (1,), "poolings": ("mean",)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(its folder, what it returned, what it said)"""
    out, said = tmp_path_factory.mktemp("demo") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QProbeConfig", partial(QProbeConfig, **SMALL))
        return out, module.demo(out, seed=3, say=said.append), said


def test_the_summary_and_the_report_are_written(finished):
    out, result, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["arms", "manifest"]
    for name, arm in summary["arms"].items():
        assert set(arm) == {"accuracy", "interval", "tokens", "seconds"}
        assert arm["accuracy"] == result.arms[name].accuracy
    page = (out / "report.html").read_text()
    assert "posttrain demo" in page and page.count("<svg") == 3
    assert all(arm.title in page for arm in result.arms.values())


def test_the_snippet_of_the_readme_runs_as_it_stands(finished, tmp_path, monkeypatch, capsys):
    out, result, _ = finished
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[2] / "README.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    exec(snippet, {})
    best = result.scores[0].argmax()
    assert capsys.readouterr().out.startswith(result.test.by_prompt("completion")[0][best])


def test_one_seed_is_everybody_s(finished):
    _, result, _ = finished
    assert result.config.seed == result.config.probe.seed == 3
    assert result.test.manifest["settings"]["seed"] == result.train.manifest["settings"]["seed"] == 3


def test_the_probe_s_line_says_what_was_measured(finished):
    _, result, said = finished
    assert any("held-out prompts" in line and "of the best of 2 (of 4 sampled)" in line for line in said)
    assert len(result.fitted.held_out) == result.fitted.metrics["validation_prompts"]

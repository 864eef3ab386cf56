"""Q# and Q-Probe under a launcher: the first process samples and measures, both train; a probe is fitted in one process."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.test_launch import ROOT, launched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
QSHARP = {
    **{"model": "tiny", "data": "arithmetic", "device": "cpu", "max_tokens": 96, "rounds": 2},
    **{"train_prompts": 8, "train_samples": 4, "rollin_samples": 2, "test_prompts": 4, "k": 2, "guided_samples": 2},
    "value": {"head": "v", "layers": 1, "batch_size": 4, "epochs": 1, "eval_fraction": 0.3, "drop_unanimous": False},
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--config_file", str(ROOT / "recipes/accelerate/ddp2_cpu.yaml")), id="ddp"),
        pytest.param(("--use_deepspeed", "--zero_stage", "2"), id="zero2", marks=pytest.mark.deepspeed),
        pytest.param(("--use_deepspeed", "--zero_stage", "3"), id="zero3", marks=pytest.mark.deepspeed),
    ],
)
def test_both_rounds_of_qsharp_are_trained_by_two_processes(tmp_path: Path, options: tuple[str, ...]) -> None:
    if "--use_deepspeed" in options:
        pytest.importorskip("deepspeed")
    done = launched(tmp_path, QSHARP, *options, command="qsharp")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("guide: ") == 1  # the first process alone reports
    out = tmp_path / "run"
    assert json.loads((out / "summary.json").read_text())["arms"].keys() >= {"base", "qsharp", "qsharp_2", "cd"}
    shapes = []
    for number in (1, 2):
        folder = out / f"round-{number}" / "value"
        assert json.loads((folder / "made_by.json").read_text())["processes"] == 2
        weights = load_file(folder / "model.safetensors")
        assert weights["head.weight"].abs().sum() > 0  # it started at zero
        shapes.append({name: weight.shape for name, weight in weights.items()})
    assert shapes[0] == shapes[1] and all(min(shape) > 0 for shape in shapes[0].values())


def test_qprobe_says_in_one_line_that_it_runs_in_one_process(tmp_path: Path) -> None:
    done = launched(tmp_path, {"model": "tiny", "data": "arithmetic"}, command="qprobe")
    assert done.returncode != 0
    assert done.stderr.count("posttrain: error: launch: this runs in one process: the probe is fitted in seconds") == 1
    assert not (tmp_path / "run").exists()

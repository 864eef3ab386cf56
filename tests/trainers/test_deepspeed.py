"""The real DeepSpeed: two gloo ranks on this machine's processors."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_two_ranks_train_the_embedded_model_under_zero_2(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    launch = ["accelerate.commands.launch", "--use_deepspeed", "--zero_stage", "2", "--num_processes", "2"]
    command = [sys.executable, "-m", *launch, "--main_process_port", str(free_port())]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("zero_language_model.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["ranks"], report["engine"], report["zero_stage"]) == (2, "DeepSpeedEngine", 2)
    assert len(report["losses"]) == 2 and all(map(math.isfinite, report["losses"]))
    assert report["moved"] > 0

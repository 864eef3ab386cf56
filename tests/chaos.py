"""A pipeline that is killed at random moments and started again, beside one that is left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from posttrain.provenance import hash_files

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "tokens_per_second", "out")  # what no two runs have alike


def undisturbed(file: Path, out: Path) -> float:
    """Runs it to its end: seconds from its first line, when what takes time to import is there."""
    process = _start(file, out)
    assert process.stdout is not None
    process.stdout.readline()
    begun = time.monotonic()
    said, _ = process.communicate()
    assert process.returncode == 0, said[-3000:]
    return time.monotonic() - begun


def killed(file: Path, out: Path, kills: int, seconds: float, seed: int) -> None:
    """The same, killed so many times, at moments spread over the `seconds` of an undisturbed run; what it says is shown."""
    draw, done = random.Random(seed), 0
    while done < kills:
        process = _start(file, out)
        assert process.stdout is not None
        process.stdout.readline()
        moment = seconds / (kills + 1) * draw.uniform(0.2, 1.8)
        try:
            said, _ = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            done += 1
            print(f"kill {done} after {moment:.1f} s, at: {(said.splitlines() or ['the start'])[-1]}")
            continue
        assert process.returncode == 0, said[-3000:]
        shutil.rmtree(out)  # this machine has become faster: once more, with less time between kills
        seconds, done = seconds / 2, 0
    process = _start(file, out)
    said, _ = process.communicate()
    assert process.returncode == 0, said[-3000:]


def state(out: Path) -> dict[str, Any]:
    """What must be equal: `summary.json` without times, all tables' rows, and all trained weights."""
    summary = _timeless(json.loads((out / "summary.json").read_text()))
    kept = (*out.rglob("*.parquet"), *out.rglob("*.safetensors"))
    names = {path.relative_to(out).as_posix(): path for path in kept if "-checkpoints-" not in str(path)}
    return {"summary": summary, **{name: hash_files([path]) for name, path in sorted(names.items())}}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _timeless(part) for name, part in value.items() if name not in TIMES and not name.endswith("_runtime")
        }
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def _start(file: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "posttrain", "pipeline", str(file), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )

"""What of the benchmarks can go wrong without a figure that shows it."""

import importlib
import subprocess
import sys
from pathlib import Path

TALKATIVE = "print('ready: http://127.0.0.1:1', flush=True); print('x' * 1_000_000)"


def test_a_service_that_says_much_is_not_blocked(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    rollout = importlib.import_module("rollout")
    with subprocess.Popen([sys.executable, "-c", TALKATIVE], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert rollout.ready(process) == "http://127.0.0.1:1"
            assert process.wait(30) == 0
        finally:
            process.kill()

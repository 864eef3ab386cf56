"""A process of several dies in the middle of a step: all end, and one says why."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from posttrain.cli.main import main

ROOT = Path(__file__).parents[2]
# A command whose work is to add numbers up with the other process, until that is gone.
COMMAND = """
import os, signal, sys
from posttrain.__main__ import main
from posttrain.cli import main as cli

def work(_):
    import torch
    torch.distributed.init_process_group("gloo")
    for step in range(10**6):
        if (step, os.environ["RANK"]) == (3, "1"):
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.ones(1000))

cli._dispatch = work
raise SystemExit(main())
"""


@pytest.mark.slow
def test_a_process_that_dies_in_a_step_ends_all_with_one_readable_error(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND)
    # The launcher looks every ten seconds: what it then sends to the survivor must not come before the survivor's own error.
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--monitor_interval", "10"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "command.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode != 0 and time.monotonic() - start < 120  # a minute, and what it takes to import torch
    said = [line for line in done.stderr.splitlines() if line.startswith("posttrain: ")]
    assert said == ["posttrain: error: launch: another process has ended; the last checkpoint is kept"], done.stderr


# What is registered is done and what was said is heard, though a thread would keep the interpreter for minutes.
LEAVING = """
import atexit, threading, time
from posttrain.pipelines.ranks import leave

threading.Thread(target=time.sleep, args=(600,)).start()
atexit.register(print, "at exit")
print("said")
leave(3)
"""


def test_a_process_that_leaves_meets_no_thread() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout) == (3, "said\nat exit\n")


def test_what_joined_the_processes_of_a_command_is_ended_with_it(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert main(["recipe", "list"]) == 0
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

"""Ctrl-C, at moments at which it is hard to get right, and SIGTERM."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# `posttrain grade`, with work of our own in place of the grading.
COMMAND = """
import atexit, sys, types
from signal import SIGINT, raise_signal

def work(gold, pred):
    {work}
    return types.SimpleNamespace(verdict="equal"), []

sys.path.append({folder!r})
sys.modules["posttrain.rewards.explain"] = types.SimpleNamespace(grade_text=work)
sys.argv = ["posttrain", "grade", "1", "2"]
from posttrain.__main__ import main
raise SystemExit(main())
"""
IMPORTED = (
    "from signal import SIGINT, raise_signal\ntry:\n    raise_signal(SIGINT)\nexcept BaseException as error:\n    "
)


def interrupted(tmp_path: Path, work: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND.format(work=work, folder=str(tmp_path))]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("reaction", ["raise", "pass", "raise ImportError('no such thing') from error"])
def test_an_interruption_of_an_import_is_not_lost_in_it(tmp_path: Path, reaction: str) -> None:
    (tmp_path / "imported.py").write_text(IMPORTED + reaction)
    done = interrupted(tmp_path, "import imported")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "posttrain: interrupted; what is finished is kept\n"


@pytest.mark.parametrize("work", ["raise_signal(SIGINT)", "atexit.register(raise_signal, SIGINT)"])
def test_an_interrupted_command_says_so_in_one_line(tmp_path: Path, work: str) -> None:
    done = interrupted(tmp_path, work)
    assert (done.returncode, done.stderr) == (130, "posttrain: interrupted; what is finished is kept\n")


def test_a_terminated_command_says_so_in_one_line(tmp_path: Path) -> None:
    done = interrupted(tmp_path, "import signal; raise_signal(signal.SIGTERM)")
    assert (done.returncode, done.stderr) == (143, "posttrain: terminated; what is finished is kept\n")


def test_a_second_interruption_ends_what_the_first_one_waits_for(tmp_path: Path) -> None:
    work = """
    try:
        raise_signal(SIGINT)
    finally:
        raise_signal(SIGINT)
        print("cleaned up", flush=True)
    """
    done = interrupted(tmp_path, textwrap.dedent(work).replace("\n", "\n    "))
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "posttrain: interrupted; what is finished is kept\n"


def test_a_caller_that_ignores_interruptions_is_respected(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` does; a child inherits it
    try:
        done = interrupted(tmp_path, "raise_signal(SIGINT)")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout, done.stderr) == (0, "equal\n", "")

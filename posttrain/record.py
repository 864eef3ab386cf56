"""The record of a run, in its folder: what was asked for, what made it, how far it came and what it logged on the way.

    STATUS           running, finished, interrupted, or failed: why; since when, until when, which process
    config.yaml      the configuration as resolved
    attempts.json    of every attempt: arguments, time, versions and the state of the checkout; a resumed run has several
    metrics.jsonl    one object per logged step: `part` (the folder that is made, within the run's), `step`, what was logged
    tensorboard/     the same as event files

A command is wrapped in `recording`, and says where by `begin`; what is logged before, or without a run, goes nowhere.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import UserError, why_unwritten
from posttrain.provenance import plain, versions, write_json, write_text

STATUS, CONFIG, ATTEMPTS, METRICS, EVENTS, LOCK = (
    "STATUS",
    "config.yaml",
    "attempts.json",
    "metrics.jsonl",
    "tensorboard",
    ".lock",
)
STAGE = "stage.json"  # in the folder of a pipeline's stage: what made it, under its `key`
NAMES = frozenset({STATUS, CONFIG, ATTEMPTS, METRICS, EVENTS, LOCK})  # what a folder holds that nothing is made in yet

REPORT_TO = (
    "where trainings are logged besides metrics.jsonl: tensorboard, wandb, trackio, or none; default: tensorboard where it is "
    "installed"
)


@dataclass(frozen=True)
class Status:
    """state: running, finished, failed, interrupted, or killed: it says that it runs, but nobody does. Times are ISO 8601."""

    state: str
    reason: str | None
    started: str
    ended: str | None
    pid: int


class Run:
    """This process's run. report_to: transformers' names of where trainings are logged as well."""

    def __init__(self, folder: Path, report_to: Sequence[str]) -> None:
        self.folder, self.report_to = folder, tuple(report_to)
        self.started = _now()
        rows = read_metrics(folder)
        self._rows = {_key(row): row for row in rows}
        self._rewrite()  # without the line that a kill cut off

    def part(self, folder: Path) -> str:
        """The name of a folder within the run's."""
        return os.path.relpath(folder, self.folder)

    def log(self, folder: Path, step: int, values: Mapping[str, Any]) -> None:
        row = {"part": self.part(folder), "step": step, **_finite(values)}
        again = _key(row) in self._rows  # a step that a former attempt had logged, and that was done again
        self._rows[_key(row)] = row
        if again:
            self._rewrite()
            return
        with (self.folder / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(_line(row))

    def rewind(self, folder: Path, step: int) -> None:
        part = self.part(folder)
        kept = {key: row for key, row in self._rows.items() if row["part"] != part or row["step"] <= step}
        if len(kept) < len(self._rows):
            self._rows = kept
            self._rewrite()

    def move(self, folder: Path, to: Path) -> None:
        """What was logged of a folder, or within it, goes with it."""
        before, after = self.part(folder), self.part(to)
        rows = [
            {**row, "part": after + row["part"].removeprefix(before)}
            if f"{row['part']}/".startswith(f"{before}/")
            else row
            for row in self._rows.values()
        ]
        self._rows = {_key(row): row for row in rows}
        self._rewrite()
        events = self.folder / EVENTS
        if (events / before).is_dir():
            (events / before).rename(events / after)

    def _rewrite(self) -> None:
        write_text(self.folder / METRICS, "".join(map(_line, self._rows.values())))

    def mark(self, state: str) -> None:
        """state: with its reason, on one line."""
        ended = [] if state == "running" else [f"ended: {_now()}"]
        lines = [state, f"started: {self.started}", *ended, f"pid: {os.getpid()}"]
        write_text(self.folder / STATUS, "\n".join(lines) + "\n")


class _Command:
    """A command that may begin a run."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = list(argv)
        self.run: Run | None = None
        self.lock: int | None = None
        self.new = False


_command: _Command | None = None  # that this process is at


@contextmanager
def recording(argv: Sequence[str], first: bool = True) -> Iterator[None]:
    """Around a command: on leaving, the run that it began has its STATUS. first: of several processes, the one that writes."""
    global _command
    before, _command = _command, _Command(argv) if first else None
    command = _command
    state = "finished"
    try:
        yield
    except BaseException as error:
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {_reason(error)}"
        if command and command.run and command.new and isinstance(error, UserError) and is_bare(command.run.folder):
            shutil.rmtree(command.run.folder)  # refused before anything was made: a typo leaves no folder
            command.run = None
        raise
    finally:
        _command = before
        if command and command.run:
            with suppress(OSError) if state != "finished" else nullcontext():  # a full disk is told of already
                command.run.mark(state)
        if command and command.lock is not None:
            os.close(command.lock)


def begin(folder: str | Path, config: Any, report_to: Sequence[str] | None = None) -> None:
    """From here on the command works on this folder; config: plain values or dataclasses, as resolved.

    report_to: transformers' names; None: tensorboard where it is installed.
    Errors: UserError naming `out` for a folder that cannot be written to, or in which another run is at work, and `report-to`.
    """
    targets = _targets(report_to)
    if _command is None:
        return
    folder = Path(folder)
    try:
        _command.new = not folder.exists()
        if not folder.is_dir():
            folder.mkdir(parents=True)
        _command.lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(_command.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"out: another run is at work in {folder}") from None
    except OSError as error:
        if error.errno == errno.ENOLCK:
            raise UserError(
                f"out: {folder} cannot be locked: {error.strerror}; give a folder on a local disk"
            ) from None
        raise UserError(f"out: cannot write to {folder}: {error.strerror}") from None
    _command.run = Run(folder, targets)
    _command.run.mark("running")
    write_text(folder / CONFIG, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
    attempt = {"argv": _command.argv, "started": _command.run.started, "versions": versions(), "git": checkouts()}
    write_json(folder / ATTEMPTS, [*read_attempts(folder), attempt])


def current() -> Run | None:
    """The run that this process is at."""
    return _command.run if _command else None


def log(folder: Path, step: int, values: Mapping[str, Any]) -> None:
    """A line of `metrics.jsonl`; folder: what is made, within the run's. The same step logged again replaces its line."""
    if run := current():
        run.log(folder, step, values)


def read_status(folder: Path) -> Status | None:
    """None where there is none, or none that can be read."""
    try:
        state, *lines = (folder / STATUS).read_text(encoding="utf-8").splitlines()
        values = dict(line.split(": ", 1) for line in lines)
        state, _, reason = state.partition(": ")
        if state == "running" and not _is_locked(folder / LOCK):
            state = "killed"
        return Status(state, reason or None, values["started"], values.get("ended"), int(values["pid"]))
    except (OSError, ValueError, KeyError):
        return None


def is_set_aside(folder: Path) -> bool:
    """Whether other settings of a pipeline's stage have left it: its name ends with their fingerprint."""
    try:
        key = json.loads((folder / STAGE).read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return folder.name.endswith(f"-{key[:12]}")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All that was logged, in order; a line that a kill cut off is left out."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("part"), str) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """Empty where there are none, or none that can be read."""
    try:
        found = json.loads((folder / ATTEMPTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def checkouts() -> dict[str, dict[str, Any]]:
    """The git checkouts of this code and of the working directory, by folder: `commit`, and whether it is `dirty`, which
    untracked files do not make it. Empty without git."""
    package = Path(__file__).parent
    found = {}
    for folder, tracked in ((package, "__init__.py"), (Path.cwd(), None)):
        if tracked and _git(folder, "ls-files", "--error-unmatch", tracked) is None:
            continue  # installed into an environment that lies in somebody else's checkout
        root, commit = _git(folder, "rev-parse", "--show-toplevel"), _git(folder, "rev-parse", "HEAD")
        if root and commit:
            found[root] = {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "-uno"))}
    return found


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words], cwd=folder, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _targets(report_to: Sequence[str] | None) -> list[str]:
    """Errors: UserError for a name that transformers does not know, or whose package is missing."""
    from importlib.util import find_spec

    if report_to is None:
        return ["tensorboard"] if find_spec("tensorboard") else []
    if list(report_to) == ["none"]:
        return []
    for name in report_to:
        if name == "tensorboard" and not find_spec("tensorboard"):
            raise UserError("report-to: tensorboard is not installed; pip install 'posttrain[tensorboard]'")
        if name in ("wandb", "trackio") and not find_spec(name):
            raise UserError(f"report-to: {name} is not installed; pip install {name}")
    others = set(report_to) - {"tensorboard", "wandb", "trackio"}
    if others:
        raise UserError(f"report-to: must be none, tensorboard, wandb or trackio, got {min(others)!r}")
    return list(report_to)


def is_bare(folder: Path) -> bool:
    """Whether nothing lies there, but for what a run notes of itself before it makes anything, or has half written of that."""
    return {re.sub(r"^\.(.+)\.\d+$", r"\1", path.name) for path in folder.iterdir()} <= NAMES


def _is_locked(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UserError) and text:
        return text
    return why_unwritten(error) or f"{type(error).__name__}: {text}".removesuffix(": ")


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no word for NaN."""
    return {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["part"], row["step"], frozenset(row))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

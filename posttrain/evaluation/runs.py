"""Runs read back from their folders, for a page over several of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain import record
from posttrain.errors import UserError
from posttrain.evaluation.arms import SAMPLED, Arm
from posttrain.evaluation.arms_file import ARMS, Measured, read_arms
from posttrain.evaluation.harness_report import GUIDED_BY
from posttrain.evaluation.report import SAMPLES
from posttrain.record import Status, read_attempts, read_metrics, read_status


@dataclass(frozen=True)
class Point:
    """A guided policy in the plane of accuracy and KL."""

    beta: float
    kl: float
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Recorded:
    """A run: what its folder says.

    sweeps: law -> points in order of KL, on the problems of `measured`; samples: the part that they are of -> problems.
    """

    name: str
    folder: Path
    status: Status | None
    attempts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    measured: list[Measured]
    sweeps: dict[str, list[Point]]
    samples: dict[str, list[dict[str, Any]]]

    @property
    def command(self) -> str:
        """Its first word; the others stand with what made it."""
        argv = self.attempts[-1].get("argv") if self.attempts else None
        return argv[0] if argv else ""

    def curves(self) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
        """part -> name of what is logged -> (steps, values)."""
        found: dict[str, dict[str, dict[int, float]]] = {}
        for row in self.metrics:
            of_part = found.setdefault(row["part"], {})
            for name, value in row.items():
                if name not in ("part", "step") and isinstance(value, (int, float)):
                    of_part.setdefault(name, {})[row["step"]] = value
        return {part: {name: _sorted(points) for name, points in of_part.items()} for part, of_part in found.items()}


def read_runs(folders: Sequence[Path]) -> list[Recorded]:
    """Named by the shortest end of their paths that tells them apart.

    Errors: UserError naming `run` for a folder that is none, or a damaged one, and for one that is given twice.
    """
    paths = [folder.absolute() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"run: {path} is given twice")
    return [_read(folder, name) for folder, name in zip(folders, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _read(folder: Path, name: str) -> Recorded:
    if not folder.is_dir():
        raise UserError(f"run: no such folder: {folder}")
    if not any((folder / file).is_file() for file in (record.STATUS, ARMS)):
        raise UserError(f"run: {folder} is no run's folder: it has neither {record.STATUS} nor {ARMS}")
    return Recorded(
        name,
        folder,
        read_status(folder),
        read_attempts(folder),
        _metrics(folder),
        _measured(folder),
        _sweeps(folder),
        {part: problems for part, problems in _samples(folder)},
    )


def _measured(folder: Path) -> list[Measured]:
    """Of an evaluation at several betas what each has measured, of a pipeline at work its stages."""
    parts = [path.parent for path in sorted(folder.glob(f"*/{ARMS}")) if not record.is_set_aside(path.parent)]
    return read_arms(folder) or [_of_part(part, found) for part in parts for found in read_arms(part)]


def _of_part(part: Path, found: Measured) -> Measured:
    """Where a stage has a name of its own, the arms that are not the base's have it too: two stages may be of one method."""
    if _json(part / record.STAGE).get("method", part.name) == part.name:
        return found
    arms = (arm if arm.name in SAMPLED else replace(arm, title=f"{part.name}: {arm.title}") for arm in found.arms)
    return replace(found, arms=tuple(arms))


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """But for what a pipeline has set aside."""
    rows = read_metrics(folder)
    first = {row["part"]: row["part"].partition("/")[0] for row in rows}
    aside = {name for name in first.values() if record.is_set_aside(folder / name)}
    return [row for row in rows if first[row["part"]] not in aside]


def _sweeps(folder: Path) -> dict[str, list[Point]]:
    """Of Q#'s own run, or of a pipeline's stages, by whose name they go where there are several."""
    found: dict[str, list[Point]] = {}
    written = _json(folder / "summary.json").get("frontier") or {}
    for stage, points in written.items() if isinstance(written, dict) else [("", written)]:
        for point in points:
            law = f"{stage}: {point['law']}" if len(written) > 1 and stage else point["law"]
            interval = (point["interval"][0], point["interval"][1])
            found.setdefault(law, []).append(Point(point["beta"], point["kl"], point["accuracy"], interval))
    return {law: sorted(points, key=lambda point: point.kl) for law, points in found.items()}


def _samples(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The run's own, and those of its stages as they are."""
    for path in sorted(folder.glob(f"**/{SAMPLES}"), key=lambda path: (len(path.parts), path)):
        if any(record.is_set_aside(parent) for parent in path.parents if folder in parent.parents):
            continue
        try:
            problems = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except ValueError:
            raise UserError(f"run: {path} is damaged; the command that made it writes it again") from None
        yield path.parent.relative_to(folder).as_posix(), problems


def _json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"run: {path} is damaged; the command that made it writes it again") from None


def comparable(runs: Sequence[Recorded]) -> list[Measured]:
    """The arms of all runs by the problems they were measured on: those of one list can be compared, those of two cannot.

    A model that is guided in one of them is a base, as that of a method's run is. Of several runs an arm's title names its run,
    except where it is the same in all that have it: one model, sampled alike.
    Where a run has measured a list more than once, as two benchmarks that ask the same problems do, it names the measurement.
    """
    lists = {each.fingerprint: each for run in reversed(runs) for each in reversed(run.measured)}
    found = []
    for fingerprint, first in reversed(lists.items()):
        measured = [(run, each) for run in runs for each in run.measured if each.fingerprint == fingerprint]
        titles = dict.fromkeys(each.title for _, each in measured)
        several = len({run.name for run, _ in measured}) < len({(run.name, each.title) for run, each in measured})
        bases = {
            arm.title.partition(GUIDED_BY)[0] for _, each in measured for arm in each.arms if GUIDED_BY in arm.title
        }
        arms = [
            (run, replace(arm, title=f"{each.title}: {arm.title}" if several else arm.title))
            for run, each in measured
            for arm in (replace(arm, name="base") if arm.title in bases else arm for arm in each.arms)
        ]
        scores: dict[str, list[tuple[float, ...]]] = {}
        for _, arm in arms:
            scores.setdefault(arm.title, []).append((arm.tokens, *arm.per_problem))
        shown: dict[str, Arm] = {}
        for run, arm in arms:
            alike = len(scores[arm.title]) > 1 and len(set(scores[arm.title])) == 1
            title = arm.title if alike or len(runs) == 1 else f"{run.name}: {arm.title}"
            if title not in shown or (arm.name == "base" and shown[title].name != "base"):
                shown[title] = replace(arm, title=title)
        title = ", ".join(titles) if several else first.title
        found.append(replace(first, title=title, arms=tuple(shown.values())))
    return found


def _sorted(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(points)
    return steps, [points[step] for step in steps]

"""The arms of a run on disk, `arms.json`: what runs are compared by, each arm with its score on every problem."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import UserError
from posttrain.evaluation.arms import Arm
from posttrain.provenance import hash_json, plain, write_text
from posttrain.rollouts.table import RolloutTable

ARMS = "arms.json"
SHORT = 16  # hexadecimal digits of a problem's fingerprint


@dataclass(frozen=True)
class Measured:
    """Arms on the same problems. problems: a fingerprint of each, in the order of the arms' `per_problem`."""

    title: str
    problems: tuple[str, ...]
    arms: tuple[Arm, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Of the problems: runs are comparable where they have the same."""
        return hash_json(self.problems)


def fingerprints(problems: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Of problems and their answers; how they are put to a model has no part in it."""
    return tuple(hash_json(problem)[:SHORT] for problem in problems)


def problems_of(table: RolloutTable) -> tuple[str, ...]:
    """The fingerprints of a table's problems, out of the turns that its template made of them."""
    before, _, after = table.manifest.get("settings", {}).get("template", "{problem}").partition("{problem}")
    before, after = (part.replace("{{", "{").replace("}}", "}") for part in (before, after))
    prompts = (group[0][-1]["content"] for group in table.by_prompt("prompt"))
    answers = (group[0] for group in table.by_prompt("answer"))
    texts = (prompt.removeprefix(before).removesuffix(after) for prompt in prompts)
    return fingerprints(list(zip(texts, answers, strict=True)))


def measured(arms: Mapping[str, Arm], table: RolloutTable) -> Measured:
    """What was measured on a table's problems."""
    return Measured(table.manifest.get("settings", {}).get("source", "test"), problems_of(table), tuple(arms.values()))


def write_arms(folder: Path, found: Sequence[Measured]) -> None:
    """A line for each list of problems and each arm: people look at this file, too."""
    sets = []
    for each in found:
        arms = [_dump({**plain(arm), "per_problem": arm.per_problem.tolist()}) for arm in each.arms]
        head = _dump({"title": each.title, "problems": each.problems})
        sets.append(head[:-1] + ', "arms": [\n' + ",\n".join(arms) + "\n]}")
    write_text(folder / ARMS, "[\n" + ",\n".join(sets) + "\n]\n")


def read_arms(folder: Path) -> list[Measured]:
    """Empty where a run has measured nothing yet. Errors: UserError naming `run` for a damaged file."""
    path = folder / ARMS
    if not path.is_file():
        return []
    try:
        return [
            Measured(each["title"], tuple(each["problems"]), tuple(_arm(each["problems"], arm) for arm in each["arms"]))
            for each in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"run: {path} is damaged; the command that made it writes it again") from None


def _arm(problems: Sequence[str], written: Mapping[str, Any]) -> Arm:
    values = {field.name: written[field.name] for field in dataclasses.fields(Arm)}
    scores = np.array(written["per_problem"], dtype=np.float64)
    if scores.shape != (len(problems),):
        raise ValueError
    return Arm(**{**values, "per_problem": scores, "curve": tuple(written["curve"])})


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)

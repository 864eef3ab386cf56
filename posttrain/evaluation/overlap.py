"""Contamination: which evaluation problems stand in the training data, whole or in pieces.

A problem is *exact* when a training text is the same, up to case and white space. Its *share* is that part of its 13-grams, over
words and numbers in lower case (`[a-z0-9]+`), that occurs anywhere in the training data; a problem shorter than 13 words has
none.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.data.load import load_rows
from posttrain.errors import UserError

N = 13
HIGH = 0.5
WORD = re.compile(r"[a-z0-9]+")

Gram = tuple[str, ...]


@dataclass(frozen=True)
class Hit:
    """An evaluation problem that shares something; `twin` is the training text that shares most with it."""

    id: str
    share: float
    exact: bool
    twin: str


@dataclass(frozen=True)
class Overlap:
    """`hits`: the problems that share something, most first; `short`: the number of those that have no 13-gram."""

    problems: int
    short: int
    hits: list[Hit]

    def counts(self) -> dict[str, int]:
        return {
            "problems": self.problems,
            "exactly in the training data": sum(hit.exact for hit in self.hits),
            f"more than half of the {N}-grams": sum(hit.share > HIGH for hit in self.hits),
            f"any {N}-gram": sum(hit.share > 0 for hit in self.hits),
            f"shorter than {N} words": self.short,
        }


def load_texts(source: str, field: str) -> dict[str, str]:
    """id -> problem, of a file or of a data set named as NAME/SPLIT. Errors: UserError naming the field or the data."""
    if Path(source).suffix in (".jsonl", ".json", ".parquet"):
        rows = load_rows(source)
    else:
        name, _, split = source.rpartition("/")
        if not name:
            raise UserError(f"{field}: give a .jsonl or .parquet file, or a data set as NAME/SPLIT, got {source!r}")
        rows = load_rows(name, split)
    return {row["id"]: row["problem"] for row in rows}


def find_overlap(train: Mapping[str, str], evaluation: Mapping[str, str]) -> Overlap:
    """What evaluation problems share with training texts, both as id -> text."""
    problems = {name: words(text) for name, text in evaluation.items()}
    wanted = {gram for found in problems.values() for gram in grams(found)}
    whole: dict[str, str] = {}
    where: dict[Gram, list[str]] = {gram: [] for gram in wanted}
    for name, text in train.items():
        whole.setdefault(level(text), name)
        for gram in grams(words(text)) & wanted:
            where[gram].append(name)
    hits = []
    for name, found in problems.items():
        own = grams(found)
        shared = [gram for gram in own if where[gram]]
        exact = whole.get(level(evaluation[name]))
        if exact is not None or shared:
            twin = exact if exact is not None else _most_common(where, shared)
            hits.append(Hit(name, len(shared) / len(own) if own else 0.0, exact is not None, twin))
    hits.sort(key=lambda hit: (-hit.exact, -hit.share, hit.id))
    return Overlap(len(problems), sum(len(found) < N for found in problems.values()), hits)


def level(text: str) -> str:
    return " ".join(text.lower().split())


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def grams(found: Sequence[str]) -> set[Gram]:
    return {tuple(found[start : start + N]) for start in range(len(found) - N + 1)}


def _most_common(where: Mapping[Gram, Sequence[str]], shared: Sequence[Gram]) -> str:
    counted: dict[str, int] = {}
    for gram in shared:
        for name in where[gram]:
            counted[name] = counted.get(name, 0) + 1
    return min(counted, key=lambda name: (-counted[name], name))

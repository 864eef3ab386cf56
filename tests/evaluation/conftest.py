"""A small data file, and evaluations of it by a stand-in for a model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.evaluation.harness import evaluate
from tests.evaluation.stand_ins import adder, tasks_of, write_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "sums.jsonl")


@pytest.fixture
def evaluated(tmp_path: Path, data: Path) -> Callable[..., Path]:
    """(name, seed, **fields of the benchmark) -> the folder of a finished evaluation."""

    def make(name: str = "run", seed: int = 0, **overrides: object) -> Path:
        evaluate(tasks_of(data, **overrides), adder(), tmp_path / name, seed=seed, say=lambda _: None)
        return tmp_path / name

    return make

import enum
from dataclasses import dataclass, field
from typing import Literal

import pytest

from posttrain.config import build, convert, read_yaml
from posttrain.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    size: int = 3
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    layers: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)


def test_values_reach_their_fields():
    outer = build(Outer, {"name": "x", "layers": [1, 2], "inner": {"rate": 2}, "limit": None})
    assert outer == Outer("x", layers=(1, 2), inner=Inner(2.0))


@dataclass(frozen=True)
class Range:
    low: float = 0.0

    def __post_init__(self):
        if self.low < 0:
            raise UserError(f"low: must not be negative, got {self.low}")


@dataclass(frozen=True)
class Ranges:
    first: Range = field(default_factory=Range)


def test_a_value_out_of_range_is_named_with_the_part_it_is_in():
    with pytest.raises(UserError, match=r"^first\.low: must not be negative, got -1.0"):
        build(Ranges, {"first": {"low": -1}})
    with pytest.raises(UserError, match=r"^low: must not be negative"):
        build(Range, {"low": -1})


def test_yaml_exponents_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("name: x\ninner: {rate: 5e-5}\n")
    assert build(Outer, read_yaml(tmp_path / "c.yaml")).inner.rate == 5e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "sise": 1}, r"sise: unknown field \(did you mean size\?\)"),
        ({}, "name: missing"),
        ({"name": "x", "size": "3"}, "size: must be of type int"),
        ({"name": "x", "size": True}, "size: must be of type int"),
        ({"name": "x", "kind": "c"}, "kind: must be one of a, b"),
        ({"name": "x", "layers": 3}, "layers: must be a list"),
        ({"name": "x", "layers": [1, "2"]}, r"layers\[1\]: must be of type int"),
        ({"name": "x", "inner": {"rte": 1}}, r"inner.rte: unknown field \(did you mean rate\?\)"),
        ({"name": "x", "inner": 1}, "inner: must be a mapping"),
        *[
            ({"name": "x", "inner": {"rate": rate}}, "inner.rate: must be a number")
            for rate in ("fast", True, [1.0], {}, None)
        ],
    ],
)
def test_errors_name_the_field(values, message):
    with pytest.raises(UserError, match=message):
        build(Outer, values)


class Shape(enum.Enum):
    ROUND = "round"
    SQUARE = "square"


def test_of_several_types_the_first_that_fits_is_taken():
    assert convert(str | list[float] | None, ["1e-1"], "x") == [0.1]
    assert convert(dict[str, int] | str, {"a": 1}, "x") == {"a": 1}
    assert convert(Shape | str, "round", "x") is Shape.ROUND
    with pytest.raises(UserError, match=r"^x: must be of type str or list, got 3"):
        convert(str | list[float] | None, 3, "x")
    with pytest.raises(UserError, match=r"^x: must be one of round, square, got 'rund' \(did you mean round\?\)"):
        convert(Shape | str, "rund", "x")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="config: ") as caught:
        read_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")

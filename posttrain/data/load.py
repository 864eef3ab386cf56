"""Problems with answers: a named data set, or the user's own file.

A row is a dict with `id`, `problem`, `answer` (all strings) and whatever else its source carries. A name is looked up in
this order: `arithmetic` and `arithmetic_hasty` (generated); a file; a folder `<name>/<split>.jsonl` under `POSTTRAIN_DATA`; the hub.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data import arithmetic
from posttrain.errors import UserError, nearest
from posttrain.rewards.math import extract_answer

Row = dict[str, Any]


@dataclass(frozen=True)
class HubSource:
    """Where the hub keeps a data set, and how its rows become ours."""

    repository: str
    configurations: tuple[str | None, ...]
    convert: Callable[[Row], Row]


def _gsm8k(row: Row) -> Row:
    solution, _, answer = row["answer"].rpartition("####")
    return {"problem": row["question"], "solution": solution.strip(), "answer": answer.strip().replace(",", "")}


def _math(row: Row) -> Row:
    # Two training solutions end in an empty box; the answer to both is 0.
    return {**row, "answer": extract_answer(row["solution"]) or "0", "subject": row["type"]}


def _svamp(row: Row) -> Row:
    return {
        "problem": f"{row['Body'].strip()} {row['Question'].strip()}",
        "answer": str(row["Answer"]).removesuffix(".0"),
    }


def _as_it_is(row: Row) -> Row:
    return row


MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
FILES = (".jsonl", ".json", ".parquet")
GENERATED: dict[str, Callable[..., list[Row]]] = {
    "arithmetic": arithmetic.rows,
    "arithmetic_hasty": arithmetic.hasty_rows,
}
HUB = {
    "gsm8k": HubSource("openai/gsm8k", ("main",), _gsm8k),
    "math": HubSource("EleutherAI/hendrycks_math", MATH_SUBJECTS, _math),
    "math500": HubSource("HuggingFaceH4/MATH-500", (None,), _as_it_is),
    "svamp": HubSource("ChilleD/SVAMP", (None,), _svamp),
}


def load_rows(data: str, split: str = "test", limit: int | None = None, seed: int = 0) -> list[Row]:
    """The first `limit` rows of a data set's split (of generated ones: `limit` rows drawn by `seed`, 1000 by default).

    Errors: UserError naming `data`, `split` or `limit`, or the first row without a problem or an answer.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: must be at least 1, got {limit}")
    if data in GENERATED:
        try:
            return GENERATED[data](limit or 1000, split, seed)
        except ValueError as error:
            raise UserError(str(error).replace("size:", "limit:", 1)) from None
    rows = _source(data, split)
    if not rows:
        raise UserError(f"data: {data} is empty")
    rows = [_checked(row, f"{data} row {number}", number) for number, row in enumerate(rows[:limit], 1)]
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise UserError(f"data: {data} has the id {row['id']!r} twice; ids must be unique")
        seen.add(row["id"])
    return rows


def check_data(data: str) -> None:
    """Errors: UserError naming `data` for a name or a file that nothing is known of; nothing is read, and no hub asked."""
    path, root = Path(data).expanduser(), os.environ.get("POSTTRAIN_DATA")
    if path.suffix in FILES:
        if not path.is_file():
            raise UserError(f"data: no such file: {path}")
        return
    local = sorted(entry.name for entry in Path(root).iterdir()) if root and Path(root).is_dir() else []
    known = [*GENERATED, *HUB, *local]
    if data not in known and (data.count("/") != 1 or path.exists()):
        raise UserError(
            f"data: no data set or file named {data}{nearest(data, known)}; "
            "give arithmetic, a .jsonl or .parquet file, a folder under POSTTRAIN_DATA, or a hub id"
        )


def _source(data: str, split: str) -> list[Row]:
    check_data(data)
    path, root = Path(data).expanduser(), os.environ.get("POSTTRAIN_DATA")
    if path.suffix in FILES:
        return _read_file(path)
    if root:
        folder = Path(root) / data
        if (folder / f"{split}.jsonl").is_file():
            return _read_file(folder / f"{split}.jsonl")
        if folder.is_dir() and data not in HUB:
            known = sorted(file.stem for file in folder.glob("*.jsonl"))
            raise UserError(f"split: {data} has no split {split!r}; it has {', '.join(known)}")
    return _from_hub(HUB.get(data) or HubSource(data, (None,), _as_it_is), split)


def read_rows(path: Path, field: str = "data") -> list[Row]:
    """The rows of a .jsonl or .parquet file as they are. Errors: UserError naming `field`."""
    if path.suffix not in FILES or not path.is_file():
        raise UserError(f"{field}: no such .jsonl or .parquet file: {path}")
    try:
        return _read_file(path)
    except UserError as error:
        raise UserError(f"{field}: {str(error).removeprefix('data: ')}") from None


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"data: {path} is not a Parquet file: {str(error).splitlines()[0]}") from None
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"data: {path} line {number} must be a JSON object")
                rows.append(row)
    except json.JSONDecodeError as error:
        raise UserError(f"data: {path} line {number} is not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"data: {path} is not UTF-8 text") from None
    return rows


def _from_hub(source: HubSource, split: str) -> list[Row]:
    from datasets import load_dataset

    rows = []
    for configuration in source.configurations:
        try:
            part = load_dataset(source.repository, configuration, split=split)
        except Exception as error:  # the hub client raises whatever its transport raises
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(
                f"data: {source.repository} ({split}) could not be loaded from the hub: {reason}; or set POSTTRAIN_DATA to a local copy"
            ) from None
        rows += [source.convert(row) for row in part]
    return rows


def _checked(row: Row, where: str, number: int) -> Row:
    problem = row.get("problem", row.get("question"))
    if not isinstance(problem, str) or not problem.strip():
        raise UserError(f"problem: {where} has none; every row needs a text `problem` (or `question`)")
    answer = row.get("answer")
    if isinstance(answer, str) and "####" in answer:  # GSM8K as it is published: the reasoning, then the answer
        answer = _gsm8k({"question": problem, "answer": answer})["answer"]
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or str(answer).strip() in ("", "nan"):
        raise UserError(f"answer: {where} has none; every row needs an `answer`, text or a number")
    return {**row, "id": str(number if row.get("id") is None else row["id"]), "problem": problem, "answer": str(answer)}

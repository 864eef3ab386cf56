"""Grades of a rollout table, in a file beside it: the table is never rewritten, and grading never generates.

`grades.jsonl` has a head line (what was graded, by which grader) and then one line per problem, in the table's order, with
a list over its samples in every field. It is appended to while grading goes on; a torn last line is dropped and its problem
graded again.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from posttrain import rewards
from posttrain.errors import UserError
from posttrain.evaluation import lm_eval_bridge
from posttrain.evaluation.benchmarks import Benchmark
from posttrain.evaluation.run_folder import read_prompts
from posttrain.progress import bar
from posttrain.provenance import hash_files, hash_json, versions, write_text
from posttrain.rewards.math import Grade, canonical, grade
from posttrain.rollouts.table import RolloutTable, read_table

CHUNK = 4096  # completions graded between two writes; enough for the grader to share them among processes

Line = dict[str, Any]


def grade_benchmark(
    folder: Path, benchmark: Benchmark, *, again: bool = False, say: Callable[[str], None] = print
) -> list[Line]:
    """One line per problem. Grades what is not graded yet; `again` everything, and the old grades stay until the new ones are whole.

    Errors: UserError naming `table` when generation is not finished, or does not hold n completions of every problem.
    """
    table = read_table(folder / "rollouts")
    rows = read_prompts(folder)
    completions = _completions(table, rows, benchmark.n)
    thinking = table.manifest["settings"].get("thinking", "")
    head = {
        "table": hash_json(table.manifest["shards"]),
        "grader": grader_fingerprint(),
        "lm_eval": compatible(benchmark),
    }
    path = folder / "grades.jsonl"
    lines, size = _read(path, head, [row["id"] for row in rows], benchmark, say)
    if len(lines) == len(rows) and not again:
        return lines
    if again or (not lines and path.is_file()):
        lines = [line for chunk in _graded(rows, completions, thinking, benchmark) for line in chunk]
        write_text(path, "".join(map(_dump, [head, *lines])))
        return lines
    with path.open("r+b" if lines else "wb") as stream:
        stream.truncate(size)
        stream.seek(size)
        stream.write(b"" if lines else _dump(head).encode())
        for chunk in _graded(rows, completions, thinking, benchmark, len(lines)):
            stream.write("".join(map(_dump, chunk)).encode())
            stream.flush()
            os.fsync(stream.fileno())
            lines += chunk
    return lines


def grader_fingerprint() -> str:
    """Of everything that can change a verdict: our own code, and the libraries that it asks."""
    code = [*Path(next(iter(rewards.__path__))).rglob("*.py"), Path(lm_eval_bridge.__file__)]
    installed = versions()
    return hash_json([hash_files(code), [installed.get(name) for name in ("math-verify", "sympy")]])


def compatible(benchmark: Benchmark) -> str | None:
    """The lm-eval task whose metrics are computed here."""
    return benchmark.lm_eval if lm_eval_bridge.available(benchmark.lm_eval) else None


def _completions(table: RolloutTable, rows: Sequence[dict[str, Any]], n: int) -> list[list[str]]:
    ids = [group[0] for group in table.by_prompt("prompt_id")]
    completions = table.by_prompt("completion")
    if ids != [row["id"] for row in rows] or any(len(group) != n for group in completions):
        raise UserError(f"table: {table.folder} does not hold {n} completions of each of the {len(rows)} problems")
    return completions


def _read(
    path: Path, head: dict[str, Any], ids: Sequence[str], benchmark: Benchmark, say: Callable[[str], None]
) -> tuple[list[Line], int]:
    """The lines that hold, and the bytes that they take; nothing of what another grader, or another table, left."""
    if not path.is_file():
        return [], 0
    pieces = path.read_bytes().split(b"\n")
    size, lines = 0, []
    for index, piece in enumerate(pieces[:-1]):  # the last one is empty, or torn
        try:
            line = json.loads(piece)
            holds = line == head if index == 0 else line["id"] == ids[index - 1] and len(line["verdict"]) == benchmark.n
        except (ValueError, KeyError, TypeError, IndexError):
            holds = False
        if not holds:
            break
        size += len(piece) + 1
        lines += [line] if index else []
    if size == 0:
        say(
            f"{benchmark.name}: graded by another version of the grader, or not by this run; grading all {len(ids)} problems again"
        )
    elif len(b"\n".join(pieces)) > size:
        say(f"{benchmark.name}: grades.jsonl ended in a torn line; it was dropped, and its problem is graded again")
    return lines, size


def _graded(
    rows: Sequence[dict[str, Any]],
    completions: Sequence[list[str]],
    thinking: str,
    benchmark: Benchmark,
    start: int = 0,
) -> Iterator[list[Line]]:
    step = max(1, CHUNK // benchmark.n)
    with bar(f"{benchmark.name}: grade", len(rows)) as shown, closing(lm_eval_bridge.Judge()) as judge:
        shown.skip(start)
        for first in range(start, len(rows), step):
            chunk, texts = rows[first : first + step], completions[first : first + step]
            grades = iter(
                grade(
                    completions=[thinking + text for group in texts for text in group],
                    golds=[row["answer"] for row in chunk for _ in range(benchmark.n)],
                )
            )
            lines = []
            for row, group in zip(chunk, texts, strict=True):
                lines.append(_line(row, [next(grades) for _ in group]))
                if task := compatible(benchmark):
                    lines[-1]["lm_eval"] = lm_eval_bridge.scores(task, row, group, judge)
            yield lines
            shown.advance(len(chunk))


def _line(row: dict[str, Any], grades: list[Grade]) -> Line:
    return {
        "id": row["id"],
        "verdict": [graded.verdict for graded in grades],
        "extracted": [graded.answer for graded in grades],
        "rule": [graded.rule for graded in grades],
        "vote": [_vote(graded, row["answer"]) for graded in grades],
    }


def _vote(graded: Grade, gold: str) -> str | None:
    """What a completion votes for: all that equal the gold for the same; whatever the grader gave up on, for its own text."""
    if graded.correct:
        return canonical(gold)
    if graded.answer is None or graded.verdict in ("error", "timeout"):
        return graded.answer
    return canonical(graded.answer)


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"

"""What lies in an evaluation's folder, and that it may go on only as it began.

run.json                    what is measured: model, engine, versions, and every benchmark with the hash of its data
times.json                  when, and for how long; nothing else here depends on the clock but the tables' own manifests
<benchmark>/prompts.jsonl   one line per problem: its row of data, and the prompt exactly as the model sees it
<benchmark>/rollouts/       the rollout table
<benchmark>/stops.json      the stop text that ended each completion
<benchmark>/grades.jsonl    one line per problem
report.{md,json,html}
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain.config import build
from posttrain.errors import UserError
from posttrain.evaluation.benchmarks import Benchmark, Problems
from posttrain.provenance import hash_json, plain, read_json, versions, write_json, write_text
from posttrain.rollouts.collect import DECISIVE, Prompt

BREAKDOWNS = ("subject", "level", "type", "contest")  # fields of a row by which reports split a benchmark
SCRATCH = re.compile(r"\.(?:run\.json|times\.json|stops\.json|(?:prompts|grades)\.jsonl|report\.(?:md|json|html))\.\w+")
DATA_FIELDS = ("id", "problem", "answer", "solution", *BREAKDOWNS)


def write_run(
    out: Path,
    tasks: Sequence[Problems],
    *,
    model: str,
    fingerprint: str,
    context: int,
    seed: int,
    settings: dict[str, Any],
) -> None:
    """`run.json`; on resume, further benchmarks are added to it. Errors: UserError naming what is not as it was."""
    run: dict[str, Any] = {
        "model": model,
        "fingerprint": fingerprint,
        "context": context,
        "seed": seed,
        "settings": plain(settings),
        "versions": versions(),
        "benchmarks": {task.benchmark.name: _entry(task) for task in tasks},
    }
    if (out / "run.json").is_file():
        old = read_run(out)
        _agree(out, _decisive(old), _decisive(run))
        for name, entry in old["benchmarks"].items():
            _agree(out, entry, run["benchmarks"].get(name, entry), f"{name}.")
        run = {**old, "benchmarks": {**old["benchmarks"], **run["benchmarks"]}}
    write_json(out / "run.json", run)


def _entry(task: Problems) -> dict[str, Any]:
    return {
        "benchmark": plain(task.benchmark),
        "rows": len(task.rows),
        "data_rows": task.data_rows,
        "data_sha256": task.sha256,
        "problems_sha256": hash_json([[row["id"], row["problem"], row["answer"]] for row in task.rows]),
        "exemplars_sha256": hash_json([[row["problem"], row["solution"]] for row in task.exemplars]),
    }


def _decisive(run: dict[str, Any]) -> dict[str, Any]:
    own = {name: run[name] for name in ("model", "fingerprint", "seed")}
    return {**own, **run["settings"], **{name: run["versions"].get(name) for name in DECISIVE}}


def _agree(out: Path, old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> None:
    for name in [*new, *old]:
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            _agree(out, before, now, prefix)
        elif before != now:
            raise UserError(
                f"{prefix}{name}: {out} was evaluated with {before!r}, not {now!r}; resume with the same settings, or give another folder"
            )


def read_run(out: Path) -> dict[str, Any]:
    """Errors: UserError naming `dir` when the folder holds no evaluation."""
    path = out / "run.json"
    if not path.is_file() and (parts := sorted(part.parent for part in out.glob("*/run.json"))):
        raise UserError(f"dir: {out} holds {len(parts)} evaluations; give one of them: {', '.join(map(str, parts))}")
    if not path.is_file():
        raise UserError(
            f"dir: {out} holds no evaluation (no run.json in it); posttrain eval BENCH --model M --out {out} makes one"
        )
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(run[part], dict) for part in ("benchmarks", "settings", "versions")):
            return run
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"dir: {path} is damaged; evaluate anew in another folder")


def benchmark_of(run: dict[str, Any], name: str) -> Benchmark:
    """A benchmark as it was when it was run."""
    return build(Benchmark, run["benchmarks"][name]["benchmark"])


def remove_scratch(out: Path) -> None:
    """Deletes what interrupted writes left behind."""
    for path in (*out.glob(".*"), *out.glob("*/.*")):
        if SCRATCH.fullmatch(path.name):
            path.unlink()


def write_prompts(folder: Path, task: Problems, prompts: Sequence[Prompt], tokenizer: Any) -> None:
    """`ids_sha256` is of the prompt's token ids; the ids themselves are in the rollout table."""
    lines = []
    for row, prompt in zip(task.rows, prompts, strict=True):
        line = {name: row[name] for name in DATA_FIELDS if row.get(name) is not None}
        line["rendered"] = tokenizer.decode(prompt.ids, skip_special_tokens=False)
        line["tokens"] = len(prompt.ids)
        line["ids_sha256"] = hash_json(prompt.ids)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(folder / "prompts.jsonl", "".join(lines))


def read_prompts(folder: Path) -> list[dict[str, Any]]:
    """Errors: UserError naming `dir` when the file is missing or damaged."""
    path = folder / "prompts.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except (OSError, ValueError):
        raise UserError(f"dir: {path} is missing or damaged; posttrain eval ... --resume writes it anew") from None


@contextmanager
def timed(out: Path, benchmark: str, stage: str) -> Iterator[None]:
    """Notes in `times.json` when a stage ended and how many seconds it took, all attempts together."""
    start = time.perf_counter()
    yield
    path = out / "times.json"
    times = read_json(path, "dir") if path.is_file() else {}
    entry = times.setdefault(benchmark, {}).setdefault(stage, {"seconds": 0.0})
    entry["seconds"] = round(entry["seconds"] + time.perf_counter() - start, 3)
    entry["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(path, times)

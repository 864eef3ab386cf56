"""From a benchmark's rollout table and grades to its numbers. Nothing here is drawn at random, and nothing knows the time."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.benchmarks import Benchmark
from posttrain.evaluation.grades import grade_benchmark
from posttrain.evaluation.metrics import (
    best_of_n,
    bootstrap_interval,
    bootstrap_intervals,
    counts,
    majority_curve,
    mean_g_pass_at_k,
    mean_interval,
    pass_at_k,
    rates,
    token_stats,
    variance_split,
    weighted_majority,
    worst_at_k,
)
from posttrain.evaluation.run_folder import BREAKDOWNS, benchmark_of, read_prompts, read_run
from posttrain.provenance import hash_json, read_json
from posttrain.rollouts.collect import DECISIVE
from posttrain.rollouts.table import read_table

Array = NDArray[np.float64]
SCORER = (
    "mean log-prob"  # the one scorer that every run has: of a completion's tokens, under the law they were drawn from
)


@dataclass(frozen=True)
class Result:
    """A graded benchmark; columns are [prompts][samples], rows one per problem."""

    benchmark: Benchmark
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    completions: list[list[str]]
    verdicts: list[list[str]]
    extracted: list[list[str | None]]
    rules: list[list[str]]
    votes: list[list[str | None]]
    tokens: list[list[int]]
    finish_reasons: list[list[str]]
    stops: list[list[str | None]]
    confidence: list[list[float]]  # mean log-probability of a completion's tokens; empty where the engine gave none
    lm_eval: dict[str, list[list[float]]]
    # of guided completions to the reference, in nats; None of lazily guided ones, empty without a guide
    kl: Sequence[Sequence[float | None]] = ()

    @property
    def correct(self) -> list[list[bool]]:
        return [[verdict == "equal" for verdict in group] for group in self.verdicts]

    @property
    def accuracy(self) -> Array:
        """c/n of every problem, [prompts]."""
        n, c = counts(self.correct)
        return c / n


def load_results(out: Path, say: Callable[[str], None] = print) -> tuple[dict[str, Any], list[Result]]:
    """`run.json` and every benchmark of an evaluation; grades that are missing are made up for.

    Errors: UserError naming `dir` or `table` when there is no evaluation, or one that is not finished.
    """
    run = read_run(out)
    return run, [load_result(out / name, run, name, say) for name in run["benchmarks"]]


def load_result(folder: Path, run: dict[str, Any], name: str, say: Callable[[str], None] = print) -> Result:
    benchmark = benchmark_of(run, name)
    grades = grade_benchmark(folder, benchmark, say=say)
    table = read_table(folder / "rollouts")
    logprobs = table.by_prompt("logprobs")
    stops = read_json(folder / "stops.json", "dir") if benchmark.stop else [None] * len(table)
    names = grades[0].get("lm_eval", {})
    return Result(
        benchmark=benchmark,
        manifest={
            **run["benchmarks"][name],
            "key": completion_key(table.manifest),
            "generation": table.manifest["settings"],
        },
        rows=read_prompts(folder),
        completions=table.by_prompt("completion"),
        verdicts=[line["verdict"] for line in grades],
        extracted=[line["extracted"] for line in grades],
        rules=[line["rule"] for line in grades],
        votes=[line["vote"] for line in grades],
        tokens=[[len(ids) for ids in group] for group in table.by_prompt("completion_ids")],
        finish_reasons=table.by_prompt("finish_reason"),
        stops=[stops[first : first + benchmark.n] for first in range(0, len(stops), benchmark.n)],
        confidence=[]
        if None in flat(logprobs)
        else [[sum(values) / len(values) for values in group] for group in logprobs],
        lm_eval={metric: [line["lm_eval"][metric] for line in grades] for metric in names},
        kl=table.by_prompt("kl") if any(table.column("guide")) else (),
    )


def completion_key(manifest: dict[str, Any]) -> str:
    """sha256 of all that can change a completion: what `collect` writes down, and compares before it goes on."""
    return hash_json([manifest["settings"], {name: manifest["versions"].get(name) for name in DECISIVE}])


def summarise(result: Result) -> dict[str, Any]:
    """All numbers of one benchmark, as JSON takes them. `metrics` have 95 % intervals over problems; shares are of all samples."""
    benchmark, correct = result.benchmark, result.correct
    curves = curve_scores(result) if benchmark.n > 1 else {}
    scores = metric_scores(result, curves)
    low, high = intervals(np.column_stack([*scores.values(), *curves.values()]))
    split = variance_split([[float(flag) for flag in group] for group in correct])
    summary: dict[str, Any] = {
        "title": benchmark.title or benchmark.name,
        "problems": len(result.rows),
        "n": benchmark.n,
        "metrics": {
            name: {"value": float(values.mean()), "low": float(low[i]), "high": float(high[i])}
            for i, (name, values) in enumerate(scores.items())
        },
        "standard_error": {name: finite(getattr(split, name)) for name in ("se", "between", "within")},
        "curves": {},
        "tokens": tokens_summary(result),
        "shares": rates(
            finish_reasons=flat(result.finish_reasons), answers=flat(result.extracted), verdicts=flat(result.verdicts)
        ),
        "verdicts": tally(result.verdicts),
        "rules": tally(result.rules),
        "stops": tally(result.stops) if benchmark.stop else {},
        "breakdown": breakdown(result),
    }
    column = len(scores)
    for name, curve in curves.items():
        ends = slice(column, column + curve.shape[1])
        summary["curves"][name] = {
            "value": curve.mean(0).tolist(),
            "low": low[ends].tolist(),
            "high": high[ends].tolist(),
        }
        column += curve.shape[1]
    if result.kl:
        summary["kl"] = None if None in flat(result.kl) else kl_summary(result.kl)
    return {**summary, "warnings": warnings(result, summary)}


def curve_scores(result: Result) -> dict[str, Array]:
    """Per-problem scores for k = 1..n, [prompts, n]."""
    n, c = counts(result.correct)
    ks = range(1, result.benchmark.n + 1)
    curves = {
        "pass@k": np.column_stack([pass_at_k(n, c, k) for k in ks]),
        "maj@k": majority_curve(result.votes, result.correct),
    }
    if result.confidence:
        best = [best_of_n(result.confidence, result.correct, k) for k in ks]
        curves[f"best-of-k ({SCORER})"] = np.column_stack(best)
    return curves


def metric_scores(result: Result, curves: dict[str, Array]) -> dict[str, Array]:
    """Per-problem scores of every metric in the tables, [prompts]."""
    size, (n, c) = result.benchmark.n, counts(result.correct)
    scores = {"pass@1": result.accuracy}
    if size > 1:
        for name in ("pass@k", "maj@k"):
            for k in result.benchmark.ks:
                if k > 1:
                    scores[name.replace("k", str(k))] = curves[name][:, k - 1]
        if result.confidence:
            weights = np.exp(np.array(result.confidence))
            scores[f"best-of-{size} ({SCORER})"] = curves[f"best-of-k ({SCORER})"][:, -1]
            scores[f"weighted majority ({SCORER})"] = weighted_majority(result.votes, weights.tolist(), result.correct)
        scores[f"worst@{size}"] = worst_at_k(n, c, size)
        scores[f"mG-Pass@{size}"] = mean_g_pass_at_k(n, c, size)
    for name, values in result.lm_eval.items():
        scores[f"lm-eval {name}"] = np.array([float(np.mean(group)) for group in values])
    return scores


def intervals(columns: Array) -> tuple[Array, Array]:
    """`mean_interval` of every column of [prompts, metrics] scores between 0 and 1, all from the same resampled problems."""
    columns = np.clip(np.round(columns, 12), 0.0, 1.0)
    low, high = (np.clip(end, 0.0, 1.0) for end in bootstrap_intervals(columns))
    for i, values in enumerate(columns.T):
        if np.all((values == 0) | (values == 1)) or values.min() == values.max():
            low[i], high[i] = mean_interval(values)
    return low, high


def tokens_summary(result: Result) -> dict[str, Any]:
    per_problem = [float(np.mean(group)) for group in result.tokens]
    low, high = bootstrap_interval(per_problem)
    return {**token_stats(flat(result.tokens)), "low": finite(low), "high": finite(high)}


def kl_summary(kl: Sequence[Sequence[Any]]) -> dict[str, Any]:
    low, high = bootstrap_interval([float(np.mean(group)) for group in kl])
    return {"value": float(np.mean(flat(kl))), "low": finite(low), "high": finite(high)}


def breakdown(result: Result) -> dict[str, list[dict[str, Any]]]:
    """pass@1 by every field of the rows that has more than one value."""
    accuracy = result.accuracy
    found: dict[str, list[dict[str, Any]]] = {}
    for field in BREAKDOWNS:
        values = [_label(row.get(field)) for row in result.rows]
        groups = sorted({value for value in values if value is not None}, key=lambda value: (str(type(value)), value))
        if len(groups) < 2:
            continue
        found[field] = []
        for group in groups:
            scores = accuracy[[value == group for value in values]]
            low, high = mean_interval(scores)
            found[field].append(
                {"value": group, "problems": len(scores), "pass@1": float(scores.mean()), "low": low, "high": high}
            )
    return found


def _label(value: Any) -> str | int | float | None:
    """A row's field to group by; a list or an object, which a file of one's own may have there, by its text."""
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)


def warnings(result: Result, summary: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    entry, shares, found = result.manifest, summary["shares"], []
    if entry["rows"] < entry["data_rows"]:
        found.append(f"{entry['rows']} of {entry['data_rows']} problems (--limit), a pseudo-random subset")
    if result.benchmark.sha256 not in (None, entry["data_sha256"]):
        found.append("not the data that this benchmark pins (--any-data): do not compare with others' scores")
    if result.benchmark.lm_eval and not result.lm_eval:
        found.append(
            f"no metrics of lm-eval's {result.benchmark.lm_eval}: they need antlr4-python3-runtime 4.11 (pip installs it)"
        )
    if shares["truncation"] > 0.05:
        found.append(f"{100 * shares['truncation']:.1f} % of the samples ended at the token limit: raise max_tokens")
    if shares["grader_error"] > 0:
        found.append(f"{100 * shares['grader_error']:.1f} % of the samples could not be graded, and count as wrong")
    return found


def tally(columns: Sequence[Sequence[str | None]]) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    counted = Counter("none" if value is None else value for value in flat(columns))
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def flat(columns: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for group in columns for value in group]


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

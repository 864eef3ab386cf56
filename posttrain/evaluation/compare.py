"""Two evaluations side by side, paired problem by problem."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.errors import UserError
from posttrain.evaluation.intervals import bootstrap_intervals, paired_comparison, paired_ratio
from posttrain.evaluation.metrics import majority_at_k
from posttrain.evaluation.results import Result, finite, flat, intervals

Array = NDArray[np.float64]
Evaluation = tuple[dict[str, Any], Sequence[Result]]  # run.json and its benchmarks

TOKEN_DEFINITIONS = {
    "token ratio": "mean completion tokens of the run / of the baseline, over the shared problems; its 95 % interval is a "
    "bootstrap that draws a problem for both sides at once",
    "accuracy within b tokens": "share of completions that are right and have at most b tokens: one that is cut off at b "
    "counts as wrong, whatever it says before. Averaged over the samples of a problem, then over the shared problems; the "
    "budgets b are the deciles of all completion lengths of both evaluations, the last one the longest, where it is pass@1",
}
DECILES = np.arange(1, 11) / 10


def compare(run: Evaluation, baseline: Evaluation) -> dict[str, Any]:
    """Differences are run - baseline, over the problems that both have (same id, text and gold).

    Errors: UserError naming `compare` when they share no benchmark, or no problem of one.
    """
    theirs = {result.benchmark.name: result for result in baseline[1]}
    pairs = [(result, theirs[result.benchmark.name]) for result in run[1] if result.benchmark.name in theirs]
    if not pairs:
        names = ", ".join(result.benchmark.name for result in run[1])
        raise UserError(f"compare: the two evaluations share no benchmark ({names} against {', '.join(theirs)})")
    return {
        "baseline": baseline[0]["model"],
        "differs": differing(
            run, baseline, [name for name in theirs if name in {ours.benchmark.name for ours, _ in pairs}]
        ),
        "benchmarks": {ours.benchmark.name: _compare(ours, other) for ours, other in pairs},
    }


def _compare(ours: Result, theirs: Result) -> dict[str, Any]:
    mine, other = _identities(ours), _identities(theirs)
    shared = [(mine[identity], other[identity]) for identity in mine if identity in other]
    if not shared:
        raise UserError(f"compare: {ours.benchmark.name} has no problem in common; were they run on the same data?")
    rows, columns = ([pair[side] for pair in shared] for side in (0, 1))
    metrics = {"pass@1": (ours.accuracy, theirs.accuracy)}
    if (k := min(ours.benchmark.n, theirs.benchmark.n)) > 1:
        votes = [majority_at_k(result.votes, result.correct, k) for result in (ours, theirs)]
        metrics[f"maj@{k}"] = (votes[0], votes[1])
    tokens = [np.array([np.mean(group) for group in result.tokens]) for result in (ours, theirs)]
    return {
        "problems": len(shared),
        "only_in_run": len(mine) - len(shared),
        "only_in_baseline": len(other) - len(shared),
        "n": [ours.benchmark.n, theirs.benchmark.n],
        "metrics": {name: _paired(a[rows], b[columns]) for name, (a, b) in metrics.items()},
        "tokens": {
            **_paired(tokens[0][rows], tokens[1][columns]),
            **_ratio(tokens[0][rows], tokens[1][columns]),
        },
        "budgets": _budgets(ours, rows, theirs, columns),
    }


def _ratio(run: Array, baseline: Array) -> dict[str, float | None]:
    if not (run.any() and baseline.any()):  # an endpoint may count no token
        return dict.fromkeys(("ratio", "ratio_low", "ratio_high"))
    ratio, low, high = paired_ratio(run, baseline)
    return {"ratio": ratio, "ratio_low": low, "ratio_high": finite(high)}


def _budgets(
    ours: Result, rows: Sequence[int], theirs: Result, columns: Sequence[int]
) -> list[dict[str, float | None]]:
    """Accuracy within b tokens of both, for every b; the problems `rows` of ours are `columns` of theirs."""
    lengths = flat([ours.tokens[i] for i in rows]) + flat([theirs.tokens[i] for i in columns])
    budgets = np.unique(np.quantile(lengths, DECILES, method="inverted_cdf"))
    run, baseline = (
        np.column_stack([within(result, budget)[shared] for budget in budgets])
        for result, shared in ((ours, rows), (theirs, columns))
    )
    parts = {"run": (run, intervals(run)), "baseline": (baseline, intervals(baseline))}
    parts["difference"] = (run - baseline, bootstrap_intervals(run - baseline))
    return [
        {"tokens": int(budget)}
        | {name: float(scores[:, i].mean()) for name, (scores, _) in parts.items()}
        | {f"{name}_low": finite(float(low[i])) for name, (_, (low, _)) in parts.items()}
        | {f"{name}_high": finite(float(high[i])) for name, (_, (_, high)) in parts.items()}
        for i, budget in enumerate(budgets)
    ]


def within(result: Result, budget: int) -> Array:
    """Share of every problem's completions that are right and have at most `budget` tokens, [prompts]."""
    return np.array(
        [
            np.mean([right and length <= budget for right, length in zip(*group, strict=True)])
            for group in zip(result.correct, result.tokens, strict=True)
        ]
    )


def _paired(run: Array, baseline: Array) -> dict[str, float | None]:
    found = paired_comparison(run, baseline)
    return {
        "run": float(run.mean()),
        "baseline": float(baseline.mean()),
        "difference": found.difference,
        "low": finite(found.low),
        "high": finite(found.high),
        "standard_error": finite(found.se),
        "p_value": found.p_value,
        "detectable": found.detectable,
    }


def _identities(result: Result) -> dict[tuple[str, str, str], int]:
    return {(row["id"], row["problem"], row["answer"]): index for index, row in enumerate(result.rows)}


def differing(run: Evaluation, baseline: Evaluation, names: Sequence[str]) -> dict[str, list[Any]]:
    """Settings that are not the same in both: name -> [run, baseline]."""
    ours, theirs = (dict(_settings(side[0], names)) for side in (run, baseline))
    return {
        name: [ours.get(name), theirs.get(name)] for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)
    }


def _settings(run: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    yield from ((name, run[name]) for name in ("model", "fingerprint", "context", "seed"))
    yield from run["settings"].items()
    yield from run["versions"].items()
    for name in names:
        entry = run["benchmarks"][name]
        yield from (
            (f"{name}.{field}", value)
            for field, value in {**entry, **entry["benchmark"]}.items()
            if field != "benchmark"
        )

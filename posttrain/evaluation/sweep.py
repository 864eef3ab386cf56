"""Guided evaluations at several betas, and the frontier of accuracy against KL, Q# and CD on the same axes.

base/, qsharp-beta-B/, cd-beta-B/    one evaluation each, as `harness` makes them; of preferences ipl-beta-B/ alone
frontier.json, frontier.html
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.evaluation.benchmarks import Problems
from posttrain.evaluation.harness import Model, evaluate
from posttrain.evaluation.harness_report import LAWS
from posttrain.evaluation.metrics import DEFINITIONS
from posttrain.evaluation.plots import frontier
from posttrain.evaluation.report import Figure, trusted, write_page
from posttrain.provenance import write_json

Law = Literal["qsharp", "cd", "ipl"]
LEADS = {
    ("qsharp", "cd"): "One value model, two ways to use it: Q# tilts by the law of the return, CD by its mean.",
    ("ipl",): "One value model, which has learned from preferences.",
}


@dataclass(frozen=True)
class Point:
    """A guided policy on a benchmark: its KL and its pass@1."""

    law: str
    beta: float
    kl: float
    accuracy: float
    interval: tuple[float, float]
    tokens: float


def sweep(
    tasks: Sequence[Problems],
    guided: Callable[[Law | None, float | None], Model],
    betas: Sequence[float],
    out: Path,
    *,
    laws: Sequence[Law] = ("qsharp", "cd"),
    seed: int = 0,
    resume: bool = False,
    shard_prompts: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates the unguided model and the laws at every beta; what `frontier.json` says. Errors: as `evaluate`.

    guided: the model by law and beta; None and None without guidance.
    """
    runs: list[tuple[Path, Law | None, float | None]] = [(out / "base", None, None)]
    runs += [(out / f"{law}-beta-{beta!r}", law, beta) for law in laws for beta in betas]
    for folder, law, beta in runs:
        say(f"{folder.name}:")
        model = guided(law, beta)
        shown = law is None  # the prompts of one run are those of all
        evaluate(tasks, model, folder, seed=seed, resume=resume, shard_prompts=shard_prompts, show=shown, say=say)
    found: dict[str, Any] = {}
    for task in tasks:
        name = task.benchmark.name
        summaries = [
            (law, beta, json.loads((folder / "report.json").read_text(encoding="utf-8"))["benchmarks"][name])
            for folder, law, beta in runs
        ]
        points = [_point(law, beta, summary) for law, beta, summary in summaries[1:] if law and beta]
        found[name] = {"base": summaries[0][2]["metrics"]["pass@1"], "points": points}
    write_json(out / "frontier.json", found)
    _write_page(out / "frontier.html", found, laws, runs)
    return found


def _point(law: Law, beta: float, summary: dict[str, Any]) -> Point:
    score = summary["metrics"]["pass@1"]
    interval = (score["low"], score["high"])
    return Point(LAWS[law], beta, summary["kl"]["value"], score["value"], interval, summary["tokens"]["mean"])


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The frontier as a table: benchmark, policy, KL, pass@1, interval, tokens."""
    lines: list[tuple[str, ...]] = []
    for name, entry in found.items():
        base = entry["base"]
        lines.append((name, "without guide", "0", *_score(base["value"], (base["low"], base["high"])), ""))
        for point in entry["points"]:
            title = f"{point.law}, beta {point.beta:g}"
            lines.append(
                (name, title, f"{point.kl:.3f}", *_score(point.accuracy, point.interval), f"{point.tokens:.0f}")
            )
    return lines


COLUMNS = ("benchmark", "policy", "KL, nats", "pass@1", "95 % interval", "tokens")


def _score(value: float, interval: tuple[float, float]) -> tuple[str, str]:
    return f"{100 * value:.1f} %", f"{100 * interval[0]:.1f} - {100 * interval[1]:.1f}"


def _write_page(path: Path, found: dict[str, Any], laws: Sequence[Law], runs: Sequence[tuple[Path, Any, Any]]) -> None:
    figures = []
    for name, entry in found.items():
        lines: dict[str, list[Point]] = {}
        for point in sorted(entry["points"], key=lambda point: point.kl):
            lines.setdefault(point.law, []).append(point)
        base = entry["base"]
        figures.append(
            Figure(
                frontier(lines, base["value"], (base["low"], base["high"])),
                f"{name}: accuracy of one sample against KL; the numbers are betas, the dotted line is the model alone.",
            )
        )
    write_page(
        path,
        "frontier.html",
        title="Accuracy against KL",
        lead=LEADS[tuple(laws)],
        columns=COLUMNS,
        rows=rows(found),
        figures=trusted(figures),
        definitions={
            name: DEFINITIONS[name] for name in ("pass@1", *(LAWS[law] for law in laws), "KL", "tokens", "interval")
        },
        manifest={folder.name: json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder, _, _ in runs},
    )

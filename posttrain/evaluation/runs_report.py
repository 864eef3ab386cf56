"""One page over several runs: what became of each, how they trained, their arms beside each other where that is fair, and what
they say. `report.html`, self-contained, and the same numbers as `report.md`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from posttrain.evaluation.arms import Arm
from posttrain.evaluation.arms_file import Measured
from posttrain.evaluation.harness_report import percent, signed_interval, table_lines
from posttrain.evaluation.intervals import paired_comparison
from posttrain.evaluation.metrics import DEFINITIONS
from posttrain.evaluation.plots import kl_plane, step_curves, token_plane
from posttrain.evaluation.report import Figure, trusted, value_range, write_page
from posttrain.evaluation.runs import Recorded, comparable, read_runs
from posttrain.provenance import write_text

Table = tuple[Sequence[str], list[Sequence[str]]]  # columns, rows

# Title, what is logged by this method alone, and what tells whether it goes well.
METHODS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Sampling", ("tokens_per_second",), ("completions", "accuracy", "tokens", "truncated", "kl", "tokens_per_second")),
    ("Q-Probe", ("held_out_reward",), ("held_out_reward",)),
    (
        "Q#, value model",
        ("eval_auc", "eval_calibration_error"),
        ("loss", "eval_loss", "eval_auc", "eval_calibration_error", "eval_explained_variance", "grad_norm"),
    ),
    ("IPL, value model", ("eval_pairs_right",), ("loss", "eval_loss", "eval_pairs_right", "grad_norm")),
    (
        "DQO",
        ("log_ratio_right", "log_ratio_wrong"),
        (
            *("loss", "kl", "log_ratio_right", "log_ratio_wrong", "explained_variance", "value_first", "return"),
            *("length_right", "length_wrong", "end_probability", "ess", "weight_capped", "grad_norm"),
        ),
    ),
    (
        "GRPO",
        ("completions/mean_length",),
        (
            *(
                "accuracy",
                "reward",
                "completions/mean_length",
                "completions/mean_length_right",
                "completions/mean_length_wrong",
            ),
            *("gate/fraction", "gate/alpha", "gate/accuracy", "kl", "entropy", "grad_norm"),
        ),
    ),
    ("DPO and KTO", ("rewards/margins",), ("loss", "rewards/margins", "rewards/accuracies", "kl", "grad_norm")),
    ("Training", ("loss",), ("loss", "mean_token_accuracy", "entropy", "grad_norm")),
)
DEFINED = ("pass@1", "maj@k", "pass@k", "KL", "tokens", "interval", "difference", "p-value", "detectable")
RUNS = ("run", "command", "state", "last attempt", "it took", "attempts", "code")
ARM = ("arm", "accuracy", "95 % interval", "tokens per answer", "KL, nats")
PAIRED = ("arm", "against", "difference", "95 % interval", "p-value", "detectable")


@dataclass(frozen=True)
class Group:
    """A method's trainings: the numbers they ended with (of sampling: the means over shards), and their curves."""

    title: str
    table: Table
    figures: list[Figure]


@dataclass(frozen=True)
class Comparison:
    """Arms on the same problems."""

    title: str
    problems: int
    fingerprint: str
    arms: Table
    paired: Table
    figures: list[Figure]


def write_runs_report(folders: Sequence[Path], out: Path) -> list[Comparison]:
    """`report.html` and `report.md` in the folder `out`. Errors: UserError naming `run`."""
    runs = read_runs(folders)
    overview: Table = (RUNS, [_overview(run) for run in runs])
    groups, comparisons = diagnostics(runs), [_comparison(found, runs) for found in comparable(runs)]
    notes = remarks(runs, comparisons)
    title = f"Report of {runs[0].name}" if len(runs) == 1 else f"Report of {len(runs)} runs"
    definitions = {name: DEFINITIONS[name] for name in DEFINED}
    write_text(out / "report.md", markdown(title, overview, notes, comparisons, groups, definitions))
    samples = [
        {
            "title": _joined(run.name if len(runs) > 1 else "", part),
            "problems": problems,
            "range": value_range(problems),
        }
        for run in runs
        for part, problems in run.samples.items()
    ]
    write_page(
        out / "report.html",
        "runs.html",
        title=title,
        lead="Intervals are 95 %, over problems. Arms are compared where they were measured on the same problems.",
        overview=overview,
        notes=notes,
        comparisons=[{**vars(each), "figures": trusted(each.figures)} for each in comparisons],
        groups=[{**vars(each), "figures": trusted(each.figures)} for each in groups],
        samples=samples,
        definitions=definitions,
        manifest={run.name: {"folder": str(run.folder), "attempts": run.attempts} for run in runs},
    )
    return comparisons


def _overview(run: Recorded) -> Sequence[str]:
    status = run.status
    git = run.attempts[-1].get("git") if run.attempts else None
    code = ", ".join(f"{each['commit'][:10]}{' (changed)' if each['dirty'] else ''}" for each in (git or {}).values())
    if status is None:
        return (run.name, run.command, "unknown", "", "", str(len(run.attempts)), code)
    state = f"{status.state}: {status.reason}" if status.reason else status.state
    took = ""
    if status.ended:
        seconds = (datetime.fromisoformat(status.ended) - datetime.fromisoformat(status.started)).total_seconds()
        took = f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    started = status.started.replace("T", " ").removesuffix("+00:00")
    return (run.name, run.command, state, started, took, str(len(run.attempts)), code)


def diagnostics(runs: Sequence[Recorded]) -> list[Group]:
    """Every part of every run, under the method that logs what it logged."""
    parts: dict[str, dict[str, dict[str, tuple[list[int], list[float]]]]] = {title: {} for title, _, _ in METHODS}
    for run in runs:
        for part, curves in run.curves().items():
            for title, marks, _ in METHODS:
                if any(mark in curves for mark in marks):
                    parts[title][_joined(run.name if len(runs) > 1 else "", part)] = curves
                    break
    return [_group(title, shown, parts[title]) for title, _, shown in METHODS if parts[title]]


def _group(title: str, shown: Sequence[str], parts: Mapping[str, Mapping[str, tuple[list[int], list[float]]]]) -> Group:
    names = [name for name in shown if any(name in curves for curves in parts.values())]
    sampling = title == "Sampling"
    rows: list[Sequence[str]] = []
    for part, curves in parts.items():
        steps = max(curves[name][0][-1] for name in names if name in curves)
        cells = (_last(name, curves[name][1], sampling) if name in curves else "" for name in names)
        rows.append((part, str(steps + 1 if sampling else steps), *cells))
    figures = []
    for name in names if not sampling else ():
        of_name = {part: curves[name] for part, curves in parts.items() if name in curves}
        if any(len(steps) > 1 for steps, _ in of_name.values()):
            figures.append(Figure(step_curves(of_name, name.replace("_", " ")), f"{title}: {name.replace('_', ' ')}."))
    columns = ("part", "shards" if sampling else "step", *(name.replace("_", " ") for name in names))
    return Group(title, (columns, rows), figures)


def _last(name: str, values: Sequence[float], sampling: bool) -> str:
    value = (sum(values) if name == "completions" else sum(values) / len(values)) if sampling else values[-1]
    return f"{value:.4g}" if name != "completions" else f"{value:.0f}"


def _comparison(found: Measured, runs: Sequence[Recorded]) -> Comparison:
    sweeps = {
        _joined(run.name if len(runs) > 1 else "", law): points
        for run in runs
        if any(each.fingerprint == found.fingerprint for each in run.measured)
        for law, points in run.sweeps.items()
        if len(points) > 1  # one is an arm already
    }
    arms = {f"{i}": arm for i, arm in enumerate(found.arms)}
    figures = [Figure(token_plane(arms), "Accuracy against what an answer costs, with 95 % intervals.")]
    spent = [arm for arm in found.arms if "kl" in arm.measures]
    if spent or sweeps:
        caption = (
            "Accuracy of one sample against KL to the reference, with 95 % intervals; the model alone stands at 0."
        )
        figures.append(Figure(kl_plane([arm for arm in found.arms if _kl(arm) is not None], sweeps), caption))
    table: Table = (ARM, [_arm(arm) for arm in found.arms])
    paired: Table = (PAIRED, [_paired(*pair) for pair in pairs(found.arms)])
    return Comparison(found.title, len(found.problems), found.fingerprint, table, paired, figures)


def _kl(arm: Arm) -> float | None:
    """None where it is not known, as of trained weights."""
    return arm.measures.get("kl", 0.0 if arm.name == "base" else None)


def _arm(arm: Arm) -> Sequence[str]:
    low, high = arm.interval
    kl = _kl(arm)
    return (
        arm.title,
        percent(arm.accuracy),
        f"{100 * low:.1f} to {100 * high:.1f}",
        f"{arm.tokens:.0f}",
        "" if kl is None else f"{kl:.2f}",
    )


def pairs(arms: Sequence[Arm]) -> Iterable[tuple[Arm, Arm]]:
    """Every arm against the first model alone, and against the most accurate arm that does not know the answers."""
    fair = [arm for arm in arms if arm.name.rpartition("/")[2] != "oracle"]
    if len(fair) < 2:
        return []
    first = next((arm for name in ("base", "model") for arm in fair if arm.name == name), fair[0])
    best = max(fair, key=lambda arm: arm.accuracy)
    found = [(arm, first) for arm in fair if arm is not first]
    return [*found, *((arm, best) for arm in fair if arm is not best and arm is not first and best is not first)]


def _paired(arm: Arm, other: Arm) -> Sequence[str]:
    found = paired_comparison(arm.per_problem, other.per_problem)
    return (
        arm.title,
        other.title,
        f"{100 * found.difference:+.1f}",
        signed_interval(found.low, found.high),
        f"{found.p_value:.2g}",
        f"{100 * found.detectable:.1f}" if found.detectable is not None else "-",
    )


def remarks(runs: Sequence[Recorded], comparisons: Sequence[Comparison]) -> list[str]:
    """What a reader must know before the numbers."""
    found = [f"{run.name} has measured nothing yet." for run in runs if not run.measured]
    found += [
        f"{run.name} {'was killed' if run.status.state == 'killed' else 'is not finished'}: {run.status.state}."
        for run in runs
        if run.status and run.status.state != "finished"
    ]
    if len(comparisons) > 1:
        lists = "; ".join(f"{each.title} ({each.problems} problems, {each.fingerprint[:10]})" for each in comparisons)
        found.append(
            f"These runs were measured on {len(comparisons)} lists of problems, which are not compared with each other: {lists}."
        )
    return found


def markdown(
    title: str,
    overview: Table,
    notes: Sequence[str],
    comparisons: Sequence[Comparison],
    groups: Sequence[Group],
    definitions: Mapping[str, str],
) -> str:
    lines = [f"# {title}", "", *table_lines(*overview)]
    for note in notes:
        lines += ["", f"**{note}**"]
    for each in comparisons:
        lines += ["", f"## {each.title}: {each.problems} problems", "", *table_lines(*each.arms)]
        if each.paired[1]:
            lines += ["", "Paired by problem, in points; p-values are not corrected for their number.", ""]
            lines += table_lines(*each.paired)
    for group in groups:
        lines += ["", f"## {group.title}", "", *table_lines(*group.table)]
    lines += ["", "## What the numbers mean", ""]
    return "\n".join([*lines, *(f"- **{name}**: {meaning}" for name, meaning in definitions.items()), ""])


def _joined(run: str, part: str) -> str:
    if part == ".":
        return run or "this run"
    return f"{run}: {part}" if run else part

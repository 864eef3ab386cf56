"""The figures of a report, as SVG text that stands in a page of any background."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.arms import Arm
from posttrain.evaluation.intervals import wilson_interval

Array = NDArray[np.float64]

COLOURS = ("#888888", "#d08c1f", "#2f7ed8", "#3a9d5d", "#b0479b", "#c9453f", "#6a5acd", "#1a9fa8")
VERDICTS = {"right": COLOURS[3], "wrong": COLOURS[5], "no answer": COLOURS[0], "not graded": COLOURS[1]}
INK = "#808080"  # readable on white and on black
# Lines that lie on each other can still be told apart: by dashes, and by hollow markers, each of which fits into the one before.
LINES = tuple(
    {"color": colour, "linestyle": dashes, "marker": marker, "markersize": size, "markerfacecolor": "none"}
    for colour, dashes, marker, size in zip(
        COLOURS,
        ("-", (0, (5, 2)), "-", (0, (2, 2)), "-.", ":", (0, (7, 2, 1, 2)), (0, (9, 3))),
        "osD^vXP*",
        (9, 7.5, 8, 5, 6, 5, 4, 4),
        strict=True,
    )
)


def accuracy_curves(arms: Mapping[str, Arm]) -> str:
    """Accuracy against the number of samples k, one line for each arm that has a curve."""
    with _figure("accuracy") as (axes, svg):
        for arm, line in zip((arm for arm in arms.values() if arm.curve), cycle(LINES), strict=False):
            ks = range(1, len(arm.curve) + 1)
            axes.plot(ks, arm.curve, label=arm.title, **line)
            low, high = arm.interval
            bar = [ks[-1] - 0.08, ks[-1] + 0.08]
            axes.fill_between(bar, low, high, color=line["color"], alpha=0.35, linewidth=0)
        axes.set_xlabel("samples k")
        axes.set_ylabel("accuracy")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, labelcolor=INK, loc="lower right", handlelength=3.5)
    return svg[0]


def metric_curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Curves over k = 1, 2, ... with their intervals as bands: name -> `value`, `low`, `high`."""
    with _figure("curves") as (axes, svg):
        for (name, curve), line in zip(curves.items(), LINES[1:], strict=False):
            ks = range(1, len(curve["value"]) + 1)
            axes.plot(ks, curve["value"], label=name, markevery=-(-len(ks) // 16), **line)
            axes.fill_between(ks, curve["low"], curve["high"], color=line["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel("samples k")
        axes.set_ylabel("score")
        axes.set_ylim(0, 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, labelcolor=INK, loc="best", handlelength=3.5)
    return svg[0]


def budget_curves(budgets: Sequence[Mapping[str, float]], titles: Mapping[str, str]) -> str:
    """Accuracy within b tokens against b, with 95 % bands; titles: of `run` and of `baseline`."""
    tokens = [point["tokens"] for point in budgets]
    with _figure("budgets") as (axes, svg):
        for (name, title), line in zip(titles.items(), (LINES[2], LINES[0]), strict=True):
            axes.plot(tokens, [point[name] for point in budgets], label=title, **line)
            band = ([point[f"{name}_{end}"] for point in budgets] for end in ("low", "high"))
            axes.fill_between(tokens, *band, color=line["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel("token budget b")
        axes.set_ylabel("accuracy within b tokens")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, labelcolor=INK, loc="best", handlelength=3.5)
    return svg[0]


def calibration(probabilities: Array, correct: Array, bins: int = 10) -> str:
    """Predicted probability against the share of right completions, both flat, in bins of equal counts, with 95 % intervals."""
    order = np.argsort(probabilities, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    predicted = np.array([probabilities[group].mean() for group in groups])
    right = np.array([correct[group].mean() for group in groups])
    intervals = np.array([wilson_interval(float(correct[group].sum()), len(group)) for group in groups])
    with _figure("calibration") as (axes, svg):
        axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
        errors = np.abs(intervals.T - right)
        axes.errorbar(predicted, right, yerr=errors, color=COLOURS[2], marker="o", markersize=4, linewidth=1, capsize=2)
        axes.set_xlabel("predicted probability of being right")
        axes.set_ylabel("share that is right")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
    return svg[0]


class _Point(Protocol):
    """A policy, by the accuracy it reaches and the KL it spends."""

    @property
    def beta(self) -> float: ...
    @property
    def kl(self) -> float: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def interval(self) -> tuple[float, float]: ...


def frontier(laws: Mapping[str, Sequence[_Point]], base: float, base_interval: tuple[float, float]) -> str:
    """Accuracy against KL, one line for each law, its points in order of KL; pi_ref stands at KL 0."""
    with _figure("frontier") as (axes, svg):
        axes.axhspan(*base_interval, color=INK, alpha=0.15, linewidth=0)
        axes.axhline(base, color=INK, linewidth=1, linestyle=":")
        for line, (law, points) in zip(
            LINES[2:], sorted(laws.items(), reverse=True), strict=False
        ):  # a law keeps its colour
            kls, accuracies = [point.kl for point in points], [point.accuracy for point in points]
            axes.plot(kls, accuracies, label=law, **line)
            low, high = zip(*(point.interval for point in points), strict=True)
            axes.vlines(kls, low, high, color=line["color"], alpha=0.5)
            side = 9 if law == min(laws) else -14  # above the curve of one law, below that of the other
            for point in points:
                axes.annotate(
                    f"{point.beta:.2g}",
                    (point.kl, point.accuracy),
                    (-4, side),
                    textcoords="offset points",
                    color=line["color"],
                )
        axes.set_xlabel("KL to the reference, nats per completion")
        axes.set_ylabel("accuracy of one sample")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.1)
        axes.legend(frameon=False, labelcolor=INK, loc="lower right", handlelength=3.5)
    return svg[0]


def kl_plane(arms: Sequence[Arm], sweeps: Mapping[str, Sequence[_Point]]) -> str:
    """Accuracy with its interval against KL: a point for every arm, at 0 where it names none, and a line for every sweep over
    betas."""
    styles = cycle([(filled, line) for filled in (True, False) for line in LINES])
    titles = [arm.title for arm in arms] + [f"{title}, over beta" for title in sweeps]
    with _figure("kl", height=_height(titles)) as (axes, svg):
        for arm, (filled, line) in zip(arms, styles, strict=False):
            face = line["color"] if filled else "none"
            style = {**line, "linestyle": "none", "markerfacecolor": face}
            kl = arm.measures.get("kl", 0.0)
            axes.plot(kl, arm.accuracy, label=arm.title, **style)
            axes.vlines(kl, *arm.interval, color=line["color"], alpha=0.5)
        for (title, points), (_, line) in zip(sweeps.items(), styles, strict=False):
            kls, (low, high) = [point.kl for point in points], zip(*(point.interval for point in points), strict=True)
            axes.plot(kls, [point.accuracy for point in points], label=f"{title}, over beta", **line)
            axes.vlines(kls, low, high, color=line["color"], alpha=0.5)
        axes.set_xlabel("KL to the reference, nats per completion")
        axes.set_ylabel("accuracy of one sample")
        axes.set_ylim(top=1.02)
        _legend_below(axes, titles)
    return svg[0]


def _legend_below(axes: Any, titles: Sequence[str]) -> None:
    options = {"frameon": False, "labelcolor": INK, "fontsize": 9, "loc": "outside lower center"}
    axes.figure.legend(**options, ncols=_columns(titles))


def _columns(titles: Sequence[str]) -> int:
    """Of a legend below a figure: one where titles are long."""
    return 1 if max(map(len, titles), default=0) > 34 else 2


def _height(titles: Sequence[str]) -> float:
    """Of a figure with its legend below, in inches."""
    return 4 + 0.2 * -(-len(titles) // _columns(titles))


def step_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], label: str) -> str:
    """A quantity against the training step: title -> (steps, values)."""
    with _figure(label) as (axes, svg):
        for (title, (steps, values)), line in zip(curves.items(), cycle(LINES), strict=False):
            axes.plot(
                steps,
                values,
                label=title,
                color=line["color"],
                linestyle=line["linestyle"],
                marker="o" if len(values) == 1 else "",  # which no line shows
            )
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(frameon=False, labelcolor=INK)
    return svg[0]


def token_plane(arms: Mapping[str, Arm]) -> str:
    """Accuracy with its interval against the tokens that one answer costs, a point for every arm."""
    styles = [(filled, line) for filled in (False, True) for line in LINES]  # the second time round, markers are filled
    titles = [arm.title for arm in arms.values()]
    with _figure("plane", height=_height(titles)) as (axes, svg):
        for arm, (filled, line) in zip(arms.values(), cycle(styles), strict=False):
            face = line["color"] if filled else "none"
            axes.plot(
                arm.tokens, arm.accuracy, label=arm.title, **{**line, "linestyle": "none", "markerfacecolor": face}
            )
            axes.vlines(arm.tokens, *arm.interval, color=line["color"], alpha=0.5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("completion tokens per answer")
        axes.set_ylabel("accuracy")
        axes.set_ylim(top=1.02)
        _legend_below(axes, titles)
    return svg[0]


def length_histogram(lengths: Mapping[str, Sequence[int]]) -> str:
    """Completion lengths in tokens, by verdict."""
    longest = max((max(values) for values in lengths.values() if values), default=1)
    with _figure("lengths") as (axes, svg):
        edges = np.linspace(0, longest + 1, 41)
        for verdict, values in lengths.items():
            colour = VERDICTS[verdict]
            label = f"{verdict} ({len(values)})"
            axes.hist(values, bins=edges, facecolor=f"{colour}80", edgecolor=colour, linewidth=0.8, label=label)
        axes.set_xlabel("completion tokens")
        axes.set_ylabel("completions")
        axes.legend(frameon=False, labelcolor=INK)
    return svg[0]


@contextmanager
def _figure(name: str, height: float = 3.4) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on; on leaving, the one element of the list is the SVG. The same drawing gives the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": name,  # ids of two figures in one page must differ
        "svg.fonttype": "none",
        "font.size": 11,
        "legend.fontsize": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    svg: list[str] = []
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color=INK, alpha=0.2, linewidth=0.5)
        yield axes, svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg.append(buffer.getvalue()[buffer.getvalue().index("<svg") :])

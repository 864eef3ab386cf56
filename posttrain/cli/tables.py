"""Tables for people, shared by the commands."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from posttrain.evaluation.arms import Arm
    from posttrain.evaluation.intervals import Comparison

GAP = 2  # between columns


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], keys: int = 1) -> None:
    """The first column to the left, the others to the right. In a terminal, what does not fit beside the first `keys` columns
    follows below, behind these again; elsewhere a line is as long as it must be."""
    rows = [*rows]
    lines = [[line for row in (columns, *rows) for line in row[index].split("\n")] for index in range(len(columns))]
    widths = [max(map(cell_len, column)) for column in lines]
    terminal = Console()
    width = terminal.width if terminal.is_terminal else sum(widths) + GAP * len(widths)
    console = Console(width=width, markup=False, emoji=False)  # a cell is text, whoever wrote it
    for block in _blocks(widths, keys, width):
        table = Table(box=None, pad_edge=False)
        for index in block:
            table.add_column(columns[index], justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*(row[index] for index in block))
        console.print(table)


def _blocks(widths: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """Which columns stand beside each other, within this width where that is possible."""
    blocks = [[*range(keys)]]
    for index in range(keys, len(widths)):
        wider = [*blocks[-1], index]
        if len(blocks[-1]) > keys and sum(widths[each] + GAP for each in wider) - GAP > width:
            blocks.append([*range(keys), index])
        else:
            blocks[-1] = wider
    return blocks


def percent_range(low: float, high: float) -> str:
    return f"{100 * low:.1f} - {100 * high:.1f}"


def points(paired: "Comparison") -> tuple[str, str]:
    """The difference in percentage points, and its interval."""
    return f"{100 * paired.difference:+.2f}", f"{100 * paired.low:+.2f} to {100 * paired.high:+.2f}"


def print_differences(differences: Mapping[str, "Comparison"]) -> None:
    rows = [(name, *points(paired), f"{paired.p_value:.2g}") for name, paired in differences.items()]
    print_table(("difference, paired by problem", "points", "95 % interval", "p"), rows)


def print_arms(arms: Iterable["Arm"]) -> None:
    """Accuracy in percent with its 95 % interval, cost in tokens and seconds, and what else is known of any of them."""
    arms = list(arms)
    measured = [name for name in MEASURES if any(name in arm.measures for arm in arms)]
    rows = []
    for arm in arms:
        rows.append(
            (
                arm.title,
                f"{100 * arm.accuracy:.1f} %",
                percent_range(*arm.interval),
                f"{arm.tokens:.0f}",
                f"{arm.seconds:.1f}",
                *(MEASURES[name][1](arm.measures[name]) if name in arm.measures else "" for name in measured),
            )
        )
    print_table(
        (
            "arm",
            "accuracy",
            "95 % interval",
            "tokens\nper answer",
            "seconds to sample,\nlearn and choose",
            *(MEASURES[name][0] for name in measured),
        ),
        rows,
    )


MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {  # name -> title, format
    "majority": ("majority of\nits samples", lambda value: f"{100 * value:.1f} %"),
    "kl": ("KL,\nnats", lambda value: f"{value:.2f}"),
    "tokens_per_second": ("tokens/s", lambda value: f"{value:.0f}"),
}

"""How far a long step has come, and when it will be done, on stderr; nothing where that is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager


class Bar:
    """Advanced by whoever does the work; without a terminal it does nothing. note: what else is to be said, a few words."""

    shown = False

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """`count` more are done."""

    def skip(self, count: int) -> None:
        """So many were done before: they count as done, but say nothing of the speed."""


@contextmanager
def bar(title: str, total: int, shown: bool = True) -> Iterator[Bar]:
    from rich.console import Console

    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield Bar()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(title, total=total, note="")

        class Shown(Bar):
            shown = True

            def advance(self, count: int = 1, note: str | None = None) -> None:
                progress.update(task, advance=count)
                if note is not None:
                    progress.update(task, note=note)

            def skip(self, count: int) -> None:
                progress.update(task, completed=progress.tasks[task].completed + count)

        yield Shown()

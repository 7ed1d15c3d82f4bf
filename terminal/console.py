"""What a person sees: progress and errors on stderr, tables on stdout.

rich is imported when it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .. import log
from ..errors import SlimportError

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int], None]


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """A callback (stage, done, total): bars on a terminal, one line per stage elsewhere."""
    if quiet:
        yield _logged(lambda stage, done, total: None)
    elif sys.stderr.isatty():
        with _bars() as report:
            yield _logged(report)
    else:
        yield _logged(_lines())


def said(quiet: bool) -> Callable[[str], None]:
    """A callback that prints a line to stderr, above the bars if there are some."""
    if quiet:
        return log.say
    return lambda line: print(line, file=sys.stderr, flush=True)


def _logged(shown: Progress) -> Progress:
    """As `shown`, with the first sign of each stage in the user's log."""
    seen: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            log.say(stage)
        shown(stage, done, total)

    return report


def _lines() -> Progress:
    started: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in started:
            started.add(stage)
            print(stage, file=sys.stderr, flush=True)

    return report


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=_stderr()) as bars:
        tasks: dict[str, object] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in bars.tasks:
                    if not task.finished:
                        bars.update(task.id, completed=task.total)
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield report


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False
) -> None:
    """Print a table on stdout; columns after the first hold figures, or else `words`."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(
            column, justify="right" if index and not words else "left", overflow="fold"
        )
    for row in rows:
        drawn.add_row(*row)
    # Not a terminal: wide enough that nothing is folded or cut.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    with console.capture() as text:  # rich would end the process itself at a closed pipe
        console.print(drawn)
    print(text.get(), end="")


def show_error(error: SlimportError) -> None:
    """Three lines on stderr: what, why, what to do."""
    for label, line in (("error", error.what), ("why", error.why), ("do", error.cure)):
        print(f"{label}: {' '.join(line.split())}", file=sys.stderr)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False)

"""One progress bar for every long loop: what, how far, how fast, how long still.

Bars go to stderr, so that standard output stays parseable, and are drawn only where a person can watch them; elsewhere
each task leaves one line when it ends.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Advance]:
    """Show progress on `total` units of work; call the yielded function with the units just done."""
    console = Console(stderr=True)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    start, done = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task: TaskID = bar.add_task(what, total=total, rate="")

        def advance(n: int) -> None:
            nonlocal done
            done += n
            bar.update(task, advance=n, rate=f"{_rate(done, start):,.0f} {unit}/s")

        yield advance
    if not console.is_terminal:
        seconds = time.perf_counter() - start
        sys.stderr.write(f"  {what}: {done:,} {unit} in {seconds:.1f} s ({_rate(done, start):,.0f} {unit}/s)\n")


def _rate(done: int, start: float) -> float:
    return done / max(time.perf_counter() - start, 1e-9)

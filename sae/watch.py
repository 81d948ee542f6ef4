"""A training run as somebody at a terminal sees it.

    train    ━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━  341/586 steps  lr 1.13e-03
             349,184/600,064 tok  8,158 tok/s  elapsed 0:00:42  left 0:00:31

    hook point         FVU    held-out FVU      L0    dead   dense     grad    loss
    resid_post.12   0.2210  0.2305 -0.0041    32.0    0.4%    1.2%   0.0213  0.2312

    FVU      ██▇▆▅▄▃▃▂▂▂▂▁▁▁▁▁▁▁▁▁                1.0214 to 0.2210

    density  ▁▁▂▂▃▃▅▅████▇▇▅▅▃▃▂▂▁▁               12 of 4,608 never active
             0.1%    1%      10%     100% of tokens

1. The loop tells of each step and each logged row; both only take notes. 2. A thread draws twice a second (rich), to
stderr: the bar, a line a hook point, and for the first one its FVU so far, under the bar and logarithmic, and the
density of its latents. What does not fit the terminal is left out, least important first; the last picture has every
hook point. 3. Where nobody watches, one line at the end (`activations.progress`).

Left out: numbers of earlier calls of a resumed run, which are in train.jsonl.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, Protocol

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from activations.progress import Advance, progress
from sae.log import Row, name_of
from sae.metrics import DENSE

DRAWINGS_A_SECOND = 2
LEVELS = "▁▂▃▄▅▆▇█"
BUCKETS = 240
"""moments of the run whose FVU is remembered: more than a terminal has cells"""
FLAT = math.log(1.25)
"""smallest range of log FVU that fills the height, so that noise does not look like change"""
CELLS_A_BIN = 2
COMMON_DECADE = -3
"""log10 of the density from which the axis is always shown"""
GAP = "  "
NOTHING = "-"


class View(Protocol):
    """What a training loop tells."""

    def step(self, i: int) -> None:
        """Step `i`, counted from 1 over the whole run, is done; costs microseconds."""
        ...

    def row(self, row: Row) -> None:
        """A row of train.jsonl; keys that it lacks are shown as a dash."""
        ...


@contextmanager
def live_view(
    title: str,
    hook_points: Sequence[str],
    n_steps: int,
    first_step: int,
    batch_size: int,
    heading: str = "hook point",
) -> Iterator[View]:
    """Show a run while it goes on.

    Args:
      title: one word for it, such as "train".
      hook_points: whose rows there will be, as `sae.log.name_of` has it, in the order of the lines.
      n_steps: steps of the whole run.
      first_step: steps that were done before.
      batch_size: tokens a step.
      heading: what stands above them.
    """
    console = Console(stderr=True)
    if not console.is_interactive:
        with progress(title, (n_steps - first_step) * batch_size, "tok") as advance:
            yield _Line(advance, first_step, batch_size)
        return
    screen = Screen(title, hook_points, n_steps, first_step, batch_size, heading=heading)
    # Standard output that goes elsewhere must not land in the picture.
    redirect = sys.stdout.isatty()
    with Live(screen, console=console, refresh_per_second=DRAWINGS_A_SECOND, redirect_stdout=redirect):
        try:
            yield screen
        finally:
            screen.close()


class _Line:
    """Counts tokens for the line at the end."""

    def __init__(self, advance: Advance, first_step: int, batch_size: int):
        self._advance, self._done, self._batch_size = advance, first_step, batch_size

    def step(self, i: int) -> None:
        self._advance((i - self._done) * self._batch_size)
        self._done = i

    def row(self, row: Row) -> None:
        pass


class Screen:
    """The picture of a run; rich draws it in the size that it is given."""

    def __init__(
        self,
        title: str,
        hook_points: Sequence[str],
        n_steps: int,
        first_step: int,
        batch_size: int,
        clock: Callable[[], float] = time.perf_counter,
        heading: str = "hook point",
    ):
        """As `live_view`; `clock` tells seconds."""
        self._title, self._n_steps, self._batch_size, self._clock = title, n_steps, batch_size, clock
        self._heading = heading
        self._latest: dict[str, Row] = {name: {} for name in hook_points}
        self._curve: dict[int, float] = {}
        self._low_decade = COMMON_DECADE
        self._done, self._began, self._closed = first_step, clock(), False
        self._compiled: tuple[int, float] | None = None

    def step(self, i: int) -> None:
        """Step `i` is done."""
        self._compiled = self._compiled or (i, self._clock())
        self._done = i

    def row(self, row: Row) -> None:
        """Take a row in; values of the last evaluation stay until the next one."""
        first = next(iter(self._latest))
        name = name_of(row) or first
        if name not in self._latest:
            return
        before = self._latest[name]
        after = {**before, **row}
        now, then = _number(row.get("holdout_fvu")), _number(before.get("holdout_fvu"))
        if now is not None and then is not None:
            after["change"] = now - then
        self._latest[name] = after
        fvu = _number(row.get("fvu"))
        if name == first and fvu is not None and fvu > 0:
            step = _number(row.get("step")) or self._done
            self._curve[int(min(step / self._n_steps, 1) * (BUCKETS - 1))] = fvu

    def close(self) -> None:
        """The run has ended: draw everything once more, without regard to the height."""
        self._closed = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The lines, in the width and height of the terminal."""
        width, height = options.max_width, options.size.height - 2
        label = max(len(self._title), len("density")) + 4
        tail = self._steps()
        bar = max(min(width - label - 2 - len(tail), 48), 8)
        head: list[RenderableType] = [self._bar(label, bar, tail), _cut(" " * label + self._pace(width - label))]
        graphs = [] if options.ascii_only else self._graphs(label, bar, width)
        n = len(self._latest)
        room = height - len(head) - 2 - len(graphs)
        if room < min(n, 3) and not self._closed:
            graphs, room = [], height - len(head) - 2
        shown = n if n <= room or self._closed else max(room - 1, 0)
        yield from (*head, Text(), *self._table(width, shown), *graphs)
        if not self._closed:
            # A terminal echoes ^C where the cursor is; at the end of a full line it would wrap and shift the picture.
            yield Text()

    def _steps(self) -> str:
        total = f"{self._n_steps:,}"
        lr = next((_number(row.get("lr")) for row in self._latest.values() if "lr" in row), None)
        rate = f"{lr:.2e}" if lr is not None else NOTHING
        return f"{self._done:>{len(total)},}/{total} steps{GAP}lr {rate:<8}"

    def _bar(self, label: int, width: int, tail: str) -> Table:
        line = Table.grid()
        for cells in (label, width, None):
            line.add_column(width=cells, no_wrap=True, overflow="crop")
        bar = ProgressBar(total=self._n_steps, completed=self._done, width=width)
        line.add_row(Text(f"  {self._title}", style="bold"), bar, Text("  " + tail))
        return line

    def _pace(self, width: int) -> str:
        """Tokens, speed and times; what a narrow terminal has no room for is left out."""
        total, rate = f"{self._n_steps * self._batch_size:,}", self._rate()
        left = _duration((self._n_steps - self._done) * self._batch_size / rate) if rate else NOTHING
        parts = [
            f"{self._done * self._batch_size:>{len(total)},}/{total} tok",
            f"{rate:,.0f} tok/s" if rate else f"{NOTHING} tok/s",
            f"elapsed {_duration(self._clock() - self._began)}",
            *([f"left {left}"] if self._done < self._n_steps else []),
        ]
        for expendable in (parts[2], parts[1]):
            if len(GAP.join(parts)) > width:
                parts.remove(expendable)
        return GAP.join(parts)

    def _rate(self) -> float | None:
        """Tokens a second without the first step, which compiles: as logged, before that as seen from here."""
        logged = next((_number(row.get("tok_s")) for row in self._latest.values() if "tok_s" in row), None)
        if logged:
            return logged
        first, began = self._compiled or (self._done, 0.0)
        seconds = self._clock() - began
        return (self._done - first) * self._batch_size / seconds if self._done > first and seconds > 0 else None

    def _table(self, width: int, shown: int) -> list[Text]:
        names = list(self._latest)
        longest = min(max(len(name) for name in (*names, self._heading)), max(width // 4, 13))
        columns, left = [], width - 2 - longest
        for column in COLUMNS:
            left -= column.width + 2
            if left >= 0:
                columns.append(column)
        titles = "".join(f"  {column.title:>{column.width}}" for column in columns)
        lines = [_cut(f"  {self._heading:<{longest}}{titles}", style="dim")]
        for name in names[:shown]:
            line = _cut(f"  {_shortened(name, longest):<{longest}}")
            for column in columns:
                cell = column.cell(self._latest[name])
                line.append(" " * (2 + column.width - len(cell))).append(cell)
            lines.append(line)
        if shown < len(names):
            lines.append(_cut(f"  and {len(names) - shown} more, in train.jsonl", style="dim"))
        return lines

    def _graphs(self, label: int, cells: int, width: int) -> list[Text]:
        """The first hook point's FVU and density, with its name if there are several; empty before there are any."""
        name, row = next(iter(self._latest.items()))
        graphs = [self._fvu(label, cells), self._density(label, cells, width, row.get("holdout_density_histogram"))]
        lines = [line for graph in graphs if graph for line in (Text(), *graph)]
        if lines and len(self._latest) > 1:
            lines.insert(1, _cut(f"  {name}", style="dim"))
        return lines

    def _fvu(self, label: int, width: int) -> list[Text]:
        curve = sorted(self._curve.copy().items())
        if not curve:
            return []
        cells = {bucket * width // BUCKETS: math.log(fvu) for bucket, fvu in curve}
        low, high = min(cells.values()), max(cells.values())
        line, level = " " * min(cells), 0
        for cell in range(min(cells), max(cells) + 1):
            if cell in cells:
                level = round((cells[cell] - low) / max(high - low, FLAT) * (len(LEVELS) - 1))
            line += LEVELS[level]
        seen = [fvu for _, fvu in curve]
        scale = f"{_fraction(max(seen))} to {_fraction(min(seen))}"
        return [_graph("FVU", label, Text(f"{line:<{width}}", "cyan"), scale)]

    def _density(self, label: int, cells: int, width: int, histogram: object) -> list[Text]:
        if not isinstance(histogram, Mapping):
            return []
        edges, counts = histogram.get("log10_edges"), histogram.get("counts")
        if not (edges and counts and len(edges) == len(counts) and sum(counts)):
            return []
        bins = list(zip(edges[:-1], counts[1:], strict=True))
        # Once shown, a decade stays, so that the axis does not jump.
        self._low_decade = min([self._low_decade, *(math.floor(low) for low, count in bins if count)])
        bins = [(low, count) for low, count in bins if low >= self._low_decade]
        tallest, bars, axis = max((count for _, count in bins), default=0), Text(), ""
        for low, count in bins:
            level = LEVELS[max(math.ceil(count / tallest * len(LEVELS)) - 1, 0)] if count else " "
            bars.append(level * CELLS_A_BIN, "yellow" if low >= math.log10(DENSE) else "cyan")
            axis = axis.ljust(len(bars) - CELLS_A_BIN) + (f"{100 * 10.0**low:g}%" if low == math.floor(low) else "")
        end = "100% of tokens"
        axis = axis.ljust(len(bars)) + (end if label + len(bars) + len(end) <= width else "100%")
        bars.append(" " * (cells - len(bars)))
        dead = f"{counts[0]:,} of {sum(counts):,} never active"
        tail = dead if label + len(bars) + 2 + len(dead) <= width else ""
        return [_graph("density", label, bars, tail), _cut(" " * label + axis, style="dim")]


class Column(NamedTuple):
    """A column of the table."""

    title: str
    width: int
    cell: Callable[[Row], Text]


def _plain(key: str, form: Callable[[float], str]) -> Callable[[Row], Text]:
    def cell(row: Row) -> Text:
        value = _number(row.get(key))
        return Text(NOTHING, "dim") if value is None else Text(form(value))

    return cell


def _held_out(row: Row) -> Text:
    """Held-out FVU, and its change since the evaluation before."""
    value, change = _number(row.get("holdout_fvu")), _number(row.get("change"))
    if value is None:
        return Text(NOTHING, "dim")
    text = Text(_fraction(value), "bold")
    if change is None:
        return text.append(" " * 8)
    return text.append(f" {change:+.4f}", f"not bold {'green' if change < 0 else 'red'}")


def _fraction(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:#.5g}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _count(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _norm(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= value < 10 else f"{value:#.3g}" if 10 <= value < 1e3 else f"{value:.1e}"


COLUMNS = (
    Column("FVU", 6, _plain("fvu", _fraction)),
    Column("held-out FVU", 14, _held_out),
    Column("L0", 6, _plain("l0", _count)),
    Column("dead", 6, _plain("dead_fraction", _percent)),
    Column("dense", 6, _plain("dense_fraction", _percent)),
    Column("grad", 7, _plain("grad_norm", _norm)),
    Column("loss", 6, _plain("loss", _fraction)),
)
"""from the left, which is also the order of importance"""


def _graph(title: str, label: int, picture: Text, tail: str) -> Text:
    text = Text.assemble(f"  {title}".ljust(label), picture, f"  {tail}")
    text.no_wrap, text.overflow = True, "crop"
    return text


def _cut(line: str, style: str = "") -> Text:
    return Text(line, style, no_wrap=True, overflow="crop")


def _shortened(name: str, width: int) -> str:
    """A long name without its middle: both ends tell hook points apart.

    >>> _shortened("resid_mid.12->mlp_out.12", 16)
    'resid_m...out.12'
    """
    if len(name) <= width:
        return name
    end = (width - 3) // 2
    return f"{name[: width - 3 - end]}...{name[len(name) - end :]}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


def _number(value: object) -> float | None:
    """`value` if it is a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

"""How results of the command are shown: as one JSON object, or as tables that a terminal does not cut."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

WIDEST = 10_000
"""columns in which results are laid out"""
DIGITS = 4
"""of a number that is shown; JSON has all of them"""


def status(line: str) -> None:
    """Say on standard error what is going on."""
    sys.stderr.write(f"  {line}\n")


def show(result: Mapping[str, Any], as_json: bool, plain: str | None = None) -> None:
    """Print a result: as JSON, as one of its values, or as a table of them."""
    if as_json:
        sys.stdout.write(json.dumps(result, default=str) + "\n")
    elif plain is not None:
        sys.stdout.write(f"{result[plain]}\n")
    else:
        _lay_out(result)


def _lay_out(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in _flat(result):
        table.add_row(key, _cell(value))
    for part in (table, *(_table(key, value) for key, value in result.items() if _is_table(value))):
        console = Console(soft_wrap=True, width=WIDEST)
        console.width = console.measure(part).maximum  # wider than the terminal, if it must: no cell loses its end
        console.print(part, markup=False)


def _is_table(value: Any) -> bool:
    """Whether a value holds several things of the same keys, each a number or text."""
    return (
        isinstance(value, Mapping)
        and len(value) > 1
        and all(isinstance(row, Mapping) and not any(map(_nests, row.values())) for row in value.values())
        and len({tuple(row) for row in value.values()}) == 1
    )


def _nests(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(name, *next(iter(rows.values())), box=None, pad_edge=False, header_style="bold")
    for key, row in rows.items():
        table.add_row(key, *map(_cell, row.values()))
    return table


def _flat(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys, with dots between nested ones, and their values, but for what goes into a table of its own."""
    for key, value in result.items():
        if isinstance(value, Mapping) and value:
            if prefix or not _is_table(value):
                yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.{DIGITS}g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict | list | tuple):
        return json.dumps(_rounded(value), default=str, ensure_ascii=False)
    return str(value)


def _rounded(value: Any) -> Any:
    """With floats as a cell shows them, however deep they are."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value

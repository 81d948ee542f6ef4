"""Tables in a file that other programs read: .parquet, .jsonl or .csv by its name, written a part at a time.

Parts are columns by name: arrays of numbers, or lists of what JSON can hold, with arrays in it. In a .csv what is no
number or text is JSON. The file is written beside its place, and then renamed into it, so that it is there whole or not
at all. Left out: what the columns mean.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from activations.errors import ConfigError, SaekitError, StorageError

Part = Mapping[str, "np.ndarray | list[Any]"]
"""columns of the same length, by name"""
Schema = Callable[[Any], Any]
"""from the module pyarrow, which need not be installed, to a schema"""


def check_table(path: Path) -> None:
    """Raise ConfigError if no table can be written under this name; before a computation that is to fill it."""
    if path.suffix not in _WRITERS:
        known = ", ".join(_WRITERS)
        raise ConfigError(path, expected=f"a name that ends in one of {known}", got=path.name, fix="Rename it.")
    if path.suffix == ".parquet":
        _pyarrow(path)


def write_table(path: Path, parts: Iterable[Part], schema: Schema | None = None) -> int:
    """Write a table, and replace what was there; returns the number of its rows.

    Args:
      schema: of a .parquet; none: as the first part has it.
    Raises: ConfigError, StorageError.
    """
    check_table(path)
    n_rows = 0

    def counted() -> Iterator[Part]:
        nonlocal n_rows
        for part in parts:
            n_rows += len(next(iter(part.values())))
            yield part

    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _WRITERS[path.suffix](partial, counted(), schema)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except SaekitError:
        raise
    except OSError as error:
        fix = "Choose another place."
        raise StorageError(path, expected="a file that can be written", got=error.strerror or error, fix=fix) from error
    return n_rows


def _write_parquet(path: Path, parts: Iterable[Part], schema: Schema | None) -> None:
    pyarrow, parquet = _pyarrow(path)
    expected, writer = schema and schema(pyarrow), None
    try:
        for part in parts:
            group = pyarrow.table(dict(part), schema=expected)
            writer = writer or parquet.ParquetWriter(path, group.schema, compression="zstd")
            writer.write_table(group)
            expected = group.schema
    finally:
        if writer:
            writer.close()


def _write_jsonl(path: Path, parts: Iterable[Part], schema: Schema | None) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in _rows(parts):
            file.write(_json(row) + "\n")


def _write_csv(path: Path, parts: Iterable[Part], schema: Schema | None) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for number, part in enumerate(parts):
            if number == 0:
                writer.writerow(part)
            rows = (row.values() for row in _rows([part]))
            writer.writerows([_json(v) if isinstance(v, dict | list | bool) else v for v in row] for row in rows)


def _rows(parts: Iterable[Part]) -> Iterator[dict[str, Any]]:
    """Rows of plain Python; NaN is None."""
    for part in parts:
        columns = [v.tolist() if isinstance(v, np.ndarray) else v for v in part.values()]
        for values in zip(*columns, strict=True):
            yield {name: None if value != value else value for name, value in zip(part, values, strict=True)}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=np.ndarray.tolist)


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        fix = "Install it with: pip install 'saekit[parquet]'; or choose a name that ends in .jsonl."
        raise ConfigError(path, expected="the package pyarrow", got="it is not installed", fix=fix) from error
    return pyarrow, parquet


_WRITERS: dict[str, Callable[[Path, Iterable[Part], Schema | None], None]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
}

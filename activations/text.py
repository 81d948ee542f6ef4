"""Text specs to documents, one at a time.

Specs:
    corpus                               the small corpus that comes with saekit
    PATH.txt                             a document is a run of lines that are not blank
    PATH.jsonl[#KEY]                     a document is the KEY of a JSON object a line; KEY is `text` unless given
    PATH.parquet[#COLUMN]                a document is a row; needs the extra `parquet`
    hf:DATASET[:CONFIG[:SPLIT]][#COLUMN] streamed by the datasets library; needs the extra `datasets`
.txt and .jsonl may end in .gz or .xz as well. In hf: the split is `train` unless given; CONFIG may be left empty.

Flow: 1. the first row of TEXT_SOURCES that matches the spec reads it, in constant memory; 2. empty documents are
skipped and the others numbered from 0; 3. what cannot be read is a TextError that names the line.

A .txt file is cut at blank lines so that a large one streams; for longer documents write .jsonl. Left out: folders,
shuffling and cleaning.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

from activations.errors import TextError
from activations.fingerprints import digest, file_sha256
from activations.quiet import first_line

_ROWS_A_BATCH = 256
_UNPACK_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a text source."""

    text: str
    """What it says; never blank."""
    index: int
    """0-based place among the documents of its source that are not blank."""


@dataclass(frozen=True)
class TextSource:
    """One kind of text spec."""

    matches: Callable[[str], bool]
    """Whether a spec is of this kind."""
    read: Callable[[str], Iterator[str]]
    """The texts that a spec stands for, blank ones included."""
    fingerprint: Callable[[str], str]
    """SHA-256 hex of those texts, or of what decides them."""


def read_file(path: Path, kind: str = "text") -> str:
    """All that a file holds. Raises: TextError if it cannot be read as UTF-8."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(path, expected=f"a readable {kind} file", got=str(error), fix="Check the path.") from error


def documents(spec: str) -> Iterator[Document]:
    """The documents of a text spec, in order.

    Raises: TextError if the spec is of no known kind, or, while reading, if the source is missing, unreadable or has
      no document that is not blank.
    """
    return _numbered(spec, find_text_source(spec).read(spec))


def text_fingerprint(spec: str) -> str:
    """SHA-256 hex that changes when the documents of a spec do; where a file lies does not change it."""
    return find_text_source(spec).fingerprint(spec)


def find_text_source(spec: str) -> TextSource:
    """The row of TEXT_SOURCES that reads a spec."""
    for source in TEXT_SOURCES.values():
        if source.matches(spec):
            return source
    raise TextError(
        f"text '{spec}'",
        expected=f"one of {', '.join(TEXT_SOURCES)}; files end in .txt, .jsonl, .jsonl.gz, .jsonl.xz or .parquet",
        got=f"'{spec}'",
        fix="Write for example corpus, notes.txt, data.jsonl#body or hf:ORG/DATASET.",
    )


def _numbered(spec: str, texts: Iterator[str]) -> Iterator[Document]:
    index = 0
    for text in texts:
        if text.strip():
            yield Document(text, index)
            index += 1
    if index == 0:
        raise TextError(f"text '{spec}'", expected="at least one document", got="none", fix="Give another source.")


# --- lines of a file -------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    """Decoded lines of a plain, gzip or xz file, without line ends."""
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    number = 0
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except FileNotFoundError as error:
        raise TextError(path, expected="a text file", got="nothing there", fix="Check the path.") from error
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} after {error.start} others"
        fix = "Convert the file to UTF-8, for example with iconv."
        raise TextError(f"{path} line {number}", expected="UTF-8", got=got, fix=fix) from error
    except _UNPACK_ERRORS as error:
        fix = "Copy or make the file again."
        raise TextError(
            f"{path} after line {number}", expected="a readable file", got=first_line(error), fix=fix
        ) from error


def _read_txt(spec: str) -> Iterator[str]:
    block: list[str] = []
    for line in _lines(_path(spec)):
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []
    yield "\n".join(block)


def _read_jsonl(spec: str) -> Iterator[str]:
    return _jsonl_texts(_path(spec), _key(spec))


def _jsonl_texts(path: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _field(f"{path} line {number}", _json(f"{path} line {number}", line), key)


def _json(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise TextError(
            where, expected="one JSON object a line", got=first_line(error), fix="Correct the line."
        ) from error


def _field(where: str, row: Any, key: str) -> str:
    if not isinstance(row, dict) or key not in row:
        got = f"the keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise TextError(where, expected=f"an object with '{key}'", got=got, fix="Name the key: path.jsonl#KEY.")
    return _as_text(where, row[key], key)


def _as_text(where: str, value: Any, key: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        fix = "Name a key or column of text: #KEY."
        raise TextError(where, expected=f"text in '{key}'", got=type(value).__name__, fix=fix)
    return value


# --- parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(spec: str) -> Iterator[str]:
    path, column = _path(spec), _key(spec)
    for (value,) in parquet_rows(path, (column,), fix="Name the column: #COLUMN."):
        yield _as_text(str(path), value, column)


def parquet_rows(path: Path, columns: Sequence[str], *, fix: str) -> Iterator[tuple[Any, ...]]:
    """Values of some columns of a parquet file, row by row, in constant memory.

    Args:
      fix: what to do about a column that is not there.
    Raises: TextError if the library, the file or a column is missing, or the file is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing_extra(str(path), "pyarrow", "parquet") from error
    if not path.is_file():
        raise TextError(path, expected="a parquet file", got="nothing there", fix="Check the path.")
    try:
        with parquet.ParquetFile(path) as file:
            for column in columns:
                _check_column(str(path), column, file.schema_arrow.names, fix)
            for batch in file.iter_batches(_ROWS_A_BATCH, columns=list(columns)):
                yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(
            path, expected="a whole parquet file", got=first_line(error), fix="Copy or make the file again."
        ) from error


def _check_column(where: str, column: str, columns: list[str], fix: str) -> None:
    if column not in columns:
        got = f"the columns {', '.join(columns)}"
        raise TextError(where, expected=f"a column '{column}'", got=got, fix=fix)


def _missing_extra(spec: str, library: str, extra: str) -> TextError:
    fix = f"Run pip install {library}, or install saekit with its extra '{extra}'."
    return TextError(f"text '{spec}'", expected=f"the library {library}", got="it is not installed", fix=fix)


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


class HubDataset(NamedTuple):
    """The parts of a spec that begins with hf:."""

    name: str
    config: str | None
    split: str
    column: str

    @classmethod
    def parse(cls, spec: str) -> "HubDataset":
        """Read `hf:DATASET[:CONFIG[:SPLIT]][#COLUMN]`.

        >>> HubDataset.parse("hf:org/data::test#body")
        HubDataset(name='org/data', config=None, split='test', column='body')
        """
        parts = spec.removeprefix("hf:").partition("#")[0].split(":")
        if len(parts) > 3 or not parts[0]:
            expected = "hf:DATASET[:CONFIG[:SPLIT]][#COLUMN]"
            fix = "Write for example hf:ORG/DATASET::train#text."
            raise TextError(f"text '{spec}'", expected=expected, got=f"'{spec}'", fix=fix)
        name, config, split = [*parts, "", ""][:3]
        return cls(name, config or None, split or "train", _key(spec))


def _read_hub(spec: str) -> Iterator[str]:
    wanted = HubDataset.parse(spec)
    rows = _hub_call(spec, "load_dataset", wanted.name, wanted.config, split=wanted.split, streaming=True)
    try:
        for row in rows:
            _check_column(f"text '{spec}'", wanted.column, list(row), "Name the column: #COLUMN.")
            yield _as_text(f"text '{spec}'", row[wanted.column], wanted.column)
    except TextError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise _hub_error(spec, error) from error


def _hub_fingerprint(spec: str) -> str:
    # The texts stay on the hub, so that this stands for the version of the data files instead of their content.
    wanted = HubDataset.parse(spec)
    builder = _hub_call(spec, "load_dataset_builder", wanted.name, wanted.config)
    return digest("hf", wanted.name, wanted.config or "", wanted.split, wanted.column, str(builder.hash))


def _hub_call(spec: str, function: str, *args: Any, **kwargs: Any) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise _missing_extra(spec, "datasets", "datasets") from error
    try:
        return getattr(datasets, function)(*args, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise _hub_error(spec, error) from error


def _hub_error(spec: str, error: Exception) -> TextError:
    fix = "Check the name, config, split and network; a private dataset needs `hf auth login`."
    return TextError(f"text '{spec}'", expected="a dataset that can be read", got=first_line(error), fix=fix)


# --- the table -------------------------------------------------------------------------------------------------------


def _read_corpus(spec: str) -> Iterator[str]:
    with as_file(files("activations.data") / "corpus.jsonl.xz") as path:
        yield from _jsonl_texts(path, "text")


def _corpus_fingerprint(spec: str) -> str:
    with as_file(files("activations.data") / "corpus.jsonl.xz") as path:
        return _content_digest(path, "text")


def _file_fingerprint(spec: str) -> str:
    return _content_digest(_path(spec), _key(spec))


def _content_digest(path: Path, key: str) -> str:
    if not path.is_file():
        raise TextError(path, expected="a text file", got="nothing there", fix="Check the path.")
    return digest("file", key, file_sha256(path))


def _path(spec: str) -> Path:
    return Path(spec.partition("#")[0]).expanduser()


def _key(spec: str) -> str:
    return spec.partition("#")[2] or "text"


def _ends_in(*suffixes: str) -> Callable[[str], bool]:
    return lambda spec: not spec.startswith("hf:") and _path(spec).name.endswith(suffixes)


TEXT_SOURCES: dict[str, TextSource] = {
    "corpus": TextSource(lambda spec: spec == "corpus", _read_corpus, _corpus_fingerprint),
    "hf": TextSource(lambda spec: spec.startswith("hf:"), _read_hub, _hub_fingerprint),
    "txt": TextSource(_ends_in(".txt", ".txt.gz", ".txt.xz"), _read_txt, _file_fingerprint),
    "jsonl": TextSource(_ends_in(".jsonl", ".jsonl.gz", ".jsonl.xz"), _read_jsonl, _file_fingerprint),
    "parquet": TextSource(_ends_in(".parquet"), _read_parquet, _file_fingerprint),
}

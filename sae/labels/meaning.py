"""Labels by meaning: what each latent is called as a row of a sentence-embedding model, and how like a text it is.

    cosine_i = row_i . query        of rows of norm 1, exactly, of all labels

Flow: 1. the label that lists show of each latent is looked up, again where labels were written since; 2. texts whose
rows are not kept yet are embedded, a batch at a time; 3. a row is kept as float16 in a file beside the index, under
the model's fingerprint and the text's hash, so that nothing is embedded twice. Where the folder cannot be written, rows
live as long as the process. Left out: the model (`activations.sentences`), and labels that lists do not show.
"""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import sqlalchemy as sql
from jaxtyping import Bool, Float, Float16, Int
from sqlalchemy.exc import DatabaseError

from activations.errors import CorruptArtefactError
from sae.index_db import FeatureIndex

FILE_NAME = "embeddings.sqlite"
BATCH = 256
"""texts between two times of keeping what there is"""
READ_AT_ONCE = 10_000
_TABLE = sql.Table(
    "embeddings",
    sql.MetaData(),
    sql.Column("model", sql.String, primary_key=True),
    sql.Column("text_sha256", sql.LargeBinary, primary_key=True),
    sql.Column("row", sql.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)


@runtime_checkable
class Embedder(Protocol):
    """A sentence-embedding model, as `activations.sentences` has it."""

    fingerprint: str
    """of all that decides which row a text has"""

    @property
    def width(self) -> int:
        """Numbers a row."""
        ...

    def documents(self, texts: Sequence[str]) -> Float[np.ndarray, "n width"]:
        """Rows of texts that are searched, of norm 1."""
        ...

    def query(self, text: str) -> Float[np.ndarray, " width"]:
        """The row of what is searched for."""
        ...


class _Labels(NamedTuple):
    """What latents are called."""

    revision: tuple[int, int]
    latents: Int[np.ndarray, " n"]
    place: Int[np.ndarray, " n"]
    """of each latent's text among `rows`"""
    rows: Float[np.ndarray, "n_texts width"]


class Meanings:
    """Labels of one index by one model. May be shared by threads."""

    def __init__(self, index: FeatureIndex, folder: Path, model: Embedder):
        """Args: folder: where the index is, and rows are kept."""
        self._index, self._model = index, model
        self._kept = _Kept(folder / FILE_NAME, model.fingerprint, model.width)
        self._lock, self._is_closed = threading.Lock(), False
        self._labels: _Labels | None = None
        self.n_done, self.n_texts = 0, 0
        """texts that are embedded, of how many, while `read` runs and after it"""

    @property
    def revision(self) -> tuple[int, int] | None:
        """Of the labels that `cosines` knows (`FeatureIndex.labels_revision`); none before the first `read`."""
        return None if self._labels is None else self._labels.revision

    @property
    def is_current(self) -> bool:
        """Whether no label was written since."""
        return self.revision == self._index.labels_revision()

    def read(self) -> None:
        """Embed what is not embedded yet. Raises: CorruptArtefactError for a file that is no such."""
        with self._lock:
            revision = self._index.labels_revision()
            if self.revision == revision:
                return
            d_sae = self._index.info["d_sae"]
            called = {latent: text for latent, text in self._index.top_labels().items() if 0 <= latent < d_sae}
            texts = list(dict.fromkeys(called.values()))
            rows = self._rows_of(texts)
            place = {text: i for i, text in enumerate(texts)}
            if self._is_closed:
                return
            latents = np.fromiter(called, np.int64, len(called))
            places = np.fromiter((place[text] for text in called.values()), np.int64, len(called))
            self._labels = _Labels(revision, latents, places, rows)

    def _rows_of(self, texts: list[str]) -> Float[np.ndarray, "n width"]:
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        rows = np.zeros((len(texts), self._model.width), np.float32)
        is_there = self._kept.fill(rows, {key: i for i, key in enumerate(keys)})
        todo = np.flatnonzero(~is_there).tolist()
        todo.sort(key=lambda i: len(texts[i]))  # of like length, so that little of a batch is padding
        self.n_texts, self.n_done = len(texts), len(texts) - len(todo)
        for start in range(0, len(todo), BATCH):
            if self._is_closed:
                break
            chosen = todo[start : start + BATCH]
            found = self._model.documents([texts[i] for i in chosen]).astype(np.float16)
            rows[chosen] = found
            self._kept.add([keys[i] for i in chosen], found)
            self.n_done += len(chosen)
        return rows

    def close(self) -> None:
        """End a `read` that runs behind its batch, and release the file."""
        self._is_closed = True
        self._kept.close()

    def cosines(self, text: str) -> Float[np.ndarray, " d_sae"]:
        """Of each latent's label with a text, as of the last `read`; NaN where there is no label."""
        found = np.full(self._index.info["d_sae"], np.nan, np.float32)
        if (labels := self._labels) is not None:
            found[labels.latents] = (labels.rows @ self._model.query(text))[labels.place]
        return found


class _Kept:
    """Rows on disk."""

    def __init__(self, file: Path, model: str, width: int):
        self._file, self._model, self._width = file, model, width
        self._engine = sql.create_engine(sql.URL.create("sqlite", database=str(file)))
        self._may_write = True

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    def fill(self, rows: Float[np.ndarray, "n width"], place: Mapping[bytes, int]) -> Bool[np.ndarray, " n"]:
        """Put those that are kept where `place` has the hash of their text, and tell which are there.

        Raises: CorruptArtefactError for a file that is something else. A row that cannot be one is passed over.
        """
        is_there = np.zeros(len(rows), bool)
        if not self._file.is_file():
            return is_there
        is_row = sql.func.typeof(_TABLE.c.row) == "blob", sql.func.length(_TABLE.c.row) == 2 * self._width
        query = sql.select(_TABLE.c.text_sha256, _TABLE.c.row).where(_TABLE.c.model == self._model, *is_row)
        try:
            with self._engine.connect() as connection:
                for part in connection.execution_options(yield_per=READ_AT_ONCE).execute(query).partitions():
                    wanted = [(place[key], row) for key, row in part if key in place]
                    values = np.frombuffer(b"".join(row for _, row in wanted), "<f2").reshape(-1, self._width)
                    is_good = np.isfinite(values).all(axis=1)
                    at = np.array([i for i, _ in wanted], np.int64)[is_good]
                    rows[at], is_there[at] = values[is_good], True
        except DatabaseError as error:
            fix = "Remove the file: it is made again."
            raise CorruptArtefactError(self._file, expected="rows of texts", got="another file", fix=fix) from error
        return is_there

    def add(self, keys: Sequence[bytes], rows: Float16[np.ndarray, "n width"]) -> None:
        """Keep some, where that can be."""
        if not self._may_write:
            return
        values = [
            {"model": self._model, "text_sha256": key, "row": row.astype("<f2").tobytes()}
            for key, row in zip(keys, rows, strict=True)
        ]
        try:
            with self._engine.begin() as connection:
                _TABLE.metadata.create_all(connection)
                connection.execute(sql.insert(_TABLE).prefix_with("OR REPLACE"), values)
        except DatabaseError:  # a folder that cannot be written, or a disk that is full
            self._may_write = False

"""The feature index on disk: one SQLite file (or any SQLAlchemy URL) with a row a latent.

Small values are columns, so that a list can be sorted and filtered in the database; contexts are one blob a latent and
kind (`sae.contexts`). The words that a latent says or stands on are full-text indexed (FTS5). Writing replaces the
tables below in one transaction and leaves others alone, so that labels may live in the same file. Left out: building
an index (`sae.index`) and writing labels (`sae.labels.store`).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Engine, event, orm
from sqlalchemy.exc import DatabaseError

from activations.errors import CorruptArtefactError, MissingArtefactError, SaekitError, UnknownNameError
from sae.contexts import Context, pack_contexts, unpack_contexts
from sae.histogram import quantile, share_below
from sae.labels.tables import Label, labels_of

FILE_NAME = "index.sqlite"
SCHEMA_VERSION = 2
BLOBS = ("contexts", "sampled", "near_misses")
_BATCH = 1000
_SEARCH = "CREATE VIRTUAL TABLE IF NOT EXISTS search USING fts5(body, kind UNINDEXED, latent UNINDEXED)"


class Base(orm.DeclarativeBase):
    """Of every table of an index."""


class _Info(Base):
    __tablename__ = "info"
    key: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    value: orm.Mapped[Any] = orm.mapped_column(sql.JSON)


class _Latent(Base):
    __tablename__ = "latents"
    latent: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    density: orm.Mapped[float] = orm.mapped_column(index=True)
    max_activation: orm.Mapped[float] = orm.mapped_column(index=True)
    mean_activation: orm.Mapped[float]
    histogram: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    histogram_start: orm.Mapped[int]
    top_logits: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    bottom_logits: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    logit_entropy: orm.Mapped[float | None] = orm.mapped_column(index=True)
    neighbours: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    coactivations: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    output_score: orm.Mapped[float | None] = orm.mapped_column(index=True)
    confidence_change: orm.Mapped[float | None] = orm.mapped_column(index=True)
    contexts: orm.Mapped[bytes]
    sampled: orm.Mapped[bytes]
    near_misses: orm.Mapped[bytes]


@dataclass(frozen=True)
class LatentRow:
    """What the index knows of one latent."""

    latent: int
    """index of the latent in the SAE"""
    density: float
    """share of unmasked tokens on which it is active"""
    max_activation: float
    """strongest activation, in units of the residual stream along a unit decoder row"""
    mean_activation: float
    """mean activation over the tokens on which it is active"""
    histogram: list[int]
    """active tokens by activation, in the bins of `sae.histogram` from `histogram_start` on"""
    top_logits: list[tuple[str, float]]
    """tokens whose logits its decoder row raises most, with the rise per unit of activation"""
    bottom_logits: list[tuple[str, float]]
    """tokens whose logits its decoder row lowers most"""
    neighbours: list[tuple[int, float]]
    """latents with the most similar decoder rows, with the cosine"""
    contexts: list[Context]
    """where it was strongest, at most one context a document, strongest first"""
    sampled: list[Context] = field(default_factory=list)
    """a uniform sample of the places where it is active, at most one a document, in random order"""
    near_misses: list[Context] = field(default_factory=list)
    """the largest pre-activations in sequences where it is never active, at most one a document, largest first"""
    histogram_start: int = 0
    """number of the first bin of `histogram`"""
    logit_entropy: float | None = None
    """entropy in nats of what its decoder row alone would predict (`sae.index_weights`); None where not computed"""
    coactivations: list[tuple[int, float, float]] = field(default_factory=list)
    """latents that are active together with it, with Jaccard index and lift (`sae.coactivation`)"""
    output_score: float | None = None
    """0..1, how much steering with it says what its logits say (`sae.index_effects`); None where not measured"""
    confidence_change: float | None = None
    """change of the next token's confidence, in nats, when it is amplified (`sae.index_effects`)"""

    def one_a_document(self) -> list[Context]:
        """A context of each document that it was kept from: a sampled one where there are both."""
        found: dict[tuple[int, int], Context] = {}
        for context in (*self.sampled, *self.contexts):
            found.setdefault((context.source, context.document), context)
        return list(found.values())

    def quantile(self, share: float) -> float:
        """Activation below which this share of its active tokens lies, within a bin of the histogram."""
        return quantile(self.histogram, self.histogram_start, share)

    def quantile_bins(self, n: int) -> list[list[Context]]:
        """The uniformly sampled contexts by quantile of their activation, in `n` bins of equal share, weakest first."""
        bins: list[list[Context]] = [[] for _ in range(n)]
        for context in sorted(self.sampled, key=lambda context: context.score):
            share = share_below(self.histogram, self.histogram_start, context.score)
            bins[min(int(share * n), n - 1)].append(context)
        return bins


class FeatureIndex:
    """Read access to a feature index."""

    def __init__(self, engine: Engine, info: dict[str, Any]):
        self._engine, self.info = engine, info

    @classmethod
    def open(cls, path: str | Path) -> "FeatureIndex":
        """Open the index in directory `path`.

        Raises: MissingArtefactError if there is none, CorruptArtefactError if it is not one.
        """
        file = Path(path) / FILE_NAME
        if not file.is_file():
            raise MissingArtefactError(path, expected="a feature index", got="none", fix="Make one with: saekit index")
        query = {"mode": "ro", "uri": "true"}
        if not os.access(file.parent, os.W_OK):
            query["immutable"] = "1"  # a WAL database otherwise needs a file beside it, even to be read
        engine = sql.create_engine(sql.URL.create("sqlite", database=file.absolute().as_uri(), query=query))
        try:
            with orm.Session(engine) as session:
                info = {row.key: row.value for row in session.scalars(sql.select(_Info))}
        except (DatabaseError, ValueError) as error:
            raise _not_an_index(path, "a damaged file") from error
        if info.get("schema_version") != SCHEMA_VERSION:
            raise _not_an_index(path, f"schema version {info.get('schema_version')}")
        return cls(engine, info)

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    @contextmanager
    def _session(self) -> Iterator[orm.Session]:
        try:
            with orm.Session(self._engine) as session:
                yield session
        except SaekitError:
            raise
        except (DatabaseError, ValueError, TypeError) as error:
            raise _not_an_index(str(self._engine.url.database), "a damaged row") from error

    def latent(self, latent: int) -> LatentRow:
        """One latent. Raises: UnknownNameError if the SAE has no such latent."""
        with self._session() as session:
            row = session.get(_Latent, latent)
            if row is None:
                n = self.info["d_sae"]
                raise UnknownNameError(
                    f"latent {latent}", expected=f"0 to {n - 1}", got=latent, fix="Choose a latent of this SAE."
                )
            return _read(row)

    def rows(self, *, min_density: float = 0.0, max_density: float = 1.0, limit: int | None = None) -> list[LatentRow]:
        """Latents within a density range, strongest first; dead latents only if min_density is 0."""
        query = (
            sql.select(_Latent)
            .where(_Latent.density.between(min_density, max_density))
            .order_by(_Latent.max_activation.desc(), _Latent.latent)
            .limit(limit)
        )
        with self._session() as session:
            return [_read(row) for row in session.scalars(query)]

    def each(self) -> Iterator[LatentRow]:
        """All latents in the order of their numbers, with a few of them in memory at a time."""
        query = sql.select(_Latent).order_by(_Latent.latent).execution_options(yield_per=_BATCH)
        with self._session() as session:
            for row in session.scalars(query):
                yield _read(row)

    def latents(self, *, min_density: float = 0.0, max_density: float = 1.0) -> list[int]:
        """Numbers of the latents within a density range, in order."""
        query = sql.select(_Latent.latent).where(_Latent.density.between(min_density, max_density))
        with self._session() as session:
            return list(session.scalars(query.order_by(_Latent.latent)))

    def labels(self, latent: int) -> list[Label]:
        """What a latent was labelled as: the newest of each kind and author, with its scores."""
        with self._session() as session:
            return labels_of(session, latent, self.info["sae_sha256"])

    def search(self, text: str, limit: int = 50) -> list[int]:
        """Latents whose words, or one of whose labels, hold all words of `text`, by bm25; a word may be cut short."""
        words = " ".join('"' + word.replace('"', '""') + '"*' for word in text.split())
        query = sql.text("SELECT latent FROM search WHERE search MATCH :words GROUP BY latent ORDER BY min(rank)")
        if not words:
            return []
        with self._session() as session:
            return [int(row[0]) for row in session.execute(query, {"words": words}).fetchmany(limit)]


def write_index(path: Path, info: dict[str, Any], rows: Iterable[LatentRow]) -> None:
    """Write a whole index into directory `path`, in one transaction: until it ends readers see what was there."""
    path.mkdir(parents=True, exist_ok=True)
    engine = open_for_writing(path)
    try:
        with engine.begin() as connection:
            Base.metadata.create_all(connection)
            connection.execute(sql.text(_SEARCH))
            connection.execute(sql.text("DELETE FROM search WHERE kind = 'words'"))
            for table in (_Info, _Latent):
                connection.execute(sql.delete(table))
            whole = {**info, "schema_version": SCHEMA_VERSION}
            connection.execute(sql.insert(_Info), [{"key": key, "value": value} for key, value in whole.items()])
            remaining = iter(rows)
            while batch := list(islice(remaining, _BATCH)):
                connection.execute(sql.insert(_Latent), [_columns(row) for row in batch])
                words = [{"latent": row.latent, "body": _words(row)} for row in batch]
                connection.execute(sql.text("INSERT INTO search VALUES (:body, 'words', :latent)"), words)
    finally:
        engine.dispose()


def open_for_writing(path: Path) -> Engine:
    """The database of the index in directory `path`, in WAL mode: one process writes while others read."""
    engine = sql.create_engine(sql.URL.create("sqlite", database=str(path / FILE_NAME)))

    @event.listens_for(engine, "connect")
    def begin(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # pysqlite otherwise commits before CREATE
        connection.execute("PRAGMA journal_mode=WAL")

    @event.listens_for(engine, "begin")
    def start(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _columns(row: LatentRow) -> dict[str, Any]:
    return {name: pack_contexts(value) if name in BLOBS else value for name, value in vars(row).items()}


def _words(row: LatentRow) -> str:
    return " ".join(text for text, _ in row.top_logits)


def _read(row: _Latent) -> LatentRow:
    def pairs(values: list[list[Any]]) -> list[tuple[Any, float]]:
        return [(key, value) for key, value in values]

    values: dict[str, Any] = {column.key: getattr(row, column.key) for column in sql.inspect(_Latent).columns}
    values |= {name: pairs(values[name]) for name in ("top_logits", "bottom_logits", "neighbours")}
    values |= {name: unpack_contexts(values[name]) for name in BLOBS}
    values["coactivations"] = [(latent, jaccard, lift) for latent, jaccard, lift in row.coactivations]
    return LatentRow(**values)


def _not_an_index(path: str | Path, got: str) -> CorruptArtefactError:
    return CorruptArtefactError(path, expected="a feature index", got=got, fix="Build it again with: saekit index")

"""The feature index on disk: one SQLite file (or any SQLAlchemy URL) with a row a latent.

Small values are columns; contexts are one blob a latent and kind (`sae.contexts`). What a list of all latents is
sorted and filtered by is there a second time, as one array a figure (`sae.index_arrays`, `sae.latent_query`), and so
are the bytes of the model's tokens (`sae.vocabulary`). The words that a latent says or stands on are full-text indexed
(FTS5). Writing replaces the tables below in one transaction and leaves others alone, so that labels may live in the
same file. Left out: building an index (`sae.index`) and writing labels (`sae.labels.store`).
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sql
from jaxtyping import Float
from sqlalchemy import Engine, event, orm
from sqlalchemy.exc import DatabaseError

from activations.errors import CorruptArtefactError, MissingArtefactError, SaekitError, UnknownNameError
from sae.contexts import Context, pack_contexts, unpack_contexts
from sae.histogram import quantile, share_below
from sae.index_arrays import read_array, replace_arrays
from sae.labels.explanations import Explanations
from sae.labels.tables import Label, labels_of, listed, newest_labels, revision
from sae.vocabulary import NO_TOKENS, Vocabulary

FILE_NAME = "index.sqlite"
SCHEMA_VERSION = 4
BLOBS = ("contexts", "sampled", "near_misses")
_BATCH = 1000
_VOCABULARY = ("token_ends", "<i4"), ("token_bytes", "|u1")
_MAP = ("map_x", "map_y")
RANKED = 20_000
"""texts that a search finds at most for them to be ranked, which takes a look at each"""
_SEARCH = "CREATE VIRTUAL TABLE search USING fts5(body, kind UNINDEXED, latent UNINDEXED, prefix='1 2 3')"


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
    stability: orm.Mapped[float | None]
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
    stability: float | None = None
    """largest decoder cosine in an SAE of another seed, the mean over those; None without such"""

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


def _effects(row: LatentRow) -> list[float]:
    return [context.effect for context in row.contexts if not math.isnan(context.effect)] or [math.nan]


COLUMNS: dict[str, Callable[[LatentRow], float | None]] = {
    "density": lambda row: row.density,
    "max_activation": lambda row: row.max_activation,
    "mean_activation": lambda row: row.mean_activation,
    "logit_entropy": lambda row: row.logit_entropy,
    "top_logit": lambda row: max((rise for _, rise in row.top_logits), default=None),
    "output_score": lambda row: row.output_score,
    "confidence_change": lambda row: row.confidence_change,
    "stability": lambda row: row.stability,
    "max_ablation_effect": lambda row: max(_effects(row)),
    "mean_ablation_effect": lambda row: sum(_effects(row)) / len(_effects(row)),
    "nearest_cosine": lambda row: max((cosine for _, cosine in row.neighbours), default=None),
    "nearest_jaccard": lambda row: max((jaccard for _, jaccard, _ in row.coactivations), default=None),
}
"""what a list of latents can be sorted by, and how it follows from a row; None or NaN where it was not measured"""


FIELDS = (*(name for name in LatentRow.__dataclass_fields__ if name not in BLOBS), "label")
"""what a page of a list can show"""


class FeatureIndex:
    """Read access to a feature index."""

    def __init__(self, engine: Engine, info: dict[str, Any]):
        self._engine, self.info = engine, info
        self._explanations = Explanations(str(info.get("sae_sha256", "")))

    @classmethod
    def open(cls, path: str | Path) -> "FeatureIndex":
        """Open the index in directory `path`.

        Raises: MissingArtefactError if there is none, CorruptArtefactError if it is not one.
        """
        engine, info = _opened(path)
        if info.get("schema_version") != SCHEMA_VERSION:
            raise _not_an_index(path, f"schema version {info.get('schema_version')}")
        if not isinstance(info.get("d_sae"), int):
            raise _not_an_index(path, f"d_sae {info.get('d_sae')}")
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
                raise self._unknown(latent)
            return _read(row)

    def _unknown(self, latent: int) -> UnknownNameError:
        expected, fix = f"0 to {self.info['d_sae'] - 1}", "Choose a latent of this SAE."
        return UnknownNameError(f"latent {latent}", expected=expected, got=latent, fix=fix)

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

    def columns(self) -> dict[str, Float[np.ndarray, " d_sae"]]:
        """What a list can be sorted by, each of all latents in order, float32, NaN where not measured; read only.

        They are read anew by each call. Raises: CorruptArtefactError if one is not what it says.
        """
        with self._session() as session:
            return {name: read_array(session, name, "<f4", self.info["d_sae"]) for name in COLUMNS}

    def map(self) -> Float[np.ndarray, "d_sae 2"]:
        """Where each latent lies in a picture of all, in -1..1 (`sae.index_map`); `info["map"]` says what made it.

        Raises: CorruptArtefactError if the arrays are not what they say.
        """
        with self._session() as session:
            return np.stack([read_array(session, name, "<f4", self.info["d_sae"]) for name in _MAP], axis=1)

    def token_texts(self, ids: Iterable[int | np.integer]) -> list[str]:
        """How a sequence of tokens is shown, one text a token (`sae.vocabulary`).

        Raises: CorruptArtefactError if the vocabulary is damaged.
        """
        return self.vocabulary.texts(ids)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the model."""
        with self._session() as session:
            ends, data = (read_array(session, *of, None) for of in _VOCABULARY)
        bounds = np.concatenate([[0], ends, [len(data)]])
        if (bounds[1:] < bounds[:-1]).any() or bounds[-2] != len(data):
            raise _not_an_index(str(self._engine.url.database), "a vocabulary that cannot be")
        return Vocabulary(ends, data)

    def rows_of(
        self, latents: Iterable[int | np.integer], fields: Sequence[str] = ("top_logits",)
    ) -> list[dict[str, Any]]:
        """Some fields of some latents, in the order of `latents`, with `latent` first; JSON-ready.

        Args:
          fields: of LatentRow, but for the contexts; and `label`, what `top_labels` has of it or None.
        Raises: UnknownNameError for another field, or a latent that the SAE does not have.
        """
        latents = [int(latent) for latent in latents]
        if unknown := [name for name in fields if name not in FIELDS]:
            raise UnknownNameError("fields", expected=f"some of {', '.join(FIELDS)}", got=unknown[0], fix="Choose one.")
        columns = [getattr(_Latent, name) for name in fields if name not in ("latent", "label")]
        query = sql.select(_Latent.latent, *columns)
        with self._session() as session:
            rows = session.execute(query.where(_Latent.latent.in_(listed(latents))))
            found = {row.latent: dict(row._mapping) for row in rows}
            if missing := [latent for latent in latents if latent not in found]:
                raise self._unknown(missing[0])
            labels = newest_labels(session, self.info["sae_sha256"], latents) if "label" in fields else {}
        return [found[latent] | ({"label": labels.get(latent)} if "label" in fields else {}) for latent in latents]

    def top_labels(self, latents: Iterable[int | np.integer] | None = None) -> dict[int, str]:
        """Text of the newest label of each of some latents, or of all, that has one; an explanation before others."""
        with self._session() as session:
            return newest_labels(session, self.info["sae_sha256"], latents)

    def explained(self) -> dict[int, float | None]:
        """By latent that has an explanation, how good its best one is (`sae.labels.explanations`).

        The first call reads all labels, each other what is new.
        """
        with self._session() as session:
            return self._explanations.best(session)

    def labels_revision(self) -> tuple[int, int]:
        """What grows whenever a label or a score is written."""
        with self._session() as session:
            return revision(session)

    def labels(self, latent: int) -> list[Label]:
        """What a latent was labelled as: the newest of each kind and author, with its scores."""
        with self._session() as session:
            return labels_of(session, latent, self.info["sae_sha256"])

    def search(self, text: str, limit: int = 50, cut_from: int = 1) -> list[int]:
        """Latents whose words, or one of whose labels, hold all words of `text`; a word may be cut short.

        The first `limit` of them by bm25; where more than RANKED texts match, which such words hardly tell apart, in
        the order in which the texts were written.

        Args:
          cut_from: bytes of a word from which on it may be cut short. All that begins with one letter takes seconds to
            find in an index of a million latents.
        """
        words = {"words": " ".join(_matched(word, cut_from) for word in text.split())}
        if not words["words"]:
            return []
        matching = "FROM search WHERE search MATCH :words"
        many = sql.text(f"SELECT count(*) FROM (SELECT rowid {matching} LIMIT {RANKED + 1})")
        found: dict[int, None] = {}
        with self._session() as session:
            order = "ORDER BY rank" if session.execute(many, words).scalar_one() <= RANKED else ""
            for (latent,) in session.execute(sql.text(f"SELECT latent {matching} {order}"), words):
                if len(found) == limit:
                    break
                found[int(latent)] = None
        return list(found)


def _matched(word: str, cut_from: int) -> str:
    """A word of a search as FTS5 has it."""
    quoted = '"' + word.replace('"', '""') + '"'
    return f"{quoted}*" if len(word.encode()) >= cut_from else quoted


def read_info(path: str | Path) -> dict[str, Any]:
    """What the index in directory `path` is of, whatever its schema. Raises: as `FeatureIndex.open`."""
    engine, info = _opened(path)
    engine.dispose()
    return info


def _opened(path: str | Path) -> tuple[Engine, dict[str, Any]]:
    file = Path(path) / FILE_NAME
    if not file.is_file():
        raise MissingArtefactError(path, expected="a feature index", got="none", fix="Make one with: saekit index")
    query = {"mode": "ro", "uri": "true"}
    if not os.access(file.parent, os.W_OK):
        query["immutable"] = "1"  # a WAL database otherwise needs a file beside it, even to be read
    engine = sql.create_engine(sql.URL.create("sqlite", database=file.absolute().as_uri(), query=query))
    try:
        with orm.Session(engine) as session:
            return engine, {row.key: row.value for row in session.scalars(sql.select(_Info))}
    except (DatabaseError, ValueError) as error:
        raise _not_an_index(path, "a damaged file") from error


def write_index(
    path: Path,
    info: dict[str, Any],
    rows: Iterable[LatentRow],
    vocabulary: Vocabulary = NO_TOKENS,
    places: Float[np.ndarray, "d_sae 2"] | None = None,
) -> None:
    """Write a whole index into directory `path`, in one transaction: until it ends readers see what was there.

    Args:
      places: where each latent lies in a picture of all; in one point, if not given.
    """
    path.mkdir(parents=True, exist_ok=True)
    engine = open_for_writing(path)
    arrays = {name: np.full(info["d_sae"], np.nan, np.float32) for name in COLUMNS}
    try:
        with engine.begin() as connection:
            Base.metadata.drop_all(connection)  # one of another schema may have other columns
            Base.metadata.create_all(connection)
            _renew_search(connection)
            whole = {**info, "schema_version": SCHEMA_VERSION}
            connection.execute(sql.insert(_Info), [{"key": key, "value": value} for key, value in whole.items()])
            remaining = iter(rows)
            while batch := list(islice(remaining, _BATCH)):
                _write_rows(connection, batch)
                for name, figure in COLUMNS.items():
                    arrays[name][[row.latent for row in batch]] = [figure(row) for row in batch]
            tokens = zip((name for name, _ in _VOCABULARY), vocabulary, strict=True)
            where = np.zeros((info["d_sae"], 2), np.float32) if places is None else places
            replace_arrays(connection, {**arrays, **dict(tokens), **dict(zip(_MAP, where.T, strict=True))})
    finally:
        engine.dispose()


def _renew_search(connection: sql.Connection) -> None:
    """A new table of texts with the labels of the old one; much faster than to delete the words from that."""
    if is_there := sql.inspect(connection).has_table("search"):
        for statement in (
            "CREATE TEMP TABLE kept AS SELECT body, kind, latent FROM search WHERE kind != 'words'",
            "DROP TABLE search",
        ):
            connection.execute(sql.text(statement))
    connection.execute(sql.text(_SEARCH))
    if is_there:
        connection.execute(sql.text("INSERT INTO search SELECT body, kind, latent FROM kept"))
        connection.execute(sql.text("DROP TABLE kept"))


def _write_rows(connection: sql.Connection, rows: Sequence[LatentRow]) -> None:
    connection.execute(sql.insert(_Latent), [_columns(row) for row in rows])
    words = [{"latent": row.latent, "body": _words(row)} for row in rows]
    connection.execute(sql.text("INSERT INTO search VALUES (:body, 'words', :latent)"), words)


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

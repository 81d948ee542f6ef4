"""The feature index on disk: one SQLite file (or any SQLAlchemy URL) with a row a latent.

Small values are columns, so that a list can be sorted and filtered in the database; contexts are one blob a latent
(`sae.contexts`). Left out: building an index (`sae.index`) and labels.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Engine, orm
from sqlalchemy.exc import DatabaseError

from activations.errors import CorruptArtefactError, MissingArtefactError, SaekitError, UnknownNameError
from sae.contexts import Context, pack_contexts, unpack_contexts

FILE_NAME = "index.sqlite"
SCHEMA_VERSION = 1


class _Base(orm.DeclarativeBase):
    pass


class _Info(_Base):
    __tablename__ = "info"
    key: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    value: orm.Mapped[Any] = orm.mapped_column(sql.JSON)


class _Latent(_Base):
    __tablename__ = "latents"
    latent: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    density: orm.Mapped[float] = orm.mapped_column(index=True)
    max_activation: orm.Mapped[float] = orm.mapped_column(index=True)
    mean_activation: orm.Mapped[float]
    histogram: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    top_logits: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    bottom_logits: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    neighbours: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    contexts: orm.Mapped[bytes]


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
    """active tokens by activation, in equal bins from 0 to max_activation"""
    top_logits: list[tuple[str, float]]
    """tokens whose logits its decoder row raises most, with the rise per unit of activation"""
    bottom_logits: list[tuple[str, float]]
    """tokens whose logits its decoder row lowers most"""
    neighbours: list[tuple[int, float]]
    """latents with the most similar decoder rows, with the cosine"""
    contexts: list[Context]
    """where it was strongest, at most one context a document, strongest first"""


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
        engine = sql.create_engine(
            sql.URL.create("sqlite", database=file.absolute().as_uri(), query={"mode": "ro", "uri": "true"})
        )
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


def write_index(path: Path, info: dict[str, Any], rows: Iterable[LatentRow]) -> None:
    """Write a whole index into directory `path`, replacing one that is there only once the new one is complete."""
    path.mkdir(parents=True, exist_ok=True)
    partial = path / (FILE_NAME + ".partial")
    partial.unlink(missing_ok=True)
    engine = sql.create_engine(sql.URL.create("sqlite", database=str(partial)))
    _Base.metadata.create_all(engine)
    with orm.Session(engine) as session:
        session.add_all(
            _Info(key=key, value=value) for key, value in {**info, "schema_version": SCHEMA_VERSION}.items()
        )
        session.add_all(_write_rows(rows))
        session.commit()
    engine.dispose()
    partial.replace(path / FILE_NAME)


def _write_rows(rows: Iterable[LatentRow]) -> Iterator[_Latent]:
    for row in rows:
        values = {key: value for key, value in vars(row).items() if key != "contexts"}
        yield _Latent(**json.loads(json.dumps(values)), contexts=pack_contexts(row.contexts))


def _read(row: _Latent) -> LatentRow:
    def pairs(values: list[list[Any]]) -> list[tuple[Any, float]]:
        return [(key, value) for key, value in values]

    return LatentRow(
        latent=row.latent,
        density=row.density,
        max_activation=row.max_activation,
        mean_activation=row.mean_activation,
        histogram=row.histogram,
        top_logits=pairs(row.top_logits),
        bottom_logits=pairs(row.bottom_logits),
        neighbours=pairs(row.neighbours),
        contexts=unpack_contexts(row.contexts),
    )


def _not_an_index(path: str | Path, got: str) -> CorruptArtefactError:
    return CorruptArtefactError(path, expected="a feature index", got=got, fix="Build it again with: saekit index")

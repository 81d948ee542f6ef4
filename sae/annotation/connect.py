"""A database of annotations: how it is opened, what a transaction is, and its errors as those of this project.

SQLite is written in WAL mode by one transaction at a time, which begins as a writing one, so that what it read still
holds when it writes; others wait. A transaction is on the disk when it has ended (`synchronous` is left at FULL).
PostgreSQL is reached by psycopg.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Engine, event, orm
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, ProgrammingError

from activations.errors import ConfigError, SaekitError, StorageError
from sae.annotation.tables import AnnotationBase
from sae.index_db import FILE_NAME
from sae.labels.store import explained
from sae.labels.tables import LabelBase, check_tables

WAIT_SECONDS = 30
"""for another process that writes; a client sends again what took longer"""
_TRIES = 3
_READS = "saekit_reads"
_POSTGRESQL = "postgresql+psycopg"


def connect(url: str | sql.URL) -> Engine:
    """An engine for SQLite or PostgreSQL. Raises: ConfigError for another database, or where psycopg is missing."""
    try:
        parsed = sql.make_url(url)
    except ArgumentError as error:
        raise _refused("a URL", "something else") from error
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(parsed)
    if parsed.drivername not in ("postgresql", _POSTGRESQL):
        raise _refused("one that begins with sqlite: or postgresql:", parsed.drivername)
    try:
        return sql.create_engine(parsed.set(drivername=_POSTGRESQL), pool_pre_ping=True)
    except ImportError as error:
        fix = "Install it with: pip install 'saekit[postgres]'"
        raise ConfigError(
            "annotation database", expected="the package psycopg", got=f"no usable one ({error})", fix=fix
        ) from error


def connect_index(path: Path) -> Engine:
    """An engine for the database of the index in directory `path`."""
    return connect(sql.URL.create("sqlite", database=str(path / FILE_NAME)))


def make_tables(engine: Engine, *, labels: bool) -> None:
    """Make the tables that are not there, with those of labels if wanted.

    Raises: CorruptArtefactError if there is one that lacks a column.
    """
    bases = (AnnotationBase, LabelBase) if labels else (AnnotationBase,)
    for attempt in range(_TRIES):
        try:
            with orm.Session(engine) as session:
                for base in bases:
                    check_tables(session, base)
                    base.metadata.create_all(session.connection())
                session.commit()
            return
        except (IntegrityError, ProgrammingError):  # another process made them at the same time
            if attempt == _TRIES - 1:
                raise


@contextmanager
def reading(engine: Engine) -> Iterator[sql.Connection]:
    """A transaction that only reads, and waits for nobody."""
    with engine.execution_options(**{_READS: True}).begin() as connection:
        yield connection


@contextmanager
def told(engine: Engine) -> Iterator[None]:
    """Errors of the database as those of this project."""
    if engine.dialect.name == "sqlite":
        with explained(Path(engine.url.database or "").parent):
            yield
        return
    try:
        yield
    except SaekitError:
        raise
    except DBAPIError as error:
        said = " ".join(str(error.orig).split())
        fix = "Check that the server runs and that the URL, the user and their rights are right; then try again."
        raise StorageError(
            engine.url.render_as_string(hide_password=True), expected="a database that answers", got=said, fix=fix
        ) from error


def _sqlite(url: sql.URL) -> Engine:
    engine = sql.create_engine(url, connect_args={"timeout": WAIT_SECONDS})

    @event.listens_for(engine, "connect")
    def opened(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # pysqlite otherwise begins and commits by itself
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: sql.Connection) -> None:
        is_read = connection.get_execution_options().get(_READS)
        connection.exec_driver_sql("BEGIN" if is_read else "BEGIN IMMEDIATE")

    return engine


def _refused(expected: str, got: str) -> ConfigError:
    fix = "Give sqlite:///FILE or postgresql://USER@HOST/DATABASE, or none for the index's own database."
    return ConfigError("annotation database", expected=expected, got=got, fix=fix)

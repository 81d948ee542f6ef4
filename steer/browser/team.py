"""Accounts of several people: a name, a role, and a token that is shown once and kept as its hash.

A token is 256 random bits, so its plain SHA-256 tells nobody anything. Names of accounts stay taken after they were
revoked, since labels carry them. Left out: passwords and single sign-on, which a proxy in front can do.
"""

import hashlib
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sql
from sqlalchemy import Engine, orm
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from activations.errors import ConfigError, StorageError, UnknownNameError
from steer.browser.roles import ROLES, Account, Role

NAME = re.compile(r"[\w][\w .@+-]{0,63}")
"""what an account may be called"""


class _Base(orm.DeclarativeBase):
    pass


class _Row(_Base):
    __tablename__ = "accounts"
    name: orm.Mapped[str] = orm.mapped_column(sql.String(64), primary_key=True)
    role: orm.Mapped[str]
    token_sha256: orm.Mapped[str | None] = orm.mapped_column(unique=True)
    created: orm.Mapped[str]


@dataclass(frozen=True)
class Person:
    """An account as a list of them shows it."""

    name: str
    role: Role
    created: str
    """UTC, ISO 8601"""
    is_active: bool
    """False once its token was taken away"""


class Team:
    """The accounts in a database, beside one that is not in it: the admin who started the browser."""

    def __init__(self, url: sql.URL | str, own: Account, own_token: str):
        """Open, or make, the table. Raises: ConfigError for a URL that is none, StorageError for no database there."""
        self._own, self._own_token = own, own_token
        try:
            self._engine: Engine = sql.create_engine(url, hide_parameters=True, pool_pre_ping=True)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            fix = "Write it as SQLAlchemy does, such as postgresql+psycopg://USER@HOST/NAME."
            got = "another, or one whose driver is missing"
            raise ConfigError("database", expected="the URL of a database", got=got, fix=fix) from error
        with _explained():
            _Base.metadata.create_all(self._engine)

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    def account_of(self, token: str) -> Account | None:
        """Whose a token is."""
        if secrets.compare_digest(token.encode(), self._own_token.encode()):
            return self._own
        query = sql.select(_Row.name, _Row.role).where(_Row.token_sha256 == _hash(token))
        with _explained(), self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None or row.role not in ROLES else Account(row.name, row.role)

    def people(self) -> list[Person]:
        """All accounts by name, but for the admin's own."""
        with _explained(), orm.Session(self._engine) as session:
            rows = session.scalars(sql.select(_Row).order_by(_Row.name)).all()
        return [Person(row.name, _role(row.role), row.created, row.token_sha256 is not None) for row in rows]

    def add(self, name: str, role: Role) -> str:
        """Make an account; gives its token, which is nowhere else.

        Raises: ConfigError for a name that is taken, or none.
        """
        if not NAME.fullmatch(name):
            fix = "Begin with a letter or digit; then also space . @ + - are allowed."
            raise ConfigError("name", expected="a name of 1 to 64 characters", got=repr(name[:70]), fix=fix)
        token = secrets.token_urlsafe(32)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        values = {"name": name, "role": _role(role), "token_sha256": _hash(token), "created": created}
        taken = ConfigError("name", expected="one that is free", got=repr(name), fix="Choose another.")
        if name.casefold() in {self._own.name.casefold(), *(each.name.casefold() for each in self.people())}:
            raise taken
        try:
            with _explained(), self._engine.begin() as connection:
                connection.execute(sql.insert(_Row), values)
        except IntegrityError as error:
            raise taken from error
        return token

    def change(self, name: str, role: Role) -> None:
        """Give an account another role. Raises: UnknownNameError."""
        self._update(name, {"role": _role(role)})

    def renew(self, name: str) -> str:
        """A new token for an account, with which the old one ends. Raises: UnknownNameError."""
        token = secrets.token_urlsafe(32)
        self._update(name, {"token_sha256": _hash(token)})
        return token

    def revoke(self, name: str) -> None:
        """Take an account's token away; what it wrote stays. Raises: UnknownNameError."""
        self._update(name, {"token_sha256": None})

    def _update(self, name: str, values: dict[str, str | None]) -> None:
        with _explained(), self._engine.begin() as connection:
            done = connection.execute(sql.update(_Row).where(_Row.name == name).values(values))
        if done.rowcount == 0:
            names = ", ".join(each.name for each in self.people()) or "none"
            raise UnknownNameError(f"account '{name}'", expected=f"one of {names}", got=name, fix="Correct the name.")


def sqlite_url(file: Path) -> sql.URL:
    """A database in a file that only its owner may read."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.touch(mode=0o600)
    return sql.URL.create("sqlite", database=str(file))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _role(role: str) -> Role:
    for each in ROLES:
        if each == role:
            return each
    raise ConfigError("role", expected=f"one of {', '.join(ROLES)}", got=repr(role), fix="Correct it.")


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of the database as those of this project, without its URL, which may hold a password."""
    try:
        yield
    except IntegrityError:
        raise
    except SQLAlchemyError as error:
        got = type(getattr(error, "orig", None) or error).__name__
        fix = "Is it running, and may you write to it?"
        raise StorageError("database of accounts", expected="an answer", got=got, fix=fix) from error

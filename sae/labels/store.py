"""Writing labels, scores and requests into the database of a feature index.

Each label, score and answer is a transaction of its own, so that whatever stops a run loses nothing but requests in
flight. Labels and scores are only ever appended. One process at a time may label an index.
"""

import fcntl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sql
from sqlalchemy import Engine, event, orm
from sqlalchemy.exc import DatabaseError

from activations.errors import CorruptArtefactError, DiskSpaceError, MismatchError, SaekitError, StorageError
from sae.index_db import FILE_NAME, open_for_writing
from sae.labels.chat import Chat, Reply, Request, cost_of, key_of
from sae.labels.tables import LabelBase, LabelRow, RequestRow, Score, ScoreRow, check_tables, scores_of
from sae.parts import parts

LOCK_NAME = ".label.lock"
WAIT_MS = 600_000
"""for another process that writes the index, which takes one transaction"""
_AT_ONCE = 500


class NewLabel(NamedTuple):
    """A label to be."""

    latent: int
    kind: str
    text: str
    author: str
    prompt_sha256: str | None = None
    request: str | None = None


class Spent(NamedTuple):
    """What requests took."""

    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0

    def plus(self, tokens_in: int, tokens_out: int, cost: float) -> "Spent":
        """The same and more."""
        return Spent(self.tokens_in + tokens_in, self.tokens_out + tokens_out, self.cost + cost)


class LabelStore:
    """Access to the labels of one SAE in the database of its index."""

    def __init__(self, engine: Engine, sae_sha256: str, has_tables: bool = True):
        self._engine, self._sae, self._has_tables = engine, sae_sha256, has_tables

    @classmethod
    @contextmanager
    def open(cls, path: Path, sae_sha256: str, *, write: bool = True) -> Iterator["LabelStore"]:
        """Open the labels of the index at `path`; tables that are not there are made, if `write`.

        Raises: MismatchError if another process is labelling it; CorruptArtefactError for tables of something else.
        """
        with explained(path), _locked(path, write):
            engine = open_for_writing(path)
            event.listen(engine, "connect", lambda connection, _: connection.execute(f"PRAGMA busy_timeout={WAIT_MS}"))
            try:
                with orm.Session(engine) as session:
                    has_tables = check_tables(session)
                if write:
                    LabelBase.metadata.create_all(engine)
                yield cls(engine, sae_sha256, has_tables or write)
            finally:
                engine.dispose()

    def add_labels(self, labels: Iterable[NewLabel]) -> int:
        """Append those that are not the newest of their latent, kind and author already; returns how many."""
        newest = self._newest()
        new = [label for label in labels if newest.get((label.latent, label.kind, label.author)) != _told(label)]
        now = _now()
        with self._engine.begin() as connection:
            for part in parts(new, _AT_ONCE):
                rows = [{**label._asdict(), "created": now, "sae_sha256": self._sae} for label in part]
                connection.execute(sql.insert(LabelRow), rows)
            self._refresh_search(connection)
        return len(new)

    def add_label(self, label: NewLabel) -> int:
        """Append a label unless it is the newest of its latent, kind and author already; returns its number."""
        with self._engine.begin() as connection:
            row = connection.execute(
                sql.select(LabelRow.id, LabelRow.text, LabelRow.request)
                .where(LabelRow.latent == label.latent, LabelRow.kind == label.kind, LabelRow.author == label.author)
                .where(LabelRow.sae_sha256 == self._sae)
                .order_by(LabelRow.id.desc())
            ).first()
            if row is not None and (row.text, row.request) == _told(label):
                return row.id
            values = {**label._asdict(), "created": _now(), "sae_sha256": self._sae}
            number = connection.execute(sql.insert(LabelRow), values).inserted_primary_key
            assert number is not None
            connection.execute(
                sql.text("INSERT INTO search VALUES (:text, :kind, :latent)"),
                {"text": label.text, "kind": label.kind, "latent": label.latent},
            )
            return int(number[0])

    def add_scores(self, label: int, latent: int, scores: Sequence[Score]) -> None:
        """Append those that are not there yet."""
        with orm.Session(self._engine) as session:
            known = {_identity(score) for score in scores_of(session, [label])[label]}
        rows = [
            {**asdict(score), "label": label, "latent": latent, "created": _now()}
            for score in scores
            if _identity(score) not in known
        ]
        if rows:
            with self._engine.begin() as connection:
                connection.execute(sql.insert(ScoreRow), rows)

    def scores(self, labels: Iterable[int]) -> dict[int, list[Score]]:
        """The newest scores of labels."""
        with orm.Session(self._engine) as session:
            return scores_of(session, labels)

    def keep(self, chat: Chat, request: Request, reply: Reply) -> None:
        """Write an answer, or why there is none."""
        row = {
            "key": key_of(chat, request.messages),
            "model": chat.name,
            "purpose": request.purpose,
            "latent": request.latent,
            "messages": [message._asdict() for message in request.messages],
            "settings": dict(chat.settings),
            "answer": reply.text,
            "error": reply.error,
            "tokens_in": reply.tokens_in,
            "tokens_out": reply.tokens_out,
            "cost": cost_of(chat, reply.tokens_in, reply.tokens_out),
            "tries": reply.tries,
            "created": _now(),
        }
        with self._engine.begin() as connection:
            earlier = connection.execute(
                sql.select(RequestRow.tokens_in, RequestRow.tokens_out, RequestRow.cost, RequestRow.tries).where(
                    RequestRow.key == row["key"]
                )
            ).first()
            if earlier is not None:  # what failed tries have cost remains spent
                row |= {name: row[name] + value for name, value in earlier._asdict().items()}
                connection.execute(sql.delete(RequestRow).where(RequestRow.key == row["key"]))
            connection.execute(sql.insert(RequestRow), row)

    def answers(self, keys: Iterable[str]) -> dict[str, str]:
        """Raw answers that are kept, by key."""
        found: dict[str, str] = {}
        if self._has_tables:
            with orm.Session(self._engine) as session:
                for part in parts(keys, _AT_ONCE):
                    query = sql.select(RequestRow.key, RequestRow.answer).where(RequestRow.key.in_(part))
                    found |= {key: answer for key, answer in session.execute(query) if answer is not None}
        return found

    def spent(self, models: Iterable[str]) -> Spent:
        """What all requests to some models took, in this run and before."""
        if not self._has_tables:
            return Spent()
        sums = [sql.func.sum(column) for column in (RequestRow.tokens_in, RequestRow.tokens_out, RequestRow.cost)]
        with orm.Session(self._engine) as session:
            query = sql.select(*sums).where(RequestRow.model.in_(list(models)))
            tokens_in, tokens_out, cost = (value or 0 for value in session.execute(query).one())
        return Spent(int(tokens_in), int(tokens_out), float(cost))

    def _newest(self) -> dict[tuple[int, str, str], tuple[str, str | None]]:
        """By latent, kind and author: text and request of the newest label."""
        query = (
            sql.select(LabelRow.latent, LabelRow.kind, LabelRow.author, LabelRow.text, LabelRow.request)
            .where(LabelRow.sae_sha256 == self._sae)
            .order_by(LabelRow.id)
        )
        with orm.Session(self._engine) as session:
            return {(row.latent, row.kind, row.author): (row.text, row.request) for row in session.execute(query)}

    def _refresh_search(self, connection: Any) -> None:
        """Let the full-text search hold the newest labels of this SAE, and no others."""
        connection.execute(sql.text("DELETE FROM search WHERE kind != 'words'"))
        connection.execute(
            sql.text(
                "INSERT INTO search SELECT text, kind, latent FROM labels WHERE id IN "
                "(SELECT max(id) FROM labels WHERE sae_sha256 = :sae GROUP BY latent, kind, author)"
            ),
            {"sae": self._sae},
        )


def _told(label: NewLabel) -> tuple[str, str | None]:
    return label.text, label.request


def _identity(score: Score) -> tuple[Any, ...]:
    return score.method, score.control, score.judge, score.n, score.n_failed, round(score.value, 9), *score.requests


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _locked(path: Path, is_wanted: bool) -> Iterator[None]:
    if not is_wanted:
        yield
        return
    with (path / LOCK_NAME).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            got, fix = "another saekit label that is writing it", "Wait for it, or stop it."
            raise MismatchError(path, expected="no other writer", got=got, fix=fix) from error
        yield


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the database and the disk as those of this project."""
    try:
        yield
    except SaekitError:
        raise
    except DatabaseError as error:
        said, fix = str(error.orig).strip(), "Then run the same command again; every answer is kept."
        if "full" in said:
            raise DiskSpaceError(
                path / FILE_NAME, expected="room to write", got=said, fix=f"Make room. {fix}"
            ) from error
        if "locked" in said or "readonly" in said or "unable to open" in said:
            fix = f"Check its permissions, and that nothing else is writing it. {fix}"
            raise StorageError(path / FILE_NAME, expected="an index to write into", got=said, fix=fix) from error
        fix = "Copy the index again, or build it again with: saekit index"
        raise CorruptArtefactError(path / FILE_NAME, expected="a whole database", got=said, fix=fix) from error
    except PermissionError as error:
        fix = "Check its permissions."
        raise StorageError(path, expected="an index to write into", got=str(error.strerror), fix=fix) from error

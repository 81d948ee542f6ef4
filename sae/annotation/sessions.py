"""Labelling sessions as rows: made, found, counted.

A session's queue is written when it is made, so that it stays as it was when labels and scores change. Left out:
transactions (`sae.annotation.store`) and orders (`sae.annotation.queues`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import sqlalchemy as sql

from activations.errors import MismatchError, UnknownNameError
from sae.annotation.state import DRAFT, PENDING, VERDICTS
from sae.annotation.tables import DraftRow, LeaseRow, QueueRow, SessionRow

_AT_ONCE = 5000


@dataclass(frozen=True)
class LabellingSession:
    """What is to be labelled and how."""

    id: int
    name: str
    queue: dict[str, Any]
    """what the order was made from"""
    seed: int
    annotators_per_latent: int
    blind: bool
    """whether annotators do not see each other's labels"""
    created: str
    """UTC, ISO 8601"""
    unblinded: str | None
    """when blindness ended; None: it has not, or there was none"""

    @property
    def is_blind_now(self) -> bool:
        """Whether annotators' labels are to be hidden from each other."""
        return self.blind and self.unblinded is None


class QueuePlace(NamedTuple):
    """A latent in a queue, and where one annotator stands with it."""

    position: int
    latent: int
    status: str


class Progress(NamedTuple):
    """How far a session is."""

    latents: int
    """in the queue"""
    done: int
    """with as many verdicts as are wanted, or more"""
    begun: int
    """with a verdict, but fewer than are wanted"""
    leased: int
    """with an annotator now"""
    verdicts: int
    wanted: int
    """verdicts when all is done"""
    by_author: dict[str, dict[str, int]]
    """latents by author and status; pending are those that they hold and have typed nothing for"""


_SESSION = [getattr(SessionRow, field.name) for field in fields(LabellingSession)]


def insert_session(
    connection: sql.Connection, values: dict[str, Any], order: Sequence[int], now: str
) -> LabellingSession:
    """Make a session, or find the one that is the same. Raises: MismatchError if another has the name."""
    there = connection.execute(sql.select(SessionRow.__table__).where(SessionRow.name == values["name"])).first()
    if there is None:
        key = connection.execute(sql.insert(SessionRow), {**values, "created": now, "unblinded": None})
        number = int((key.inserted_primary_key or (0,))[0])
        rows = [{"session": number, "position": place, "latent": latent} for place, latent in enumerate(order)]
        for start in range(0, len(rows), _AT_ONCE):
            connection.execute(sql.insert(QueueRow), rows[start : start + _AT_ONCE])
        return session_of(connection, values["sae_sha256"], number)
    latents = connection.scalars(
        sql.select(QueueRow.latent).where(QueueRow.session == there.id).order_by(QueueRow.position)
    )
    if any(getattr(there, name) != value for name, value in values.items()) or [*latents] != [*order]:
        got, fix = "one with other latents or settings", "Choose another name."
        raise MismatchError(f"session {values['name']}", expected="no other of this name", got=got, fix=fix)
    return session_of(connection, values["sae_sha256"], there.id)


def session_of(connection: sql.Connection, sae_sha256: str, number: int, *, lock: bool = False) -> LabellingSession:
    """One session, locked until the transaction ends if wanted. Raises: UnknownNameError."""
    query = sql.select(*_SESSION).where(SessionRow.id == number, SessionRow.sae_sha256 == sae_sha256)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        fix = "Choose one that is listed."
        raise UnknownNameError("labelling session", expected="one of this SAE", got=number, fix=fix)
    return LabellingSession(**row._mapping)


def sessions_of(connection: sql.Connection, sae_sha256: str) -> list[LabellingSession]:
    """All sessions of an SAE, oldest first."""
    query = sql.select(*_SESSION).where(SessionRow.sae_sha256 == sae_sha256).order_by(SessionRow.id)
    return [LabellingSession(**row._mapping) for row in connection.execute(query)]


def open_to(session: sql.ColumnElement[Any] | Any) -> sql.ColumnElement[bool]:
    """Whether what was done in a session is for all to see: it is not blind, or no longer, or was done in none."""
    blind = sql.select(SessionRow.id).where(SessionRow.blind, SessionRow.unblinded.is_(None))
    return session.is_(None) | session.not_in(blind)


def places_of(connection: sql.Connection, session: int, author: str, start: int, n: int) -> list[QueuePlace]:
    """A part of the queue, with where an author stands."""
    mine = (LeaseRow.session == QueueRow.session) & (LeaseRow.latent == QueueRow.latent) & (LeaseRow.author == author)
    query = (
        sql.select(QueueRow.position, QueueRow.latent, LeaseRow.status)
        .join(LeaseRow, mine, isouter=True)
        .where(QueueRow.session == session, QueueRow.position >= start, QueueRow.position < start + n)
        .order_by(QueueRow.position)
    )
    return [QueuePlace(row.position, row.latent, row.status or PENDING) for row in connection.execute(query)]


def count(connection: sql.Connection, session: LabellingSession, now: float) -> Progress:
    """How far a session is."""
    here, places = LeaseRow.session == session.id, session.annotators_per_latent
    n = connection.execute(
        sql.select(sql.func.count()).select_from(QueueRow).where(QueueRow.session == session.id)
    ).scalar_one()
    is_live = (LeaseRow.status == PENDING) & (LeaseRow.expires > now)
    by_author: dict[str, dict[str, int]] = {}
    statuses = (
        sql.select(LeaseRow.author, LeaseRow.status, sql.func.count().label("n"))
        .where(here, is_live | (LeaseRow.status != PENDING))
        .group_by(LeaseRow.author, LeaseRow.status)
    )
    for row in connection.execute(statuses):
        by_author.setdefault(row.author, {})[row.status] = row[2]
    leased = sum(each.get(PENDING, 0) for each in by_author.values())
    for author, typed in _typed(connection, session.id, here & is_live).items():
        by_author[author] |= {DRAFT: typed, PENDING: by_author[author][PENDING] - typed}
    each = sql.select(sql.func.count().label("n")).where(here, LeaseRow.status.in_(VERDICTS))
    given = each.group_by(LeaseRow.latent).subquery()
    is_done = sql.case((given.c.n >= places, 1), else_=0)
    sums = sql.select(sql.func.count(), sql.func.sum(is_done), sql.func.sum(given.c.n)).select_from(given)
    judged, done, verdicts = (int(value or 0) for value in connection.execute(sums).one())
    return Progress(n, done, judged - done, leased, verdicts, n * places, by_author)


def _typed(connection: sql.Connection, session: int, is_held: sql.ColumnElement[bool]) -> dict[str, int]:
    """By author, latents that they hold and have an open draft of."""
    held = connection.execute(sql.select(LeaseRow.author, LeaseRow.latent).where(is_held))
    open_drafts = sql.select(DraftRow.author, DraftRow.latent).where(DraftRow.session == session, DraftRow.is_open)
    typed = {(row.author, row.latent) for row in connection.execute(open_drafts)}
    return dict(Counter(row.author for row in held if (row.author, row.latent) in typed))

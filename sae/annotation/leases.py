"""Handing latents out to annotators, so that none is with more of them than the session wants.

An annotator has one row a session and latent: `pending` while it is theirs to decide until it expires, then what they
decided. A latent's places are taken by verdicts (`sae.annotation.state.VERDICTS`) and by pending rows that have not
expired; a skipped latent frees its place and does not come back to who skipped it. Every change is made under a lock on
the session's row, which on SQLite is the lock on the database. Left out: transactions (`sae.annotation.store`).

A verdict on a latent whose lease has expired is kept all the same, since nothing typed may be lost: then, and only
then, a latent has more verdicts than the session asked for.
"""

import sqlalchemy as sql

from sae.annotation.state import PENDING, VERDICTS
from sae.annotation.tables import LeaseRow, QueueRow

LEASE_SECONDS = 900.0
"""how long a latent is an annotator's, from the last time that they asked for work or typed"""
MAX_LEASED = 200
"""latents that an annotator may hold at once"""


def lease(
    connection: sql.Connection, session: int, places: int, author: str, n: int, now: float, seconds: float
) -> list[int]:
    """Up to n latents that are the author's until `now + seconds`: those they hold, then the next of the queue."""
    mine = _held(connection, session, author, now, n)
    for latent in _free(connection, session, places, author, now, n - len(mine)):
        settle(connection, session, latent, author, PENDING, now + seconds)
        mine.append(latent)
    renew(connection, session, author, mine, now, seconds)
    return mine


def claim(
    connection: sql.Connection, session: int, places: int, author: str, latent: int, now: float, seconds: float
) -> bool:
    """Whether a latent of the session is the author's now, or was decided by them before."""
    row = connection.execute(
        sql.select(LeaseRow.status).where(
            LeaseRow.session == session, LeaseRow.latent == latent, LeaseRow.author == author
        )
    ).first()
    if row is not None and row.status != PENDING:
        return True
    if not has_place(connection, session, places, author, latent, now):
        return False
    settle(connection, session, latent, author, PENDING, now + seconds)
    return True


def has_place(connection: sql.Connection, session: int, places: int, author: str, latent: int, now: float) -> bool:
    """Whether others leave a place at a latent."""
    taken = sql.select(sql.func.count()).where(
        LeaseRow.session == session, LeaseRow.latent == latent, LeaseRow.author != author, _is_taken(now)
    )
    return connection.execute(taken).scalar_one() < places


def settle(connection: sql.Connection, session: int, latent: int, author: str, status: str, expires: float) -> None:
    """Write what became of a latent in an annotator's hands."""
    mine = (LeaseRow.session == session, LeaseRow.latent == latent, LeaseRow.author == author)
    if not connection.execute(sql.update(LeaseRow).where(*mine).values(status=status, expires=expires)).rowcount:
        row = {"session": session, "latent": latent, "author": author, "status": status, "expires": expires}
        connection.execute(sql.insert(LeaseRow), row)


def renew(
    connection: sql.Connection, session: int, author: str, latents: list[int], now: float, seconds: float
) -> None:
    """Let latents that are the author's be so for longer; those that no longer are stay so."""
    connection.execute(
        sql.update(LeaseRow)
        .where(LeaseRow.session == session, LeaseRow.author == author, LeaseRow.latent.in_(latents), _is_live(now))
        .values(expires=now + seconds)
    )


def release(connection: sql.Connection, session: int, author: str) -> int:
    """Give back what the author holds; returns how many latents."""
    mine = (LeaseRow.session == session, LeaseRow.author == author, LeaseRow.status == PENDING)
    return connection.execute(sql.delete(LeaseRow).where(*mine)).rowcount


def _held(connection: sql.Connection, session: int, author: str, now: float, n: int) -> list[int]:
    query = (
        sql.select(QueueRow.latent)
        .join(LeaseRow, (LeaseRow.session == QueueRow.session) & (LeaseRow.latent == QueueRow.latent))
        .where(QueueRow.session == session, LeaseRow.author == author, _is_live(now))
        .order_by(QueueRow.position)
        .limit(n)
    )
    return list(connection.scalars(query))


def _free(connection: sql.Connection, session: int, places: int, author: str, now: float, n: int) -> list[int]:
    if n <= 0:
        return []
    here = (LeaseRow.session == session, LeaseRow.latent == QueueRow.latent)
    of_mine = sql.select(LeaseRow.latent).where(*here, LeaseRow.author == author)
    is_mine = of_mine.where((LeaseRow.status != PENDING) | _is_live(now)).exists()
    taken = sql.select(sql.func.count()).where(*here, LeaseRow.author != author, _is_taken(now)).scalar_subquery()
    query = (
        sql.select(QueueRow.latent)
        .where(QueueRow.session == session, ~is_mine, taken < places)
        .order_by(QueueRow.position)
        .limit(n)
    )
    return list(connection.scalars(query))


def _is_live(now: float) -> sql.ColumnElement[bool]:
    return (LeaseRow.status == PENDING) & (LeaseRow.expires > now)


def _is_taken(now: float) -> sql.ColumnElement[bool]:
    return LeaseRow.status.in_(VERDICTS) | _is_live(now)

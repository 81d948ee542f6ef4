"""Label events as rows: found, checked against what is there, and what people stand behind by them.

Left out: transactions (`sae.annotation.store`) and what follows from events (`sae.annotation.state`).
"""

from dataclasses import fields
from typing import Any, NamedTuple

import sqlalchemy as sql

from activations.errors import MismatchError
from sae.annotation.events import ADJUDICATE, UNDO, Event, NewEvent
from sae.annotation.publish import Said
from sae.annotation.sessions import open_to
from sae.annotation.state import label_of, undone
from sae.annotation.tables import EventRow, SessionRow


class Read(NamedTuple):
    """Which events were read."""

    newest: int
    n: int
    blind: frozenset[int]
    """sessions that were blind then"""


NOTHING_READ = Read(0, 0, frozenset())
_COLUMNS = [getattr(EventRow, field.name) for field in fields(Event)]


def select_events(sae_sha256: str, *, newest_first: bool = False) -> sql.Select[*tuple[Any, ...]]:
    """A query for all events of an SAE."""
    order = EventRow.id.desc() if newest_first else EventRow.id
    return sql.select(*_COLUMNS).where(EventRow.sae_sha256 == sae_sha256).order_by(order)


def read_events(connection: sql.Connection, query: sql.Select[*tuple[Any, ...]]) -> list[Event]:
    """What a query finds."""
    return [Event(**row._mapping) for row in connection.execute(query)]


def events_on(
    connection: sql.Connection, sae_sha256: str, latent: int, author: str, *session: int | None
) -> list[Event]:
    """An author's events on a latent, in a session (or outside of any: None), or in all where none is given."""
    query = select_events(sae_sha256).where(EventRow.latent == latent, EventRow.author == author)
    return read_events(connection, query.where(EventRow.session == session[0]) if session else query)


def earlier(connection: sql.Connection, sae_sha256: str, new: NewEvent) -> Event | None:
    """The event that has a key already. Raises: MismatchError if it is another."""
    found = read_events(connection, sql.select(*_COLUMNS).where(EventRow.key == new.key))
    if not found:
        return None
    differing = [name for name, value in vars(new).items() if getattr(found[0], name) != value]
    is_here = connection.scalar(sql.select(EventRow.sae_sha256).where(EventRow.key == new.key)) == sae_sha256
    if differing or not is_here:
        got = f"that of an event with another {differing[0] if differing else 'SAE'}"
        fix = "Make a new key for each event."
        raise MismatchError("label event: key", expected="a key of its own", got=got, fix=fix)
    return found[0]


def insert_event(connection: sql.Connection, sae_sha256: str, new: NewEvent, now: str) -> Event:
    """Append an event. Raises: MismatchError for an undo of what cannot be undone."""
    if new.action == UNDO:
        _check_undo(events_on(connection, sae_sha256, new.latent, new.author, new.session), new)
    values = {**vars(new), "sae_sha256": sae_sha256, "created": now}
    key = connection.execute(sql.insert(EventRow), values).inserted_primary_key
    assert key is not None
    return Event(**vars(new), id=int(key[0]), created=now)


def said(
    connection: sql.Connection, sae_sha256: str, latent: int | None = None, author: str | None = None
) -> list[Said]:
    """What people stand behind, each on each latent, in sessions that are not blind, and as adjudicators in any."""
    query = select_events(sae_sha256).where(open_to(EventRow.session) | EventRow.action.in_((ADJUDICATE, UNDO)))
    if latent is not None:
        query = query.where(EventRow.latent == latent, EventRow.author == author)
    found: dict[tuple[int, str], list[Event]] = {}
    for event in read_events(connection, query):
        found.setdefault((event.latent, event.author), []).append(event)
    return [Said(*place, label_of(*place, events)) for place, events in sorted(found.items())]


def count_events(connection: sql.Connection, sae_sha256: str) -> tuple[int, int]:
    """Largest number of an event, and how many there are."""
    query = sql.select(sql.func.coalesce(sql.func.max(EventRow.id), 0), sql.func.count())
    newest, n = connection.execute(query.where(EventRow.sae_sha256 == sae_sha256)).one()
    return int(newest), int(n)


def said_since(connection: sql.Connection, sae_sha256: str, before: Read) -> tuple[list[Said], Read]:
    """What people stand behind where something is new since the events that were read before, and what is read now."""
    hidden = sql.select(SessionRow.id).where(SessionRow.sae_sha256 == sae_sha256, ~open_to(SessionRow.id))
    blind = frozenset(connection.scalars(hidden))
    newest, n = count_events(connection, sae_sha256)
    new = sql.select(EventRow.latent, EventRow.author).where(EventRow.sae_sha256 == sae_sha256)
    places = [
        (row.latent, row.author)
        for row in connection.execute(new.where(EventRow.id > before.newest, EventRow.id <= newest))
    ]
    is_whole = blind == before.blind and before.n + len(places) == n and before.n > 0
    if not is_whole:
        return said(connection, sae_sha256), Read(newest, n, blind)
    found = [each for place in sorted(set(places)) for each in said(connection, sae_sha256, *place)]
    return found, Read(newest, n, blind)


def _check_undo(found: list[Event], new: NewEvent) -> None:
    is_there = any(event.id == new.undoes for event in found)
    if not is_there or new.undoes in undone(found):
        got = "one that is undone already" if is_there else f"none with the number {new.undoes}"
        expected = "an event by the same author on the same latent and in the same session"
        fix = "Read the author's last events again."
        raise MismatchError("label event: undoes", expected=expected, got=got, fix=fix)

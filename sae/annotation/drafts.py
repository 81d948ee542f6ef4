"""Drafts: what was typed and not decided on, which outlives a closed tab and a restarted server.

Each browser tab has a row of its own, so that two tabs never overwrite each other, and counts its changes, so that a
change that arrives late does not undo a later one. An event ends the drafts of its tab up to the revision that it
names; if it is undone they are there again. Rows are never removed.
"""

from typing import Any

import sqlalchemy as sql

from sae.annotation.events import Draft, Event
from sae.annotation.tables import DraftRow

NO_SESSION = 0
_COLUMNS = list(DraftRow.__table__.columns)


def save(connection: sql.Connection, sae_sha256: str, draft: Draft, now: str) -> tuple[Draft, bool]:
    """Keep a draft unless a later revision of its tab is kept; returns what is kept, and whether it is this one.

    The second is False as well where the same revision with another text is kept, which is so when a browser has made
    two tabs of one; the client then takes a new name for its tab and sends the draft again.
    """
    place = _place(sae_sha256, draft.session, draft.latent, draft.author, draft.tab)
    there = connection.execute(sql.select(*_COLUMNS).filter_by(**place).with_for_update()).first()
    if there is not None and there.revision >= draft.revision:
        kept = _draft(there)
        return kept, (kept.revision, kept.text, kept.note) == (draft.revision, draft.text, draft.note)
    values = {"revision": draft.revision, "text": draft.text, "note": draft.note, "updated": now, "closed_by": None}
    _write(connection, place, {**values, "is_open": bool(draft.text or draft.note)}, is_new=there is None)
    return Draft(**{**vars(draft), "updated": now}), True


def end(connection: sql.Connection, sae_sha256: str, event: Event) -> None:
    """Close the draft of the event's tab, and see to it that none of its earlier revisions opens it again."""
    if not event.tab:
        return
    place = _place(sae_sha256, event.session, event.latent, event.author, event.tab)
    there = connection.execute(sql.select(*_COLUMNS).filter_by(**place).with_for_update()).first()
    if there is not None and there.revision > event.revision:
        return
    values = {"revision": event.revision, "closed_by": event.id, "is_open": False, "updated": event.created}
    if there is None or (there.revision < event.revision and (event.text or event.note)):
        values |= {"text": event.text, "note": event.note}
    _write(connection, place, values, is_new=there is None)


def reopen(connection: sql.Connection, sae_sha256: str, event: Event, alive: set[int]) -> None:
    """After an undo: drafts that an event ended are open if it is not alive, and closed if it is again."""
    place = _place(sae_sha256, event.session, event.latent, event.author)
    query = sql.select(*_COLUMNS).filter_by(**place).where(DraftRow.closed_by.is_not(None))
    for row in connection.execute(query).all():
        is_open = row.closed_by not in alive and bool(row.text or row.note)
        tab = _place(sae_sha256, event.session, event.latent, event.author, row.tab)
        _write(connection, tab, {"is_open": is_open}, is_new=False)


def opened(
    connection: sql.Connection, sae_sha256: str, author: str, latent: int | None, session: int | None
) -> list[Draft]:
    """Drafts of an author that are open, newest last; of all latents and sessions where none is named."""
    query = sql.select(*_COLUMNS).filter_by(sae_sha256=sae_sha256, author=author, is_open=True)
    if latent is not None:
        query = query.filter_by(latent=latent)
    if session is not None:
        query = query.filter_by(session=session)
    return [_draft(row) for row in connection.execute(query.order_by(DraftRow.updated, DraftRow.revision))]


def _place(sae_sha256: str, session: int | None, latent: int, author: str, tab: str | None = None) -> dict[str, object]:
    place = {"sae_sha256": sae_sha256, "session": session or NO_SESSION, "latent": latent, "author": author}
    return place if tab is None else {**place, "tab": tab}


def _write(connection: sql.Connection, place: dict[str, object], values: dict[str, object], *, is_new: bool) -> None:
    if is_new:
        connection.execute(sql.insert(DraftRow), {**place, **values})
    else:
        connection.execute(sql.update(DraftRow).filter_by(**place).values(values))


def _draft(row: Any) -> Draft:
    return Draft(row.latent, row.author, row.text, row.tab, row.revision, row.session or None, row.note, row.updated)

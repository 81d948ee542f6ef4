"""Labelling sessions on disk: events, drafts and leases of one SAE's latents, by any number of server processes.

    with AnnotationStore.open("index") as store:
        session = store.create_session("first look", order, annotators_per_latent=2, blind=True)
        [latent] = store.lease(session.id, "ann", 1)
        store.record(NewEvent(key, latent, "ann", "accept", session.id, text="rivers"))

1. an event is recorded under the client's key, once, however often it is sent, and with it in one transaction:
2. what became of the lease, whether drafts are ended, and the person's label among those of the index, where the store
   is the index's own database and the session is not blind;
3. everything that is read follows from events by the folds of `sae.annotation.state`.

Left out: orders of queues (`sae.annotation.queues`), agreement, adjudication views, export.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sql
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from activations.errors import ConfigError, UnknownNameError
from sae.annotation import drafts, leases
from sae.annotation.connect import connect, connect_index, make_tables, reading, told
from sae.annotation.events import (
    ADJUDICATE,
    UNDO,
    Draft,
    Event,
    NewEvent,
    check_draft,
    check_event,
    check_name,
    refused_latent,
)
from sae.annotation.log import (
    NOTHING_READ,
    count_events,
    earlier,
    events_on,
    insert_event,
    read_events,
    said,
    said_since,
    select_events,
)
from sae.annotation.pace import Pace, pace
from sae.annotation.publish import check_person, publish
from sae.annotation.sessions import (
    LabellingSession,
    Progress,
    QueuePlace,
    count,
    insert_session,
    open_to,
    places_of,
    session_of,
    sessions_of,
)
from sae.annotation.state import LatentState, alive, state_of
from sae.annotation.tables import EventRow, QueueRow, SessionRow
from sae.index_db import FeatureIndex

_Result = TypeVar("_Result")


class AnnotationStore:
    """Access to the annotations of one SAE. May be shared by threads."""

    def __init__(self, engine: Engine, sae_sha256: str, d_sae: int, index: Path, *, is_own: bool):
        self._engine, self.sae_sha256, self.d_sae, self.index = engine, sae_sha256, d_sae, index
        self.is_own = is_own
        """whether events are in the index's own database"""
        self._people: set[str] = set()
        self._publishing, self._published = threading.Lock(), NOTHING_READ

    @classmethod
    def open(cls, index: str | Path, *, url: str | None = None) -> "AnnotationStore":
        """Open the annotations of the index in a directory; tables that are not there are made.

        Args:
          url: database of a team, `postgresql://…` or `sqlite:///…`; None: the index's own.
        Raises: MissingArtefactError, CorruptArtefactError, ConfigError, StorageError.
        """
        path = Path(index)
        opened = FeatureIndex.open(path)
        opened.close()
        engine = connect_index(path) if url is None else connect(url)
        with told(engine):
            make_tables(engine, labels=url is None)
        return cls(engine, opened.info["sae_sha256"], opened.info["d_sae"], path, is_own=url is None)

    def __enter__(self) -> "AnnotationStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    # Events

    def record(self, event: NewEvent) -> Event:
        """Record an event; the same event under the same key again is not recorded, and has the same answer.

        Raises: ConfigError if it cannot be kept; MismatchError if another event has its key, or if it undoes what is
          not the author's, of the same latent and session, or is undone already; UnknownNameError for a session that
          is not there or does not have the latent; StorageError if the database does not answer: send it again.
        """
        check_event(event, self.d_sae)
        return self._write(lambda connection: self._record(connection, event))

    def history(self, latent: int, *, viewer: str | None = None) -> list[Event]:
        """All events of a latent, in order; for a viewer without those of others in sessions that are blind still."""
        return self.events(latent=latent, viewer=viewer)

    def events(
        self,
        *,
        session: int | None = None,
        latent: int | None = None,
        author: str | None = None,
        viewer: str | None = None,
        after: int = 0,
    ) -> list[Event]:
        """Events in order, of what is named; `after` is the number of an event that is known."""
        query = select_events(self.sae_sha256).where(EventRow.id > after)
        for column, value in ((EventRow.session, session), (EventRow.latent, latent), (EventRow.author, author)):
            query = query if value is None else query.where(column == value)
        if viewer is not None:
            query = query.where((EventRow.author == viewer) | open_to(EventRow.session))
        return self._read(lambda connection: read_events(connection, query))

    def revision(self) -> tuple[int, int]:
        """Largest number of an event, and how many there are: what changes with each; (0, 0) without any."""
        return self._read(lambda connection: count_events(connection, self.sae_sha256))

    def last(self, author: str, n: int = 10, *, session: int | None = None) -> list[tuple[Event, bool]]:
        """The last n events of an author that are no undo, newest first, and whether each still counts."""
        query = select_events(self.sae_sha256, newest_first=True).where(EventRow.author == author)
        query = query if session is None else query.where(EventRow.session == session)

        def read(connection: sql.Connection) -> list[tuple[Event, bool]]:
            found = read_events(connection, query.where(EventRow.action != UNDO).limit(n))
            latents = {event.latent for event in found}
            near = read_events(connection, query.where(EventRow.latent.in_(latents)))
            counting = {event.id for event in alive(near)}
            return [(event, event.id in counting) for event in found]

        return self._read(read)

    def state(self, latent: int, author: str, *, session: int | None = None) -> LatentState:
        """Where an author stands with a latent, in a session or over all."""

        def read(connection: sql.Connection) -> LatentState:
            found = events_on(connection, self.sae_sha256, latent, author, *(() if session is None else (session,)))
            open_drafts = drafts.opened(connection, self.sae_sha256, author, latent, session)
            return state_of(latent, author, found, [(draft.text, draft.note) for draft in open_drafts])

        return self._read(read)

    def people(self) -> set[str]:
        """Authors of any event: a page hides labels of the others while a session is blind."""
        query = sql.select(EventRow.author).where(EventRow.sae_sha256 == self.sae_sha256).distinct()
        return self._read(lambda connection: set(connection.scalars(query)))

    def pace(self, author: str, *, session: int | None = None) -> Pace:
        """How fast an author works."""
        return pace(self.events(author=author, session=session))

    # Drafts

    def save_draft(self, draft: Draft) -> tuple[Draft, bool]:
        """Keep a draft unless its tab has a later revision; returns what is kept, and whether it is this one.

        Where it is not, nothing of the draft is kept: a client that has typed it takes a new name for its tab and sends
        it again. An empty draft is kept and not open. It also renews the author's lease.
        """
        check_draft(draft, self.d_sae)

        def write(connection: sql.Connection) -> tuple[Draft, bool]:
            kept = drafts.save(connection, self.sae_sha256, draft, _now())
            if draft.session is not None:
                now = time.time()
                leases.renew(connection, draft.session, draft.author, [draft.latent], now, leases.LEASE_SECONDS)
            return kept

        return self._write(write)

    def drafts(self, author: str, *, latent: int | None = None, session: int | None = None) -> list[Draft]:
        """An author's open drafts, newest last, of all their tabs."""
        return self._read(lambda connection: drafts.opened(connection, self.sae_sha256, author, latent, session))

    # Sessions

    def create_session(
        self,
        name: str,
        latents: Sequence[int],
        *,
        queue: Mapping[str, Any] | None = None,
        seed: int = 0,
        annotators_per_latent: int = 1,
        blind: bool = False,
    ) -> LabellingSession:
        """Make a session, or find the one that is the same in all of this.

        Args:
          latents: in the order in which they are handed out, each once.
          queue: what the order was made from, for the record, JSON-ready.
        Raises: ConfigError; MismatchError if another session has the name.
        """
        check_name(name, "session name")
        order = [int(latent) for latent in latents]
        for latent in order:
            if not 0 <= latent < self.d_sae:
                raise refused_latent(latent, self.d_sae)
        if not order or len(set(order)) < len(order):
            got = "none" if not order else "one that is there twice"
            raise ConfigError(f"session {name}", expected="latents, each once", got=got, fix="Choose others.")
        if not 1 <= annotators_per_latent <= 100:
            fix = "Choose another number."
            raise ConfigError(
                f"session {name}: annotators_per_latent", expected="1 to 100", got=annotators_per_latent, fix=fix
            )
        values = {
            "name": name, "sae_sha256": self.sae_sha256, "queue": dict(queue or {}), "seed": seed,
            "annotators_per_latent": annotators_per_latent, "blind": blind,
        }  # fmt: skip
        return self._write(lambda connection: insert_session(connection, values, order, _now()))

    def sessions(self) -> list[LabellingSession]:
        """All sessions of this SAE, oldest first."""
        return self._read(lambda connection: sessions_of(connection, self.sae_sha256))

    def session(self, number: int) -> LabellingSession:
        """One session. Raises: UnknownNameError."""
        return self._read(lambda connection: session_of(connection, self.sae_sha256, number))

    def queue(self, session: int, author: str, *, start: int = 0, n: int = 100) -> list[QueuePlace]:
        """Places `start` to `start + n - 1` of a session's queue, and where the author stands with each."""
        self.session(session)
        return self._read(lambda connection: places_of(connection, session, author, start, n))

    def position(self, session: int, latent: int) -> int:
        """Place of a latent in a session's queue, from 0. Raises: UnknownNameError if it is not in it."""
        return self._read(lambda connection: _position(connection, session, latent))

    def lease(self, session: int, author: str, n: int = 1, *, seconds: float = leases.LEASE_SECONDS) -> list[int]:
        """Up to n latents that are the author's for so long: those they hold first, then the next that have a place.

        Fewer, or none, where the queue has no more for this author now. Raises: UnknownNameError, ConfigError.
        """
        check_name(author, "author")
        if not 1 <= n <= leases.MAX_LEASED:
            raise ConfigError("lease: n", expected=f"1 to {leases.MAX_LEASED}", got=n, fix="Ask for fewer.")

        def write(connection: sql.Connection) -> list[int]:
            row = session_of(connection, self.sae_sha256, session, lock=True)
            places = row.annotators_per_latent
            return leases.lease(connection, session, places, author, n, time.time(), seconds)

        return self._write(write)

    def claim(self, session: int, author: str, latent: int, *, seconds: float = leases.LEASE_SECONDS) -> bool:
        """Whether a latent that the author jumps to is theirs now, or was decided by them; False: others have it.

        Raises: UnknownNameError.
        """
        check_name(author, "author")

        def write(connection: sql.Connection) -> bool:
            row = session_of(connection, self.sae_sha256, session, lock=True)
            _position(connection, session, latent)
            places = row.annotators_per_latent
            return leases.claim(connection, session, places, author, latent, time.time(), seconds)

        return self._write(write)

    def release(self, session: int, author: str) -> int:
        """Give back what the author holds and has not decided; returns how many latents. Drafts stay."""

        def write(connection: sql.Connection) -> int:
            session_of(connection, self.sae_sha256, session, lock=True)
            return leases.release(connection, session, author)

        return self._write(write)

    def progress(self, session: int) -> Progress:
        """How far a session is."""

        def read(connection: sql.Connection) -> Progress:
            return count(connection, session_of(connection, self.sae_sha256, session), time.time())

        return self._read(read)

    def unblind(self, session: int) -> LabellingSession:
        """End a session's blindness, for good: annotators see each other's labels, and the index has them."""

        def write(connection: sql.Connection) -> LabellingSession:
            row = session_of(connection, self.sae_sha256, session, lock=True)
            if row.blind and row.unblinded is None:
                update = sql.update(SessionRow).where(SessionRow.id == session).values(unblinded=_now())
                connection.execute(update)
                if self.is_own:
                    publish(connection, self.sae_sha256, said(connection, self.sae_sha256), _now())
            return session_of(connection, self.sae_sha256, session)

        return self._write(write)

    def publish(self) -> int:
        """Bring people's labels into the index that are not there yet, as where events are elsewhere; how many.

        Labels of sessions that are blind still are left out, adjudications are not. Where events are elsewhere only
        those are read of which there is something new since the last call, or all where sessions began or ended to be
        blind since, or where a database numbered events out of order.
        """
        if self.is_own:
            return self._write(lambda c: publish(c, self.sae_sha256, said(c, self.sae_sha256), _now()))
        with self._publishing:
            now_said, read = self._read(lambda connection: said_since(connection, self.sae_sha256, self._published))
            engine = connect_index(self.index)
            try:
                with told(engine):
                    make_tables(engine, labels=True)
                    with engine.begin() as connection:
                        n = publish(connection, self.sae_sha256, now_said, _now())
            finally:
                engine.dispose()
            self._published = read
            return n

    def _record(self, connection: sql.Connection, new: NewEvent) -> Event:
        there = earlier(connection, self.sae_sha256, new)
        if there is not None:
            return there
        session = None
        if new.session is not None:
            session = session_of(connection, self.sae_sha256, new.session, lock=True)
            _position(connection, new.session, new.latent)
        if self.is_own and new.author not in self._people:
            check_person(connection, new.author)
            self._people.add(new.author)
        event = insert_event(connection, self.sae_sha256, new, _now())
        found = events_on(connection, self.sae_sha256, new.latent, new.author, new.session)
        self._follow(connection, event, found, session)
        return event

    def _follow(
        self, connection: sql.Connection, event: Event, found: list[Event], session: LabellingSession | None
    ) -> None:
        """Bring lease, drafts and label to where events by the author on this latent in this session leave them."""
        drafts.end(connection, self.sae_sha256, event)
        if event.action == UNDO:
            drafts.reopen(connection, self.sae_sha256, event, {each.id for each in alive(found)})
        if session is not None and event.action != ADJUDICATE:
            now, status = time.time(), state_of(event.latent, event.author, found).status
            places = session.annotators_per_latent
            is_mine = leases.has_place(connection, session.id, places, event.author, event.latent, now)
            expires = now + leases.LEASE_SECONDS if is_mine else now
            leases.settle(connection, session.id, event.latent, event.author, status, expires)
        if self.is_own:
            now_said = said(connection, self.sae_sha256, event.latent, event.author)
            publish(connection, self.sae_sha256, now_said, event.created)

    def _write(self, work: Callable[[sql.Connection], _Result]) -> _Result:
        """Do work in one transaction; once more where somebody else wrote the same row in between."""
        with told(self._engine):
            try:
                with self._engine.begin() as connection:
                    return work(connection)
            except IntegrityError:
                with self._engine.begin() as connection:
                    return work(connection)

    def _read(self, work: Callable[[sql.Connection], _Result]) -> _Result:
        with told(self._engine), reading(self._engine) as connection:
            return work(connection)


def _position(connection: sql.Connection, session: int, latent: int) -> int:
    query = sql.select(QueueRow.position).where(QueueRow.session == session, QueueRow.latent == latent)
    found = connection.scalar(query)
    if found is None:
        fix = "Choose a latent of its queue."
        raise UnknownNameError(f"session {session}", expected="a latent that is in it", got=latent, fix=fix)
    return int(found)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

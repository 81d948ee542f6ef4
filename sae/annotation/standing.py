"""What people decided of every latent, as arrays for lists: who may see it is kept apart from what it is.

Flow: 1. events that are new since the last look are read, and of their latents all; 2. each person's decision on each
of these is folded twice (`sae.annotation.state`): from all events, for themselves, and from those that are not of
sessions which are blind still, for the others. All events are read again when sessions began or ended to be blind, or
where a database numbered events out of order. Left out: what latents are called.
"""

import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from sae.annotation.events import Event
from sae.annotation.state import ACCEPTED, ADJUDICATED, FLAGGED, REJECTED, SKIPPED, decisions, state_of
from sae.annotation.store import AnnotationStore

DECIDED = (ACCEPTED, REJECTED, FLAGGED, SKIPPED, ADJUDICATED)
"""what a latent may be, one bit each in this order; an annotator's latent may be adjudicated as well"""
MOST_LATENTS = 200
"""whose events are read one latent at a time; of more, all are"""
Marks = UInt8[np.ndarray, " d_sae"]


class Standings:
    """Decisions of all people in one store. May be shared by threads."""

    def __init__(self, store: AnnotationStore):
        self._store, self._lock = store, threading.Lock()
        self._revision, self._blind = (0, 0), frozenset[int]()
        self._own: dict[str, Marks] = {}
        self._open: dict[str, Marks] = {}

    def marks(self, viewer: str, author: str = "") -> tuple[Marks, tuple[int, ...]]:
        """By latent, the bits of what the author (or anybody: "") decided, as the viewer may see it.

        Returns: beside them a key that changes with what they are made from. Raises: StorageError.
        """
        with self._lock:
            self._renew()
            found = np.zeros(self._store.d_sae, np.uint8)
            for name in [author] if author else self._own:
                marks = (self._own if name == viewer else self._open).get(name)
                if marks is not None:
                    found |= marks
            return found, (*self._revision, *sorted(self._blind))

    def authors(self, viewer: str) -> list[str]:
        """Who decided something that the viewer may see, by name. Raises: StorageError."""
        with self._lock:
            self._renew()
            tables = ((name, (self._own if name == viewer else self._open)[name]) for name in self._own)
            return sorted(name for name, marks in tables if marks.any())

    def _blind_sessions(self) -> frozenset[int]:
        return frozenset(session.id for session in self._store.sessions() if session.is_blind_now)

    def _renew(self) -> None:
        revision = self._store.revision()
        blind = self._blind_sessions()
        if (revision, blind) == (self._revision, self._blind):
            return
        newest, n = self._revision
        new = self._store.events(after=newest) if blind == self._blind else []
        latents = {event.latent for event in new}
        if blind == self._blind and n + len(new) == revision[1] and len(latents) <= MOST_LATENTS:
            events = [event for latent in sorted(latents) for event in self._store.events(latent=latent)]
        else:
            self._own, self._open = {}, {}
            events = self._store.events()
        # A session is made before its events, and so those that were read are of sessions that are read now.
        self._blind = self._blind_sessions()
        self._revision = revision if self._blind == blind else (0, 0)
        by_place: dict[tuple[int, str], list[Event]] = {}
        for event in events:
            by_place.setdefault((event.latent, event.author), []).append(event)
        for (latent, author), each in by_place.items():
            seen = [event for event in each if event.session not in self._blind]
            for table, of in ((self._own, each), (self._open, seen)):
                marks = table.setdefault(author, np.zeros(self._store.d_sae, np.uint8))
                marks[latent] = _bits(latent, author, of)


def bits_of(status: str) -> int:
    """The bits of a status; "decided" is any of them."""
    return (1 << len(DECIDED)) - 1 if status == "decided" else 1 << DECIDED.index(status)


def _bits(latent: int, author: str, events: Sequence[Event]) -> int:
    status = state_of(latent, author, events).status
    bits = bits_of(status) if status in DECIDED else 0
    return bits | (bits_of(ADJUDICATED) if decisions(events) else 0)

"""What follows from label events: pure folds, so that nothing is known that the events do not say.

1. an event is alive unless an undo that is alive itself takes it back;
2. of an annotator and a latent the last alive event decides that is neither an undo nor an adjudication;
3. of a latent the last alive adjudication decides, whoever made it;
4. a draft that is open counts only where nothing was decided.

So an undo restores exactly what was before, and an undo of that undo what was after.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sae.annotation.events import ACCEPT, ADJUDICATE, EDIT, FLAG, REJECT, SKIP, UNDO, Event

PENDING, DRAFT, ACCEPTED, REJECTED, SKIPPED, FLAGGED, ADJUDICATED = (
    "pending", "draft", "accepted", "rejected", "skipped", "flagged", "adjudicated",
)  # fmt: skip
STATUSES = (PENDING, DRAFT, ACCEPTED, REJECTED, SKIPPED, FLAGGED, ADJUDICATED)
VERDICTS = (ACCEPTED, REJECTED, FLAGGED)
"""what an annotator says of a latent, as opposed to nothing; it takes one of the latent's places in a session"""
_STATUS_AFTER = {
    ACCEPT: ACCEPTED, EDIT: ACCEPTED, REJECT: REJECTED, SKIP: SKIPPED, FLAG: FLAGGED, ADJUDICATE: ADJUDICATED,
}  # fmt: skip


@dataclass(frozen=True)
class LatentState:
    """Where an annotator stands with a latent."""

    latent: int
    author: str
    session: int | None
    """of the deciding event"""
    status: str
    """one of STATUSES"""
    text: str = ""
    """as the annotator left it, or of the draft"""
    note: str = ""
    event: int | None = None
    """number of the deciding event"""
    decided: str | None = None
    """when"""

    @property
    def label(self) -> str:
        """The text that the annotator stands behind; "" where there is none."""
        return self.text if self.status in (ACCEPTED, ADJUDICATED) else ""


def undone(events: Iterable[Event]) -> set[int]:
    """Numbers of events that an undo takes back which is not taken back itself."""
    dead: set[int] = set()
    for event in sorted(events, key=lambda event: event.id, reverse=True):
        if event.action == UNDO and event.undoes is not None and event.id not in dead:
            dead.add(event.undoes)
    return dead


def alive(events: Iterable[Event]) -> list[Event]:
    """Those that no undo takes back, by number, undos left out."""
    ordered = sorted(events, key=lambda event: event.id)
    dead = undone(ordered)
    return [event for event in ordered if event.action != UNDO and event.id not in dead]


def state_of(latent: int, author: str, events: Sequence[Event], drafts: Sequence[tuple[str, str]] = ()) -> LatentState:
    """Where an annotator stands with a latent.

    Args:
      events: all by this annotator on this latent, in one session or in all.
      drafts: text and note of those that are open, newest last.
    """
    deciding = [event for event in alive(events) if event.action != ADJUDICATE]
    if deciding:
        return _state(deciding[-1])
    text, note = drafts[-1] if drafts else ("", "")
    return LatentState(latent, author, None, DRAFT if drafts else PENDING, text, note)


def states(events: Iterable[Event]) -> dict[int, dict[str, LatentState]]:
    """What annotators say, by latent and author, over all the events given; where nothing is decided, nothing."""
    return {
        latent: {author: state_of(latent, author, each) for author, each in by_author.items()}
        for latent, by_author in _grouped(event for event in alive(events) if event.action != ADJUDICATE).items()
    }


def decisions(events: Iterable[Event]) -> dict[int, LatentState]:
    """The newest alive adjudication of each latent that has one."""
    newest = {event.latent: event for event in alive(events) if event.action == ADJUDICATE}
    return {latent: _state(event) for latent, event in sorted(newest.items())}


def label_of(latent: int, author: str, events: Sequence[Event]) -> str:
    """The text that a person stands behind, from all their events on a latent: as adjudicator before as annotator."""
    decided = decisions(events).get(latent)
    return decided.text if decided else state_of(latent, author, events).label


def _grouped(events: Iterable[Event]) -> dict[int, dict[str, list[Event]]]:
    found: dict[int, dict[str, list[Event]]] = {}
    for event in events:
        found.setdefault(event.latent, {}).setdefault(event.author, []).append(event)
    return dict(sorted(found.items()))


def _state(event: Event) -> LatentState:
    status = _STATUS_AFTER[event.action]
    return LatentState(
        event.latent, event.author, event.session, status, event.text, event.note, event.id, event.created
    )

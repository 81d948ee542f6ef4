"""What annotators do, as values, and what of it is accepted from a page.

    accept      the label stands, as `text` has it: as it was seen, or changed
    edit        the label reads `text` now; counts as accepted
    reject      what was seen is wrong; `text` may say what the annotator had typed
    skip        no verdict, and another annotator may have the latent
    flag        somebody has to look at it; `note` says why
    undo        an earlier event counts no longer; an undo of an undo brings it back
    adjudicate  what the latent's label is from now on, whatever annotators said; "" is: none of them

The client makes the `key`, and sends an event again under the same key until it has an answer. Left out: what follows
from events (`sae.annotation.state`).
"""

from dataclasses import dataclass

from activations.errors import ConfigError, SaekitError
from sae.labels.words import one_line

ACCEPT, REJECT, SKIP, FLAG, EDIT, UNDO, ADJUDICATE = "accept", "reject", "skip", "flag", "edit", "undo", "adjudicate"
ACTIONS = (ACCEPT, REJECT, SKIP, FLAG, EDIT, UNDO, ADJUDICATE)
MAX_TEXT, MAX_NAME, MAX_KEY = 10_000, 100, 200
"""characters of a text or note, of a name, of a key or tab"""
MAX_INTEGER = (1 << 53) - 1
"""largest whole number that every client can tell from the next"""


@dataclass(frozen=True)
class NewEvent:
    """An event as a client sends it."""

    key: str
    """made by the client, another one for each event, such as a UUID"""
    latent: int
    author: str
    action: str
    """one of ACTIONS"""
    session: int | None = None
    """number of the labelling session; None where it was done outside of one"""
    text: str = ""
    """label as the annotator leaves it"""
    note: str = ""
    seen_label: int | None = None
    """number of the label (`labels.id`) that was accepted, rejected or changed"""
    seen_text: str | None = None
    """its text"""
    undoes: int | None = None
    """number of the event that an undo takes back"""
    tab: str = ""
    """browser tab that it comes from, whose draft it ends"""
    revision: int = 0
    """of the tab's draft, when the event was sent"""


@dataclass(frozen=True)
class Event(NewEvent):
    """An event as it was recorded."""

    id: int = 0
    """events of a latent and author are numbered in the order in which they were recorded"""
    created: str = ""
    """UTC, ISO 8601, by the clock of the server"""


@dataclass(frozen=True)
class Draft:
    """What was typed in a browser tab and not decided on."""

    latent: int
    author: str
    text: str
    tab: str
    """made by the client, another one for each tab"""
    revision: int
    """counted up by the tab with each change, from 1"""
    session: int | None = None
    note: str = ""
    updated: str = ""
    """UTC, ISO 8601, by the clock of the server"""


def check_event(event: NewEvent, d_sae: int) -> None:
    """Raise ConfigError if an event is not one that can be kept."""
    check_name(event.author, "author")
    _check_text(event.key, "key", MAX_KEY, is_needed=True)
    _check_common(event.latent, event.text, event.note, event.tab, event.revision, d_sae)
    _check_text(event.seen_text or "", "seen_text", MAX_TEXT)
    for name in ("session", "seen_label", "undoes"):
        _check_integer(getattr(event, name) or 0, name)
    if event.action not in ACTIONS:
        raise _refused("action", f"one of {', '.join(ACTIONS)}", event.action)
    if event.action in (ACCEPT, EDIT) and not event.text.strip():
        raise _refused("text", f"a label to {event.action}", "none", "Send the label as it shall read.")
    if (event.action == UNDO) != (event.undoes is not None):
        raise _refused("undoes", "the number of an event for undo, and for nothing else", event.undoes)


def check_draft(draft: Draft, d_sae: int) -> None:
    """Raise ConfigError if a draft is not one that can be kept."""
    check_name(draft.author, "author")
    _check_common(draft.latent, draft.text, draft.note, draft.tab, draft.revision, d_sae)
    _check_integer(draft.session or 0, "session")
    _check_text(draft.tab, "tab", MAX_KEY, is_needed=True)


def check_name(name: str, field: str) -> None:
    """Raise ConfigError unless a name is one line of 1 to MAX_NAME characters that people can read."""
    if not name or len(name) > MAX_NAME or one_line(name, MAX_NAME) != name:
        raise _refused(field, f"one line of 1 to {MAX_NAME} characters", one_line(repr(name), MAX_NAME))


def refused_latent(latent: int, d_sae: int) -> SaekitError:
    """The error for a latent that the SAE does not have."""
    return _refused("latent", f"0 to {d_sae - 1}", latent, "Choose a latent of this SAE.")


def _check_common(latent: int, text: str, note: str, tab: str, revision: int, d_sae: int) -> None:
    if not 0 <= latent < d_sae:
        raise refused_latent(latent, d_sae)
    _check_text(text, "text", MAX_TEXT)
    _check_text(note, "note", MAX_TEXT)
    _check_text(tab, "tab", MAX_KEY)
    _check_integer(revision, "revision")


def _check_text(text: str, field: str, limit: int, *, is_needed: bool = False) -> None:
    if len(text) > limit or (is_needed and not text):
        raise _refused(field, f"{1 if is_needed else 0} to {limit} characters", f"{len(text)} characters")
    if "\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _refused(field, "text", "a character that no database holds (U+0000 or half a surrogate pair)")


def _check_integer(value: int, field: str) -> None:
    if not 0 <= value <= MAX_INTEGER:
        raise _refused(field, f"0 to {MAX_INTEGER}", value)


def _refused(field: str, expected: str, got: object, fix: str = "Correct what the client sends.") -> ConfigError:
    return ConfigError(f"label event: {field}", expected=expected, got=got, fix=fix)

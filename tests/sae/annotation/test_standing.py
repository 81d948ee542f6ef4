"""What people decided, kept up to date with events: the same as from all events, and nothing of others while blind."""

import random
from pathlib import Path

import numpy as np
import pytest

from sae.annotation.events import NewEvent
from sae.annotation.standing import DECIDED, Marks, Standings, bits_of
from sae.annotation.state import ADJUDICATED, decisions, states
from sae.annotation.store import AnnotationStore

from .conftest import D_SAE

PEOPLE = ("ann", "bob", "cleo")


def plain(store: AnnotationStore, viewer: str, author: str) -> Marks:
    """From all events that a viewer may see."""
    seen = [event for event in store.events(viewer=viewer) if author in ("", event.author)]
    found = np.zeros(D_SAE, np.uint8)
    for latent, by_author in states(seen).items():
        for state in by_author.values():
            found[latent] |= bits_of(state.status)
    for latent in decisions(seen):
        found[latent] |= bits_of(ADJUDICATED)
    return found


def test_marks_are_those_of_all_events_that_one_may_see(store: AnnotationStore) -> None:
    rng, standings = random.Random(0), Standings(store)
    order = list(range(D_SAE))
    sessions = [store.create_session(name, order, annotators_per_latent=3, blind=name != "open").id
                for name in ("open", "blind", "later")]  # fmt: skip
    done = []
    for i in range(120):
        author = rng.choice(PEOPLE)
        if done and rng.random() < 0.2:
            old = done.pop(rng.randrange(len(done)))
            event = NewEvent(f"k{i}", old.latent, old.author, "undo", old.session, undoes=old.id)
        else:
            action = rng.choice(["accept", "reject", "flag", "skip", "adjudicate"])
            event = NewEvent(f"k{i}", rng.randrange(8), author, action, rng.choice([None, *sessions]), text=f"text {i}")
        recorded = store.record(event)
        if recorded.action != "undo":
            done.append(recorded)
        if i == 90:
            store.unblind(sessions[2])
        if i % 4 == 0 or i > 85:
            for viewer in (*PEOPLE, "dora"):
                for name in ("", *PEOPLE, "nobody"):
                    found, _ = standings.marks(viewer, name)
                    np.testing.assert_array_equal(found, plain(store, viewer, name), f"{i}: {viewer} of {name}")
                assert standings.authors(viewer) == [name for name in PEOPLE if plain(store, viewer, name).any()]


def test_the_key_changes_with_events_and_with_blindness(store: AnnotationStore) -> None:
    session, standings = store.create_session("blind", [1, 2], blind=True).id, Standings(store)
    keys = [standings.marks("ann")[1]]
    store.record(NewEvent("a", 1, "bob", "reject", session))
    keys.append(standings.marks("ann")[1])
    store.unblind(session)
    keys.append(standings.marks("ann")[1])
    assert len(set(keys)) == 3


def test_only_what_is_new_is_read(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AnnotationStore.open(index) as store:
        for latent in range(30):
            store.record(NewEvent(f"k{latent}", latent, "ann", "reject"))
        standings = Standings(store)
        standings.marks("ann")
        read: list[object] = []
        events = store.events
        monkeypatch.setattr(store, "events", lambda **of: read.append(of) or events(**of))
        standings.marks("ann")
        assert read == []
        store.record(NewEvent("new", 3, "ann", "accept", text="rivers"))
        assert standings.marks("ann")[0][3] == bits_of("accepted")
        assert read == [{"after": 30}, {"latent": 3}]


def test_a_bit_a_status() -> None:
    assert sorted(bits_of(status) for status in DECIDED) == [1, 2, 4, 8, 16]
    assert bits_of("decided") == 31

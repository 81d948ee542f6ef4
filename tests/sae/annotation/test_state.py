"""The folds, against slow plain ones, on any history that can be."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sae.annotation.events import ADJUDICATE, UNDO, Event
from sae.annotation.state import alive, decisions, label_of, state_of, states, undone

DECIDING = ("accept", "edit", "reject", "skip", "flag", "adjudicate")
STATUS = {"accept": "accepted", "edit": "accepted", "reject": "rejected", "skip": "skipped", "flag": "flagged"}


@st.composite
def histories(draw: Any) -> list[Event]:
    """Events of two annotators on two latents; undos of events that count at that time."""
    events: list[Event] = []
    for number in range(1, draw(st.integers(0, 14)) + 1):
        standing = [event for event in events if event.id not in plainly_undone(events)]
        if standing and draw(st.booleans()):
            target = draw(st.sampled_from(standing))
            event = Event("k", target.latent, target.author, UNDO, id=number, undoes=target.id)
        else:
            latent, author = draw(st.integers(0, 1)), draw(st.sampled_from("ab"))
            event = Event("k", latent, author, draw(st.sampled_from(DECIDING)), text=f"t{number}", id=number)
        events.append(event)
    return events


def plainly_undone(events: list[Event]) -> set[int]:
    """By going forward: an undo strikes its target out, and if that is an undo, brings back what it struck out."""
    struck: set[int] = set()
    by_number = {event.id: event for event in events}

    def strike(event: Event, is_out: bool) -> None:
        (struck.add if is_out else struck.discard)(event.id)
        if event.action == UNDO:
            strike(by_number[event.undoes or 0], not is_out)

    for event in events:
        if event.action == UNDO:
            strike(by_number[event.undoes or 0], True)
    return struck


@given(histories())
def test_what_is_undone_is_what_a_walk_forward_finds(events: list[Event]) -> None:
    assert undone(events) == plainly_undone(events)
    assert [event.id for event in alive(events)] == [
        event.id for event in events if event.id not in plainly_undone(events) and event.action != UNDO
    ]


@given(histories())
def test_the_last_event_that_counts_decides(events: list[Event]) -> None:
    said, decided = states(events), decisions(events)
    for latent in (0, 1):
        here = [event for event in alive(events) if event.latent == latent]
        judged = [event for event in here if event.action == ADJUDICATE]
        assert (decided[latent].text if judged else None) == (judged[-1].text if judged else None)
        for author in "ab":
            mine = [event for event in here if event.author == author and event.action != ADJUDICATE]
            state = state_of(latent, author, [e for e in events if (e.latent, e.author) == (latent, author)])
            assert (author in said.get(latent, {})) == bool(mine)
            assert state.status == (STATUS[mine[-1].action] if mine else "pending")
            if mine:
                assert said[latent][author] == state
                assert (state.text, state.event) == (mine[-1].text, mine[-1].id)
                assert state.label == (state.text if state.status == "accepted" else "")


@given(histories())
def test_undoing_backwards_leads_through_every_earlier_state(events: list[Event]) -> None:
    forward = [event for event in events if event.action not in (UNDO, ADJUDICATE) and event.author == "a"]
    before = [states(forward[:n]) for n in range(len(forward) + 1)]
    number = len(events)
    for n in range(len(forward), 0, -1):
        assert states(forward) == before[n]
        number += 1
        last = forward[n - 1]
        forward.append(Event("k", last.latent, "a", UNDO, id=number, undoes=last.id))
    assert states(forward) == {}


def test_a_draft_counts_until_something_is_decided() -> None:
    drafts = [("old", ""), ("new", "why")]
    state = state_of(1, "a", [], drafts)
    assert (state.status, state.text, state.note, state.label) == ("draft", "new", "why", "")
    assert state_of(1, "a", [Event("k", 1, "a", "skip", id=1)], drafts).status == "skipped"


def test_a_person_stands_behind_what_they_adjudicated_rather_than_what_they_said_before() -> None:
    events = [Event("k", 1, "a", "accept", text="x", id=1), Event("l", 1, "a", "adjudicate", text="y", id=2)]
    assert label_of(1, "a", events[:1]) == "x"
    assert label_of(1, "a", events) == "y"
    assert states(events)[1]["a"].text == "x"

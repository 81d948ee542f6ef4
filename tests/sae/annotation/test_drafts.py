"""What is typed is kept through two tabs, late changes, decisions and undos."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.errors import ConfigError
from sae.annotation.connect import connect, make_tables
from sae.annotation.events import Draft, NewEvent
from sae.annotation.store import AnnotationStore
from tests.sae.annotation.conftest import Do

DRAFT = Draft(3, "ann", "riv", "t1", 1)


def texts(store: AnnotationStore, **of: Any) -> list[str]:
    return [draft.text for draft in store.drafts("ann", **of)]


def test_a_draft_is_the_newest_revision_whatever_arrives_late(store: AnnotationStore) -> None:
    assert store.save_draft(DRAFT)[1]
    assert store.save_draft(replace(DRAFT, text="rivers", revision=3))[1]
    kept, is_this_one = store.save_draft(replace(DRAFT, text="rive", revision=2))
    assert (kept.text, kept.revision, is_this_one) == ("rivers", 3, False)
    assert store.save_draft(replace(DRAFT, text="rivers", revision=3))[1]
    assert texts(store) == ["rivers"]
    assert store.state(3, "ann").status == "draft"


def test_two_tabs_do_not_overwrite_each_other(store: AnnotationStore) -> None:
    store.save_draft(DRAFT)
    store.save_draft(replace(DRAFT, text="brook", tab="t2"))
    assert sorted(texts(store)) == ["brook", "riv"]
    store.record(NewEvent("k", 3, "ann", "accept", text="river", tab="t1", revision=2))
    assert texts(store) == ["brook"]


def test_two_tabs_of_one_name_are_told(store: AnnotationStore) -> None:
    store.save_draft(DRAFT)
    kept, is_this_one = store.save_draft(replace(DRAFT, text="another"))
    assert (kept.text, is_this_one) == ("riv", False)


def test_drafts_are_by_latent_session_and_author(store: AnnotationStore) -> None:
    session = store.create_session("s", [3, 4]).id
    store.save_draft(DRAFT)
    store.save_draft(replace(DRAFT, text="here", session=session))
    store.save_draft(replace(DRAFT, text="four", latent=4))
    store.save_draft(replace(DRAFT, text="bobs", author="bob"))
    assert sorted(texts(store)) == ["four", "here", "riv"]
    assert texts(store, latent=4) == ["four"]
    assert texts(store, session=session) == ["here"]
    assert store.state(3, "ann", session=session).text == "here"


def test_an_event_ends_the_draft_of_its_tab_for_good(store: AnnotationStore) -> None:
    store.save_draft(DRAFT)
    store.record(NewEvent("k", 3, "ann", "accept", text="river", tab="t1", revision=2))
    assert not store.save_draft(replace(DRAFT, text="rive", revision=2))[1]
    assert texts(store) == []
    assert store.save_draft(replace(DRAFT, text="rivers after all", revision=3))[1]
    assert texts(store) == ["rivers after all"]


def test_what_was_typed_after_an_event_was_sent_stays(store: AnnotationStore) -> None:
    store.save_draft(replace(DRAFT, text="more", revision=5))
    store.record(NewEvent("k", 3, "ann", "reject", tab="t1", revision=4))
    assert texts(store) == ["more"]


def test_an_undo_opens_the_draft_again_and_an_undo_of_it_closes_it(store: AnnotationStore, do: Do) -> None:
    store.save_draft(DRAFT)
    event = do(3, "ann", "reject", tab="t1", revision=2)
    assert texts(store) == []
    undo = do(3, "ann", "undo", undoes=event.id)
    assert texts(store) == ["riv"]
    do(3, "ann", "undo", undoes=undo.id)
    assert texts(store) == []


def test_an_emptied_draft_is_none(store: AnnotationStore) -> None:
    store.save_draft(DRAFT)
    assert store.save_draft(replace(DRAFT, text="", revision=2))[1]
    assert texts(store) == []
    assert store.save_draft(replace(DRAFT, text="", note="why", revision=3))[1]
    assert [draft.note for draft in store.drafts("ann")] == ["why"]


@pytest.mark.parametrize("change", [{"tab": ""}, {"revision": -1}, {"latent": 40}, {"text": "\x00"}, {"author": ""}])
def test_a_draft_that_cannot_be_kept_is_refused(own: AnnotationStore, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        own.save_draft(replace(DRAFT, **change))


@settings(max_examples=25)
@given(st.permutations(range(1, 7)), st.lists(st.integers(1, 6), max_size=4))
def test_the_order_of_arrival_does_not_matter(order: list[int], again: list[int]) -> None:
    with in_memory() as store:
        for revision in [*order, *again]:
            store.save_draft(replace(DRAFT, text=f"t{revision}", revision=revision))
        assert texts(store) == ["t6"]


def in_memory() -> AnnotationStore:
    """A store of its own for each example."""
    engine = connect("sqlite:///:memory:")
    make_tables(engine, labels=False)
    return AnnotationStore(engine, "5ae", 40, Path("nowhere"), is_own=False)

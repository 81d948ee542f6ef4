"""Events are kept once, undone exactly, and what follows from them follows at once."""

import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from activations.errors import (
    ConfigError,
    CorruptArtefactError,
    MismatchError,
    MissingArtefactError,
    StorageError,
    UnknownNameError,
)
from sae.annotation import log
from sae.annotation.events import Draft, Event, NewEvent
from sae.annotation.state import LatentState
from sae.annotation.store import AnnotationStore
from sae.index_db import FILE_NAME, FeatureIndex, write_index
from sae.labels.store import LabelStore, NewLabel
from tests.sae.annotation.conftest import D_SAE, SAE, Do, doing, row

ACCEPT = NewEvent("k1", 3, "ann", "accept", text="rivers", note="sure", seen_label=7, seen_text="river", tab="t")


def test_an_event_is_recorded_once_however_often_it_is_sent(store: AnnotationStore) -> None:
    first = store.record(ACCEPT)
    assert {name: getattr(first, name) for name in vars(ACCEPT)} == vars(ACCEPT)
    assert store.record(ACCEPT) == first
    assert store.history(3) == [first]
    with pytest.raises(MismatchError, match="another text"):
        store.record(replace(ACCEPT, text="brooks"))
    assert store.history(3) == [first]


def test_the_same_event_from_many_threads_at_once_is_one(store: AnnotationStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(store.record, [ACCEPT] * 24))
    assert len({event.id for event in found}) == 1
    assert len(store.events()) == 1


def test_events_outlive_the_server_and_a_new_index(index: Path, url: str | None) -> None:
    with AnnotationStore.open(index, url=url) as store:
        first = store.record(ACCEPT)
        store.save_draft(Draft(4, "ann", "half a tho", "t", 1))
    write_index(index, {"sae_sha256": SAE, "d_sae": D_SAE}, [row(latent) for latent in range(D_SAE)])
    with AnnotationStore.open(index, url=url) as store:
        assert store.history(3) == [first]
        assert store.state(4, "ann").text == "half a tho"


def test_events_are_those_of_one_sae(store: AnnotationStore, index: Path, url: str | None) -> None:
    session = store.create_session("s", [3])
    store.record(ACCEPT)
    write_index(index, {"sae_sha256": "other", "d_sae": D_SAE}, [row(3)])
    with AnnotationStore.open(index, url=url) as other:
        assert other.events() == []
        assert other.sessions() == []
        with pytest.raises(MismatchError, match="another SAE"):
            other.record(ACCEPT)
        with pytest.raises(UnknownNameError, match="labelling session"):
            other.lease(session.id, "ann")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latent": D_SAE}, "latent"),
        ({"latent": -1}, "latent"),
        ({"author": ""}, "author"),
        ({"author": "a\nb"}, "author"),
        ({"author": "a\u202eb"}, "author"),
        ({"author": "a" * 101}, "author"),
        ({"action": "delete"}, "action"),
        ({"key": ""}, "key"),
        ({"key": "k" * 201}, "key"),
        ({"text": "  "}, "text"),
        ({"text": "a\x00b"}, "U\\+0000"),
        ({"note": "\ud800"}, "surrogate"),
        ({"text": "a" * 10_001}, "text"),
        ({"seen_label": 1 << 70}, "seen_label"),
        ({"revision": -1}, "revision"),
        ({"undoes": 1}, "undoes"),
        ({"action": "undo"}, "undoes"),
    ],
)
def test_what_cannot_be_kept_is_refused(own: AnnotationStore, change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        own.record(replace(ACCEPT, **change))  # type: ignore[arg-type]
    assert own.events() == []


def test_any_text_that_can_be_kept_comes_back_as_it_was(store: AnnotationStore) -> None:
    text = "'; DROP TABLE leases; -- \u2028 é \U0001f30a <script> \x1b[31m\r\n\t"
    assert store.record(replace(ACCEPT, text=text)).text == text
    assert store.history(3)[0].text == text


def test_an_undo_restores_what_was_and_an_undo_of_it_what_came_after(store: AnnotationStore, do: Do) -> None:
    store.record(ACCEPT)
    before = store.state(3, "ann")
    edit = do(3, "ann", "edit", "brooks")
    after = store.state(3, "ann")
    assert (before.text, after.text) == ("rivers", "brooks")
    undo = do(3, "ann", "undo", undoes=edit.id)
    assert store.state(3, "ann") == before
    with pytest.raises(MismatchError, match="undone already"):
        do(3, "ann", "undo", undoes=edit.id)
    do(3, "ann", "undo", undoes=undo.id)
    assert store.state(3, "ann") == after
    do(3, "ann", "undo", undoes=edit.id)
    assert store.state(3, "ann") == before


def test_only_ones_own_events_of_the_same_latent_and_session_are_undone(store: AnnotationStore, do: Do) -> None:
    event = do(3, "ann", "flag")
    session = store.create_session("s", [3])
    for latent, author, more in ((3, "bob", {}), (4, "ann", {}), (3, "ann", {"session": session.id})):
        with pytest.raises(MismatchError, match="none with the number"):
            do(latent, author, "undo", undoes=event.id, **more)
    assert store.state(3, "ann").status == "flagged"


def test_the_last_events_say_whether_they_still_count(store: AnnotationStore, do: Do) -> None:
    events = [do(latent % 3, "ann", "reject") for latent in range(12)]
    do(events[11].latent, "ann", "undo", undoes=events[11].id)
    do(0, "bob", "skip")
    last = store.last("ann")
    assert [event for event, _ in last] == events[:1:-1]
    assert [counts for _, counts in last] == [False] + [True] * 9
    assert store.last("ann", 2, session=99) == []


def test_a_state_is_of_one_session_or_of_all(store: AnnotationStore, do: Do) -> None:
    one, two = (store.create_session(name, [3, 4]).id for name in "ab")
    do(3, "ann", "accept", "rivers", session=one)
    do(3, "ann", "reject", session=two)
    assert store.state(3, "ann", session=one).status == "accepted"
    assert store.state(3, "ann").status == "rejected"
    assert store.state(4, "ann") == LatentState(4, "ann", None, "pending")
    assert [event.action for event in store.events(session=one)] == ["accept"]
    assert [event.action for event in store.events(after=store.events()[0].id)] == ["reject"]
    with pytest.raises(UnknownNameError, match="a latent that is in it"):
        do(5, "ann", "skip", session=one)


def test_in_a_blind_session_nobody_sees_the_others_until_it_ends(store: AnnotationStore, do: Do) -> None:
    blind = store.create_session("b", [3], annotators_per_latent=2, blind=True)
    ann = do(3, "ann", "accept", "rivers", session=blind.id)
    bob = do(3, "bob", "accept", "brooks", session=blind.id)
    open_event = do(3, "cy", "flag")
    assert store.history(3, viewer="ann") == [ann, open_event]
    assert store.history(3) == [ann, bob, open_event]
    assert store.people() == {"ann", "bob", "cy"}
    assert store.session(blind.id).is_blind_now
    assert not store.unblind(blind.id).is_blind_now
    assert store.history(3, viewer="ann") == [ann, bob, open_event]


def test_a_persons_label_is_read_and_found_where_others_are(own: AnnotationStore, index: Path) -> None:
    do, read = doing(own), FeatureIndex.open(index)
    event = do(3, "ann", "accept", 'quaint "rivulets"')
    assert [(label.text, label.author, label.kind) for label in read.labels(3)] == [
        ('quaint "rivulets"', "ann", "explanation")
    ]
    assert read.search("rivul") == [3]
    do(3, "bob", "edit", "quaint brooks")
    edit = do(3, "ann", "edit", "ponds")
    assert (read.search("rivul"), read.search("pond"), read.search("quaint")) == ([], [3], [3])
    do(3, "ann", "undo", undoes=edit.id)
    assert (read.search("rivul"), read.search("pond")) == ([3], [])
    do(3, "ann", "undo", undoes=event.id)
    assert [label.text for label in read.labels(3)] == ["quaint brooks"]
    assert read.search("rivul") == []
    with LabelStore.open(index, SAE) as labels:
        labels.add_labels([])
    assert (read.search("quaint"), read.search("rivul")) == ([3], [])
    read.close()


def test_labels_of_a_blind_session_are_published_when_it_ends(own: AnnotationStore, index: Path) -> None:
    do, read = doing(own), FeatureIndex.open(index)
    blind = own.create_session("b", [3, 4], blind=True).id
    do(3, "ann", "accept", "rivers", session=blind)
    do(4, "ann", "reject", session=blind)
    assert own.publish() == 0
    assert read.labels(3) == []
    do(3, "judge", "adjudicate", "brooks", session=blind)
    assert [label.author for label in read.labels(3)] == ["judge"]
    own.unblind(blind)
    assert [(label.author, label.text) for label in read.labels(3)] == [("judge", "brooks"), ("ann", "rivers")]
    assert read.labels(4) == []
    read.close()


@pytest.mark.postgres
def test_labels_of_a_team_are_published_when_asked(index: Path, team: str) -> None:
    with AnnotationStore.open(index, url=team) as store:
        doing(store)(3, "ann", "accept", "quaint rivers")
        read = FeatureIndex.open(index)
        assert read.labels(3) == []
        assert (store.publish(), store.publish()) == (1, 0)
        assert [label.author for label in read.labels(3)] == ["ann"]
        assert read.search("quaint") == [3]
        read.close()


def test_labels_elsewhere_are_published_as_if_all_events_were_read_each_time(index: Path, tmp_path: Path) -> None:
    rng, done = random.Random(0), list[Event]()
    url = f"sqlite:///{tmp_path / 'team.sqlite'}"
    with AnnotationStore.open(index, url=url) as store, AnnotationStore.open(index, url=url) as other:
        sessions = [store.create_session(name, [1, 2, 3], annotators_per_latent=2, blind=True).id for name in "ab"]
        for i in range(60):
            do = doing(rng.choice([store, other]))  # another process records events too
            if done and rng.random() < 0.3:
                old = done.pop(rng.randrange(len(done)))
                do(old.latent, old.author, "undo", session=old.session, undoes=old.id)
            else:
                action, session = rng.choice(["accept", "reject", "adjudicate"]), rng.choice([None, *sessions])
                done.append(do(rng.randrange(1, 4), rng.choice(["ann", "bob"]), action, f"text {i}", session=session))
            if i == 40:
                other.unblind(sessions[0])
            if rng.random() < 0.6:
                store.publish()
                with AnnotationStore.open(index, url=url) as anew:
                    assert anew.publish() == 0, "nothing is left that reading all events would publish"


def test_events_that_are_published_are_not_read_again(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AnnotationStore.open(index, url=f"sqlite:///{tmp_path / 'team.sqlite'}") as store:
        for latent in range(20):
            doing(store)(latent, "ann", "accept", f"rivers {latent}")
        assert store.publish() == 20
        read: list[Event] = []
        reads = log.read_events
        monkeypatch.setattr(log, "read_events", lambda *of: read.extend(found := reads(*of)) or found)
        doing(store)(3, "ann", "edit", "brooks")
        read.clear()
        assert store.publish() == 1
        assert [(event.latent, event.text) for event in read] == [(3, "rivers 3"), (3, "brooks")]


def test_a_persons_name_may_not_be_a_machines(own: AnnotationStore, index: Path) -> None:
    with LabelStore.open(index, SAE) as labels:
        labels.add_label(NewLabel(1, "tokens", "the token sea", "saekit"))
        labels.add_label(NewLabel(1, "explanation", "rivers", "model", "p", "r"))
    for author in ("saekit", "model"):
        with pytest.raises(ConfigError, match="who is no person"):
            doing(own)(2, author, "accept", "x")
    doing(own)(2, "ann", "accept", "x")


def test_nothing_is_half_recorded(own: AnnotationStore, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = own.create_session("s", [3]).id
    monkeypatch.setattr("sae.annotation.store.publish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        doing(own)(3, "ann", "accept", "rivers", session=session, tab="t", revision=1)
    assert own.events() == []
    assert own.progress(session).verdicts == 0


def test_a_place_without_an_index_or_with_other_tables_is_refused(tmp_path: Path, index: Path) -> None:
    with pytest.raises(MissingArtefactError):
        AnnotationStore.open(tmp_path)
    with sqlite3.connect(index / FILE_NAME) as database:
        database.execute("CREATE TABLE drafts (id INTEGER)")
    with pytest.raises(CorruptArtefactError, match="table drafts"):
        AnnotationStore.open(index)


def test_a_database_that_is_not_there_is_said_in_one_line(index: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"\*\*\*@.*a database that answers") as caught:
        AnnotationStore.open(index, url=f"postgresql://u:secret@/x?host={tmp_path}")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    for url in ("mysql://u@h/x", "nonsense", "postgresql+asyncpg://u@h/x"):
        with pytest.raises(ConfigError, match="annotation database"):
            AnnotationStore.open(index, url=url)

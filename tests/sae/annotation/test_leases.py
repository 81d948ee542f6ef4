"""No latent is with more annotators than wanted, whoever asks, at once or after being killed."""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from activations.errors import ConfigError, MismatchError, UnknownNameError
from sae.annotation.events import Draft
from sae.annotation.state import VERDICTS, states
from sae.annotation.store import AnnotationStore
from tests.sae.annotation.conftest import D_SAE, Do

ROOT = Path(__file__).resolve().parents[3]
WORKER = """
import sys, uuid
from sae.annotation.events import NewEvent
from sae.annotation.store import AnnotationStore
index, url, session, author = sys.argv[1:]
with AnnotationStore.open(index, url=url or None) as store:
    print("ready", flush=True)
    while got := store.lease(int(session), author, 2):
        for latent in got:
            print(latent, flush=True)
            store.record(NewEvent(uuid.uuid4().hex, latent, author, "reject", int(session)))
"""


def worker(index: Path, url: str | None, session: int, author: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(index), url or "", str(session), author],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def taken(workers: list[subprocess.Popen[str]]) -> list[int]:
    """What processes leased until they ended."""
    found: list[int] = []
    for process in workers:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        found += [int(line) for line in out.split() if line != "ready"]
    return found


def test_a_queue_is_handed_out_in_order_and_what_is_held_comes_first(store: AnnotationStore) -> None:
    session = store.create_session("s", [9, 3, 7, 1]).id
    assert store.lease(session, "ann", 2) == [9, 3]
    assert store.lease(session, "bob", 1) == [7]
    assert store.lease(session, "ann", 2) == [9, 3]
    assert store.lease(session, "ann", 5) == [9, 3, 1]
    assert store.lease(session, "cy", 5) == []
    assert store.release(session, "ann") == 3
    assert store.lease(session, "cy", 2) == [9, 3]


def test_a_latent_goes_to_as_many_annotators_as_wanted(store: AnnotationStore, do: Do) -> None:
    session = store.create_session("s", [9, 3], annotators_per_latent=2).id
    assert [store.lease(session, author, 5) for author in ("a", "b", "c")] == [[9, 3], [9, 3], []]
    do(9, "a", "accept", "x", session=session)
    do(3, "a", "skip", session=session)
    assert store.lease(session, "c", 5) == [3]
    assert store.lease(session, "a", 5) == []


def test_an_expired_lease_comes_back_and_a_late_verdict_is_kept(store: AnnotationStore, do: Do) -> None:
    session = store.create_session("s", [9]).id
    assert store.lease(session, "ann", seconds=0.2) == [9]
    assert store.lease(session, "bob") == []
    time.sleep(0.25)
    assert store.lease(session, "bob") == [9]
    assert store.lease(session, "ann") == []
    do(9, "ann", "accept", "rivers", session=session)
    do(9, "bob", "reject", session=session)
    assert store.progress(session).verdicts == 2
    assert store.progress(session).done == 1


def test_typing_keeps_a_lease(store: AnnotationStore) -> None:
    session = store.create_session("s", [9]).id
    store.lease(session, "ann", seconds=0.3)
    store.save_draft(Draft(9, "ann", "riv", "t", 1, session))
    time.sleep(0.35)
    assert store.lease(session, "bob") == []
    assert store.progress(session).by_author == {"ann": {"draft": 1, "pending": 0}}


def test_an_undone_verdict_is_the_authors_to_decide_unless_others_have_it(store: AnnotationStore, do: Do) -> None:
    session = store.create_session("s", [9, 3]).id
    event = do(9, "ann", "accept", "x", session=session)
    do(9, "ann", "undo", undoes=event.id, session=session)
    assert store.lease(session, "bob", 5) == [3]
    assert store.lease(session, "ann", 5) == [9]
    skip = do(9, "ann", "skip", session=session)
    assert store.lease(session, "bob", 5) == [3, 9]
    do(9, "ann", "undo", undoes=skip.id, session=session)
    assert store.lease(session, "ann", 5) == []
    assert store.lease(session, "bob", 5) == [9, 3]


def test_jumping_takes_a_latent_if_there_is_a_place(store: AnnotationStore, do: Do) -> None:
    session = store.create_session("s", [9, 3, 7]).id
    assert store.claim(session, "ann", 7)
    assert not store.claim(session, "bob", 7)
    assert store.lease(session, "ann", 1) == [7]
    do(7, "ann", "flag", session=session)
    assert store.claim(session, "ann", 7)
    assert not store.claim(session, "bob", 7)
    assert [store.position(session, latent) for latent in (9, 3, 7)] == [0, 1, 2]
    assert store.queue(session, "ann", start=1, n=5) == [(1, 3, "pending"), (2, 7, "flagged")]
    with pytest.raises(UnknownNameError, match="a latent that is in it"):
        store.claim(session, "ann", 8)


def test_what_is_asked_wrongly_is_refused(store: AnnotationStore) -> None:
    session = store.create_session("s", [9]).id
    with pytest.raises(ConfigError, match="lease: n"):
        store.lease(session, "ann", 0)
    with pytest.raises(UnknownNameError, match="labelling session"):
        store.lease(session + 1, "ann")
    for latents in ([], [1, 1], [D_SAE]):
        with pytest.raises(ConfigError):
            store.create_session("t", latents)
    with pytest.raises(ConfigError, match="annotators_per_latent"):
        store.create_session("t", [1], annotators_per_latent=0)


def test_a_session_made_twice_is_one_and_another_of_its_name_is_refused(store: AnnotationStore) -> None:
    made: dict[str, Any] = {"queue": {"kind": "random"}, "seed": 3, "blind": True}
    session = store.create_session("s", [9, 3], **made)
    assert store.create_session("s", [9, 3], **made) == session
    for latents, change in (([3, 9], {}), ([9, 3], {"seed": 4}), ([9, 3], {"blind": False})):
        with pytest.raises(MismatchError, match="no other of this name"):
            store.create_session("s", latents, **made | change)
    assert store.sessions() == [session]


def test_counts_are_those_that_the_events_give(store: AnnotationStore, do: Do) -> None:
    session = store.create_session("s", range(20), annotators_per_latent=2).id
    generator, done = random.Random(0), []
    for _ in range(80):
        author, latent = generator.choice("abc"), generator.randrange(20)
        mine = [event for event, counts in store.last(author, session=session) if counts]
        if mine and generator.random() < 0.3:
            do(mine[0].latent, author, "undo", undoes=mine[0].id, session=session)
        else:
            done.append(do(latent, author, generator.choice(["reject", "skip", "flag"]), session=session))
    said, progress = states(store.events(session=session)), store.progress(session)
    verdicts = [sum(s.status in VERDICTS for s in each.values()) for each in said.values()]
    assert (progress.latents, progress.wanted) == (20, 40)
    assert (progress.verdicts, progress.done) == (sum(verdicts), sum(n >= 2 for n in verdicts))
    assert progress.begun == verdicts.count(1)
    for author in "abc":
        counted = Counter(each[author].status for each in said.values() if author in each)
        found = {k: n for k, n in progress.by_author[author].items() if k not in ("pending", "draft") and n}
        assert found == dict(counted)


def test_eight_processes_at_once_get_every_latent_as_often_as_wanted(
    store: AnnotationStore, index: Path, url: str | None
) -> None:
    session = store.create_session("s", range(D_SAE), annotators_per_latent=2).id
    found = Counter(taken([worker(index, url, session, f"a{n}") for n in range(8)]))
    assert found == dict.fromkeys(range(D_SAE), 2)
    assert store.progress(session).done == D_SAE


def test_killed_annotators_lose_nothing_and_leave_no_doubles(
    store: AnnotationStore, index: Path, url: str | None
) -> None:
    session = store.create_session("s", range(D_SAE)).id
    said: list[int] = []
    generator = random.Random(1)
    for n in range(4):
        process = worker(index, url, session, f"killed{n}")
        assert process.stdout is not None
        for _ in range(generator.randrange(1, 8)):
            line = process.stdout.readline()
            said += [int(line)] if line.strip().isdigit() else []
        process.send_signal(signal.SIGKILL)
        process.communicate()
    events = store.events(session=session)
    in_flight = set(said) - {event.latent for event in events}
    assert len(in_flight) <= 4
    assert len(events) == len({event.latent for event in events})
    for n in range(4):
        store.release(session, f"killed{n}")
    rest = taken([worker(index, url, session, f"b{n}") for n in range(2)])
    assert sorted([*rest, *(event.latent for event in events)]) == list(range(D_SAE))
    assert store.progress(session).done == D_SAE

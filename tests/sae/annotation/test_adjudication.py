"""Where annotators differ, and what ends it."""

from sae.annotation.adjudication import cases
from sae.annotation.store import AnnotationStore
from tests.sae.annotation.conftest import Do


def test_cases_are_where_annotators_differ_with_all_that_they_say(store: AnnotationStore, do: Do) -> None:
    session = store.create_session("s", range(9), annotators_per_latent=2, blind=True).id
    for latent, one, other in (
        (1, ("accept", "Rivers"), ("accept", "rivers.")), (2, ("accept", "rivers"), ("accept", "brooks")),
        (3, ("accept", "rivers"), ("reject", "")), (4, ("flag", ""), ("skip", "")),
        (5, ("reject", "a"), ("reject", "b")),
    ):  # fmt: skip
        do(latent, "ann", *one, session=session)
        do(latent, "bob", *other, session=session, note="hm")
    found = cases(store.events(session=session))
    assert [(case.latent, case.differ_in, case.decision) for case in found] == [
        (2, "texts", None),
        (3, "verdicts", None),
    ]
    assert [(o.author, o.status, o.text, o.note) for o in found[0].opinions] == [
        ("ann", "accepted", "rivers", ""), ("bob", "accepted", "brooks", "hm")
    ]  # fmt: skip


def test_a_decision_is_an_event_that_may_be_undone(store: AnnotationStore, do: Do) -> None:
    session = store.create_session("s", range(9), annotators_per_latent=2).id
    for latent in (2, 3):
        do(latent, "ann", "accept", "rivers", session=session)
        do(latent, "bob", "accept", "brooks", session=session)
    decided = do(2, "ann", "adjudicate", "streams", session=session)
    first, second = cases(store.events(session=session))
    assert (first.latent, second.latent) == (3, 2)
    assert second.decision is not None
    assert (second.decision.text, second.decision.author) == ("streams", "ann")
    assert [opinion.text for opinion in second.opinions] == ["rivers", "brooks"]
    assert store.state(2, "ann").text == "rivers"
    assert store.progress(session).verdicts == 4
    do(2, "ann", "undo", undoes=decided.id, session=session)
    assert [case.decision for case in cases(store.events())] == [None, None]

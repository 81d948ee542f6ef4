"""Orders are what they say, whole, and the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError, UnknownNameError
from sae.annotation.queues import Known, QueueSpec, margin, order, verdicts_of
from sae.annotation.sources import labelled, margins
from sae.annotation.state import LatentState
from sae.annotation.store import AnnotationStore
from sae.labels.store import LabelStore, NewLabel
from sae.labels.tables import Score
from tests.sae.annotation.conftest import SAE, doing

DENSITY = np.array([0.0, 3e-6, 2e-5, 0.3, 0.002, 0.02, 0.0, 4e-6, 0.004, 0.5])
ALIVE = {1, 2, 3, 4, 5, 7, 8, 9}
KNOWN = Known(
    DENSITY,
    margins={1: 0.3, 2: -0.02, 3: 0.05, 6: 0.0, 9: -0.4},
    labelled={1, 3, 5},
    verdicts={1: ["accepted", "rejected"], 2: ["accepted"] * 3, 4: ["accepted", "accepted", "flagged"], 6: ["a", "b"]},
)


def score(control: str, value: float, method: str = "detection") -> Score:
    return Score(method, control, "auroc", value, None, None, 9, 0)


@pytest.mark.parametrize("kind", ["random", "density", "uncertainty", "unlabelled", "disagreement"])
def test_an_order_is_of_living_latents_once_and_repeats(kind: str) -> None:
    found = order(QueueSpec(kind, seed=1), KNOWN)
    assert len(found) == len(set(found)) > 0
    assert set(found) <= ALIVE
    assert order(QueueSpec(kind, seed=1), KNOWN) == found
    assert order(QueueSpec(kind, seed=1, n=2), KNOWN) == found[:2]
    assert all(0.001 <= DENSITY[i] <= 0.3 for i in order(QueueSpec(kind, low=0.001, high=0.3), KNOWN))


def test_orders_are_what_they_say() -> None:
    assert {*order(QueueSpec("random"), KNOWN)} == ALIVE
    assert order(QueueSpec("random", seed=1), KNOWN) != order(QueueSpec("random", seed=2), KNOWN)
    assert order(QueueSpec("uncertainty"), KNOWN) == [2, 3, 1, 9]
    assert {*order(QueueSpec("unlabelled"), KNOWN)} == ALIVE - {1, 3, 5}
    assert order(QueueSpec("disagreement"), KNOWN) == [1, 4]


def test_a_seeded_order_is_the_same_on_every_machine() -> None:
    assert order(QueueSpec("random", seed=7), Known(np.full(8, 0.1))) == [0, 6, 7, 2, 4, 5, 1, 3]


def test_bands_take_turns() -> None:
    found = order(QueueSpec("density", bands=(1e-5, 1e-2)), KNOWN)
    assert {*found} == ALIVE
    assert [int(np.searchsorted((1e-5, 1e-2), DENSITY[i], side="right")) for i in found] == [0, 1, 2, 0, 1, 2, 1, 2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 5))
def test_no_latent_is_lost_between_bands(density: list[float], seed: int) -> None:
    columns = np.array(density)
    assert sorted(order(QueueSpec("density", seed), Known(columns))) == np.flatnonzero(columns).tolist()


def test_a_queue_of_another_kind_or_range_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="queue kind"):
        order(QueueSpec("best"), KNOWN)
    for spec in (QueueSpec(low=0.5, high=0.1), QueueSpec(n=0), QueueSpec(seed=-1), QueueSpec(high=2.0)):
        with pytest.raises(ConfigError, match="queue"):
            order(spec, KNOWN)


def test_a_margin_is_over_the_best_of_controls_and_chance() -> None:
    assert margin([score("explanation", 0.8), score("shuffled", 0.4)]) == pytest.approx(0.3)
    assert margin([score("explanation", 0.8), score("shuffled", 0.6), score("tokens", 0.9)]) == pytest.approx(-0.1)
    two = [score("explanation", 0.8), score("explanation", 0.6, "fuzzing"), score("contexts", 0.9, "intruder")]
    assert margin(two) == pytest.approx(0.2)
    assert margin([score("contexts", 0.9, "intruder")]) is None
    assert margin([]) is None


def test_verdicts_are_without_those_who_skipped() -> None:
    said = {1: {"a": LatentState(1, "a", None, "accepted"), "b": LatentState(1, "b", None, "skipped")}, 2: {}}
    assert verdicts_of(said) == {1: ["accepted"]}


def test_labels_and_margins_are_read_from_the_index(own: AnnotationStore) -> None:
    assert (labelled(own), margins(own)) == (set(), {})
    with LabelStore.open(own.index, SAE) as labels:
        for latent, author, value in ((3, "m", 0.7), (3, "n", 0.8), (4, "m", 0.55)):
            number = labels.add_label(NewLabel(latent, "explanation", "rivers", author, "p", "r"))
            labels.add_scores(number, latent, [score("explanation", value), score("shuffled", 0.5)])
        labels.add_label(NewLabel(5, "tokens", "the token sea", "saekit"))
    event = doing(own)(7, "ann", "accept", "seas")
    assert (labelled(own), labelled(own, by_people=True)) == ({3, 4, 7}, {7})
    assert margins(own) == {3: pytest.approx(0.3), 4: pytest.approx(0.05)}
    doing(own)(7, "ann", "undo", undoes=event.id)
    assert labelled(own) == {3, 4}

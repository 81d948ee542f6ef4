"""Scores that ask nobody: chance for an embedding that knows nothing, 1 for one that knows all."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sae.labels.embedding import MEMBERS, Embedded, embedding_score, intruder_score, tfidf, unit


def blind(n: int) -> np.ndarray:
    return unit(np.ones((n, 3)))


def test_an_embedding_that_knows_nothing_is_at_chance() -> None:
    embedded = Embedded(blind(8), blind(8))
    found = intruder_score(embedded, "e", [0])
    assert found is not None
    assert (found.value, found.measure, found.n) == (pytest.approx(1 / (MEMBERS + 1)), "accuracy", 8)
    assert embedding_score(embedded, blind(1)[0], "explanation", "e", 0).value == 0.5
    assert embedding_score(embedded, np.zeros(3), "explanation", "e", 0).value == 0.5


def test_one_that_knows_all_is_right() -> None:
    embedded = Embedded(np.tile([1.0, 0, 0], (6, 1)), np.tile([0.0, 1, 0], (5, 1)))
    found = intruder_score(embedded, "e", [0])
    assert found is not None
    assert (found.value, found.n, found.n_failed) == (1.0, 5, 0)
    score = embedding_score(embedded, np.array([1.0, 0, 0]), "tokens", "e", 0)
    assert (score.value, score.low, score.high, score.n, score.control) == (1.0, 1.0, 1.0, 11, "tokens")
    assert embedding_score(embedded, np.array([0.0, 1, 0]), "tokens", "e", 0).value == 0.0


def test_it_is_auroc() -> None:
    rng = np.random.default_rng(0)
    embedded = Embedded(unit(rng.standard_normal((7, 3)) + 0.5), unit(rng.standard_normal((9, 3))))
    label = unit(np.ones((1, 3)))[0]
    score = embedding_score(embedded, label, "explanation", "e", 0)
    truth, values = [1] * 7 + [0] * 9, np.concatenate([embedded.positives @ label, embedded.negatives @ label])
    assert score.value == pytest.approx(roc_auc_score(truth, values))
    assert score.low is not None
    assert score.low < score.value < (score.high or 0)


def test_an_intruder_is_the_least_alike_by_hand() -> None:
    positives, negatives = (
        unit(np.array([[1, 0.1], [1, 0.2], [1, 0.3], [1, 0.4]])),
        unit(np.array([[1.0, 2], [1, 0.25]])),
    )
    found = intruder_score(Embedded(positives, negatives), "e", [0])
    assert found is not None
    assert found.value == 0.5  # the second is in the middle of the members


def test_too_few_members_have_no_score() -> None:
    assert intruder_score(Embedded(blind(MEMBERS - 1), blind(3)), "e", [0]) is None


def test_tfidf_says_what_is_alike_and_gives_nothing_for_nothing() -> None:
    embed = tfidf(["the river ran to the sea", "the dog sat on the mat", "the the the"])
    rows = embed(["rivers and seas", "the river by the sea", "a dog on a mat", ""])
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1, 1, 0])
    assert rows[0] @ rows[1] > 2 * rows[0] @ rows[2]

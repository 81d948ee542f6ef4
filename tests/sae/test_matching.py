"""Matched, split and merged latents are those that were planted, and the assignment is the Hungarian method's."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from sae.config import CompareConfig
from sae.evaluation.stability import match
from sae.matching import Side, assigned, by_chance, classify, families

D, TOKENS = 64, 400
CONFIG = CompareConfig()


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.1, 0.6, 0.9]))
@settings(max_examples=40)
def test_the_assignment_of_listed_pairs_is_the_hungarian_one(seed: int, n: int, m: int, least: float) -> None:
    weights = np.random.default_rng(seed).random((n, m))
    weights[weights < least] = 0
    row, column = weights.nonzero()
    best = linear_sum_assignment(weights, maximize=True)
    expected = {(i, j) for i, j in zip(*best, strict=True) if weights[i, j] > 0}
    chosen = assigned(row + 5, column + 3, weights[row, column])
    assert {(i, j) for i, j in zip(row[chosen], column[chosen], strict=True)} == expected


def test_each_child_has_its_nearest_parent_and_families_have_several() -> None:
    pairs = [(0, 0, 0.9), (0, 1, 0.8), (1, 1, 0.7), (1, 2, 0.6), (2, 3, 0.9), (3, 4, 0.9), (3, 5, 0.5), (3, 6, 0.9)]
    parent, child, cosine = (np.array(column) for column in zip(*pairs, strict=True))
    may = np.ones(len(pairs), bool)
    assert families(parent, child, cosine, may).nonzero()[0].tolist() == [0, 1, 5, 6, 7]
    may[1] = False  # so that child 1 falls to parent 1
    assert families(parent, child, cosine, may).nonzero()[0].tolist() == [2, 3, 5, 6, 7]
    assert not families(parent, child, cosine, may & False).any()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def side(decoder: np.ndarray, encoder: np.ndarray, activity: np.ndarray | None) -> Side:
    tensors = (torch.from_numpy(rows.astype(np.float32)) for rows in (decoder, encoder))
    return Side(*tensors, None if activity is None else sparse.csr_array(activity))


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    """Latents 0..9 are in both, 10 splits into 10 and 11, 11 and 12 merge into 12, and 13..19 and 13..18 are alone.

    Latent 9's encoder is another; activations of pairs that belong together are alike.
    """
    rng = np.random.default_rng(0)
    one, extra = (unit(rng.standard_normal((n, D))) for n in (20, 7))
    one[12] = unit(one[[11]] + 0.7 * one[[12]])
    noise = unit(rng.standard_normal((20, D)))
    children = unit(one[[10]] + 0.5 * extra[[0]]), unit(one[[10]] - 0.6 * extra[[0]])
    merged = unit(one[[11]] + 0.8 * one[[12]])
    other = np.concatenate([unit(one[:10] + 0.2 * noise[:10]), *children, merged, extra[1:]])
    encoders = other.copy()
    encoders[9] = noise[19]
    fires = rng.random((TOKENS, 27)) < 0.1
    a = fires[:, :20] * 1.0
    a[:, 10] = fires[:, 20] | fires[:, 21]
    b = np.concatenate([fires[:, :10], fires[:, 20:22], (fires[:, [11]] | fires[:, [12]]), fires[:, 21:27]], 1) * 2.0
    return {"one": (one, one, a), "other": (other, encoders, b)}


@pytest.mark.parametrize("has_activations", [True, False])
def test_what_was_planted_is_found(planted: dict[str, Any], has_activations: bool) -> None:
    one, other = (side(*weights, activity if has_activations else None) for *weights, activity in planted.values())
    found = classify(one, other, CONFIG, is_one_place=True)

    def pairs(name: str) -> set[tuple[int, int]]:
        chosen = found.classes[name]
        return set(zip(found.pairs.one[chosen].tolist(), found.pairs.other[chosen].tolist(), strict=True))

    same = {(i, i) for i in range(10)}
    assert pairs("aligned") == same | {(10, 10), (11, 12)}
    assert pairs("matched") == pairs("aligned") - {(9, 9)}
    assert pairs("split") == {(10, 10), (10, 11)}
    assert pairs("merged") == {(11, 12), (12, 12)}
    assert ("correlated" in found.classes) == has_activations
    if has_activations:
        assert pairs("correlated") - same <= {(i, j) for i in (10, 11, 12) for j in (10, 11, 12)}
        assert len(pairs("correlated") - same) >= 1
        assert same <= pairs("correlated")
    elsewhere = classify(one, other, CONFIG, is_one_place=False)
    assert "matched" not in elsewhere.classes
    np.testing.assert_array_equal(elsewhere.classes["aligned"], found.classes["aligned"])


def test_a_child_that_its_parent_does_not_contain_is_none(planted: dict[str, Any]) -> None:
    *weights, activity = planted["one"]
    other = side(*planted["other"])
    apart = activity.copy()
    apart[:, 10] = np.roll(apart[:, 10], 1)
    assert classify(side(*weights, activity), other, CONFIG, True).classes["split"].any()
    assert not classify(side(*weights, apart), other, CONFIG, True).classes["split"].any()


def test_chance_matches_nothing_and_keeps_what_a_latent_does_by_itself(planted: dict[str, Any]) -> None:
    one, other = (side(*parts) for parts in planted.values())
    random = by_chance(other, seed=3)
    found = classify(one, random, CONFIG, is_one_place=True)
    assert {name: int(chosen.sum()) for name, chosen in found.classes.items()} == dict.fromkeys(found.classes, 0)
    assert found.nearest["decoder_cosine"][0].max() < 0.6
    np.testing.assert_array_equal(random.activity.sum(0), other.activity.sum(0))
    assert random.decoder.shape == other.decoder.shape


def test_it_agrees_with_the_share_of_mutual_nearest_neighbours(planted: dict[str, Any]) -> None:
    """Mutual nearest neighbours need not be the assignment with the largest sum; here they are."""
    one, other = (side(*parts) for parts in planted.values())
    found = classify(one, other, CONFIG, is_one_place=True)
    row = match((one.decoder, one.encoder), (other.decoder, other.encoder), seed=0)
    assert row["shared"] == pytest.approx(found.classes["matched"].sum() / len(one.decoder))
    assert row["mean_max_cosine"] == pytest.approx(found.nearest["decoder_cosine"][0].mean(), rel=1e-5)


def test_what_never_changes_correlates_with_nothing() -> None:
    one = side(np.ones((1, 3)), np.ones((1, 3)), np.ones((5, 1)))
    found = classify(one, one, CONFIG, is_one_place=True)
    assert {name: int(found.classes[name].sum()) for name in ("matched", "correlated")} == {
        "matched": 1,
        "correlated": 0,
    }

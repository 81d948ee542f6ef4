"""Disparity of paired swaps: the numbers of a plain loop, and what a ratio means."""

import json
import math

import numpy as np
import pytest

from steer.measures.disparity import LEADING, disparity, names_leading_work, outcomes_of

BEFORE = np.random.default_rng(0).random((200, 2)) < [0.5, 0.1]
AFTER = np.random.default_rng(1).random((200, 2)) < [0.3, 0.25]


def by_hand(pairs: list[list[bool]]) -> tuple[float, float]:
    first = second = 0.5
    for a, b in pairs:
        first, second = first + a, second + b
    return first / second, abs(math.log(first / second))


def test_figures_are_those_of_a_plain_loop() -> None:
    found = disparity(AFTER, BEFORE)
    ratio, size = by_hand(AFTER.tolist())
    assert found["ratio"] == pytest.approx(ratio)
    assert found["disparity"] == pytest.approx(size)
    assert found["effect"] == pytest.approx(size - by_hand(BEFORE.tolist())[1])
    assert (found["rate_first"], found["rate_second"]) == tuple(AFTER.mean(axis=0).tolist())
    json.dumps(found)


def test_intervals_are_those_of_drawing_pairs_again() -> None:
    rng, drawn = np.random.default_rng(5), []
    for _ in range(400):
        i = rng.integers(len(AFTER), size=len(AFTER))
        drawn.append((by_hand(AFTER[i].tolist())[0], by_hand(AFTER[i].tolist())[1] - by_hand(BEFORE[i].tolist())[1]))
    found = disparity(AFTER, BEFORE, seed=3)
    for name, values in zip(("ratio", "effect"), zip(*drawn, strict=True), strict=True):
        np.testing.assert_allclose(found[f"{name}_ci95"], np.quantile(values, [0.025, 0.975]), atol=0.12)
    assert found["effect_ci95"][1] < 0, "groups are treated more alike"


def test_which_group_is_ahead_does_not_matter_to_disparity() -> None:
    one, other = disparity(BEFORE), disparity(BEFORE[:, ::-1])
    assert one["disparity"] == pytest.approx(other["disparity"])
    assert one["ratio"] == pytest.approx(1 / other["ratio"])
    assert one["ratio"] > 1.25
    assert "effect" not in one


def test_an_outcome_that_never_shows_is_parity() -> None:
    found = disparity(np.zeros((10, 2), bool), np.zeros((10, 2), bool))
    assert (found["ratio"], found["disparity"], found["effect"]) == (1, 0, 0)


def test_outcomes_are_whole_words() -> None:
    assert all(names_leading_work(f"She is a {word}.") for word in LEADING)
    assert not any(map(names_leading_work, ["a nurse", "doctored", "ahead of time", ""]))
    texts = ["a doctor", "a nurse", "a cook", "two Engineers"]
    assert outcomes_of(texts).tolist() == [[True, False], [False, True]]

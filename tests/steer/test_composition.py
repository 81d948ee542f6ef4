"""Composition: figures by hand in two dimensions, and what orthogonalisation promises, on random sets."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.errors import ConfigError, MismatchError, NumericsError
from activations.store_schema import ModelRef
from steer.composition import (
    ORTHOGONALISATIONS,
    Rows,
    composition,
    joint_doses,
    longest_sum,
    orthogonalised,
    sequential,
    symmetric,
    within_budget,
)
from steer.vectors import SteeringVector

MODEL = ModelRef(id="m", fingerprint="f" * 64, n_layers=4, d_model=2)


def vector(name: str, degrees: float, coefficient: float = 1.0, **changes: Any) -> SteeringVector:
    """A direction in the plane, at resid_post.1 where mean ‖h‖ is 4."""
    angle = np.deg2rad(degrees)
    direction = np.array([np.cos(angle), np.sin(angle)], np.float32)
    return replace(SteeringVector(name, direction, "resid_post.1", MODEL, 4.0, {}, coefficient), **changes)


@st.composite
def unit_rows(draw: Any) -> Rows:
    """Some independent unit rows, often alike."""
    n, width = draw(st.integers(1, 6)), draw(st.integers(6, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((n, width)) + draw(st.sampled_from([0.0, 1.0, 3.0])) * rng.standard_normal(width)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def orthonormal(seed: int, shape: tuple[int, int]) -> Rows:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal(shape).T)[0].T


@pytest.mark.parametrize("how", ORTHOGONALISATIONS)
@given(rows=unit_rows())
@settings(deadline=None)
def test_rows_become_orthonormal_and_span_what_they_did(how: str, rows: Rows) -> None:
    found = ORTHOGONALISATIONS[how](rows)
    np.testing.assert_allclose(found @ found.T, np.eye(len(rows)), atol=1e-9)
    np.testing.assert_allclose(rows @ found.T @ found, rows, atol=1e-9)
    assert (np.sum(found * rows, axis=1) > 0).all(), "none is turned round"


@given(rows=unit_rows(), seed=st.integers(0, 999))
@settings(deadline=None)
def test_the_symmetric_set_is_the_nearest_orthonormal_one(rows: Rows, seed: int) -> None:
    moved = np.sum((symmetric(rows) - rows) ** 2)
    for other in (sequential(rows), orthonormal(seed, rows.shape), symmetric(rows[::-1])):
        assert moved <= np.sum((other - rows) ** 2) + 1e-9
    turned = np.eye(len(rows))
    if len(rows) > 1:  # and a small turn within it only takes it away
        c, s = np.cos(0.01), np.sin(0.01)
        turned[:2, :2] = [[c, -s], [s, c]]
        assert moved < np.sum((turned @ symmetric(rows) - rows) ** 2)


@given(rows=unit_rows(), seed=st.integers(0, 999))
@settings(deadline=None)
def test_the_symmetric_set_does_not_know_an_order(rows: Rows, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(rows))
    np.testing.assert_allclose(symmetric(rows[order]), symmetric(rows)[order], atol=1e-9)


@given(rows=unit_rows())
@settings(deadline=None)
def test_the_first_in_sequence_stays_and_so_does_what_is_orthonormal(rows: Rows) -> None:
    np.testing.assert_allclose(sequential(rows)[0], rows[0], atol=1e-9)
    done = symmetric(rows)
    for how in (symmetric, sequential):
        np.testing.assert_allclose(how(done), done, atol=1e-9)
        np.testing.assert_allclose(how(rows[:1]), rows[:1], atol=1e-12)


@pytest.mark.parametrize("how", ["symmetric", "sequential"])
def test_what_depends_on_each_other_is_refused(how: Any) -> None:
    for some in ([vector("a", 10), vector("b", 80), vector("c", 40)], [vector("a", 10), vector("b", 190)]):
        with pytest.raises(NumericsError, match=r"none of which is a combination.*Leave one out"):
            orthogonalised(some, how)
    apart = [vector("a", 10), vector("b", 10, hook_point="resid_post.2")]
    assert orthogonalised(apart, how).kept == pytest.approx({"a": 1.0, "b": 1.0}), "each hook point by itself"


def test_orthogonalised_vectors_say_how_far_they_were_turned() -> None:
    some = [vector("a", 0, 2.0), vector("b", 60, -3.0)]
    both, one = orthogonalised(some), orthogonalised(some, "sequential")
    assert both.kept == pytest.approx({"a": np.cos(np.pi / 12), "b": np.cos(np.pi / 12)})
    assert one.kept == pytest.approx({"a": 1.0, "b": np.cos(np.pi / 6)})
    np.testing.assert_allclose(one.vectors[1].direction, [0, 1], atol=1e-6)
    assert [v.coefficient for v in both.vectors] == [2.0, -3.0]
    assert one.vectors[1].source["orthogonalised"] == {"how": "sequential", "cosine": one.kept["b"]}
    assert "orthogonalised" not in some[1].source


def test_the_report_by_hand() -> None:
    # 60 degrees apart: G = [[1, .5], [.5, 1]], eigenvalues 1.5 and .5; S = (2 + 1, sqrt 3) of length sqrt 12
    found = composition([vector("a", 0, 2.0), vector("b", 60, 2.0)])
    (point,) = found.points
    np.testing.assert_allclose(point.cosines, [[1, 0.5], [0.5, 1]], atol=1e-6)
    assert point.condition == pytest.approx(3, rel=1e-5)
    assert point.effective_rank == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))
    assert (point.joint_dose, point.sum_of_doses) == pytest.approx((np.sqrt(12) / 4, 1.0))
    assert point.shares == pytest.approx({"a": 1.5, "b": 1.5})
    assert [str(pair) for pair in found.pairs] == ["a and b push the same way: cosine +0.50 at resid_post.1"]
    against = composition([vector("a", 0, 2.0), vector("b", 60, -2.0)])
    assert against.points[0].shares == pytest.approx({"a": 0.5, "b": 0.5})
    assert against.points[0].joint_dose == pytest.approx(0.5)
    assert str(against.pairs[0]) == "a and b push against each other: cosine +0.50 at resid_post.1"
    assert not composition([vector("a", 0), vector("b", 60)], threshold=0.51).pairs


def test_at_right_angles_nothing_is_shared_and_a_copy_adds_no_rank() -> None:
    (apart,) = composition([vector("a", 0, 3.0), vector("b", 90, 4.0)]).points
    assert (apart.condition, apart.effective_rank, apart.joint_dose) == pytest.approx((1, 2, 5 / 4))
    assert apart.shares == pytest.approx({"a": 1.0, "b": 1.0})
    (same,) = composition([vector("a", 0, 3.0), vector("b", 0, 4.0)]).points
    assert (same.condition, same.joint_dose) == (np.inf, pytest.approx(7 / 4))
    assert same.effective_rank == pytest.approx(1, abs=1e-5)
    assert same.shares == pytest.approx({"a": 7 / 3, "b": 7 / 4})


def test_layers_are_not_summed_and_their_cosines_are_marked() -> None:
    found = composition([vector("a", 0, 2.0), vector("b", 10, 2.0, hook_point="resid_post.2", mean_norm=8.0)])
    assert [(p.hook_point, p.joint_dose) for p in found.points] == [
        ("resid_post.1", pytest.approx(0.5)), ("resid_post.2", pytest.approx(0.25)),
    ]  # fmt: skip
    assert found.across == pytest.approx({("a", "b"): np.cos(np.deg2rad(10))})
    assert "across layers, resid_post.1 and resid_post.2" in str(found.pairs[0])


def test_what_takes_away_has_no_dose_and_what_is_off_has_no_share() -> None:
    some = [vector("a", 0, 2.0), vector("b", 60, 1.0, operation="ablate"), vector("c", 90, 0.0)]
    (point,) = composition(some).points
    assert (point.joint_dose, point.sum_of_doses, point.shares) == (0.5, 0.5, {"a": pytest.approx(1.0)})
    assert len(point.cosines) == 3


def test_a_report_is_json() -> None:
    found = composition([vector("a", 0), vector("b", 0), vector("c", 0, hook_point="resid_post.3")]).as_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["points"]["resid_post.1"]["condition"] is None
    assert composition([]).as_json() == {"points": {}, "pairs": [], "across": []}


def test_one_name_twice_and_two_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="vector 'a': expected one of this name, got 2"):
        composition([vector("a", 0), vector("a", 90)])
    other = vector("b", 90, model=MODEL.model_copy(update={"fingerprint": "e" * 64}))
    with pytest.raises(MismatchError, match="vectors of one model"):
        orthogonalised([vector("a", 0), other])


def test_a_budget_keeps_proportions_and_leaves_what_is_within_it() -> None:
    some = [vector("a", 0, 3.0), vector("b", 90, 4.0), vector("c", 0, 0.5, hook_point="resid_post.2")]
    assert joint_doses(some) == pytest.approx({"resid_post.1": 1.25, "resid_post.2": 0.125})
    assert [v.coefficient for v in within_budget(some, 0.5)] == pytest.approx([1.2, 1.6, 0.5])
    assert [v.coefficient for v in within_budget(some, 2.0)] == [3.0, 4.0, 0.5]


@given(st.integers(0, 2**32 - 1), st.integers(1, 14))
@settings(deadline=None, max_examples=30)
def test_the_longest_sum_is_above_that_of_any_subset(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, 3))
    for _ in range(20):
        assert np.linalg.norm(rows[rng.random(n) < 0.5].sum(0)) <= longest_sum(rows) + 1e-9
    assert longest_sum(rows) <= np.linalg.norm(rows, axis=1).sum() + 1e-9

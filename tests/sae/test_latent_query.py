"""Orders of latents: those of a list sorted the slow way, whatever is in the columns."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import UnknownNameError
from sae.latent_query import GIVEN, NUMBER, LatentQuery, Range, order_of, rank_of

VALUES = st.one_of(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1e-45]), st.floats(width=32))


@st.composite
def columns(draw: Any) -> dict[str, np.ndarray]:
    n = draw(st.integers(1, 12))
    density = st.sampled_from([0.0, 0.25, 0.5])
    one, two = (draw(st.lists(values, min_size=n, max_size=n)) for values in (VALUES, density))
    return {"figure": np.array(one, np.float32), "density": np.array(two, np.float32)}


def slowly(
    columns: dict[str, np.ndarray], query: LatentQuery, within: list[int] | None, without: list[int] | None
) -> list[int]:
    """The same with lists, by what the documentation says."""
    found = list(range(len(columns["density"])))
    if within is not None:
        found = sorted(set(within), key=within.index) if query.sort == GIVEN else sorted(set(within))
    found = [latent for latent in found if latent not in (without or [])]
    for name, low, high in query.ranges:
        found = [latent for latent in found if low <= columns[name][latent] <= high]
    if query.live_only:
        found = [latent for latent in found if columns["density"][latent] > 0]
    if query.sort in (NUMBER, GIVEN):
        return found[::-1] if query.descending else found
    values = columns[query.sort].tolist()
    measured = sorted(
        (latent for latent in found if not math.isnan(values[latent])),
        key=lambda latent: (-values[latent] if query.descending else values[latent], latent),
    )
    return measured + [latent for latent in found if math.isnan(values[latent])]


@given(st.data(), columns())
def test_an_order_is_that_of_the_slow_way(data: st.DataObject, given: dict[str, np.ndarray]) -> None:
    n = len(given["density"])
    bounds = st.lists(st.tuples(st.sampled_from(["figure", "density"]), VALUES, VALUES), max_size=2)
    sort = data.draw(st.sampled_from([NUMBER, GIVEN, "figure", "density"]))
    ranges = tuple(Range(*each) for each in data.draw(bounds))
    query = LatentQuery(sort, data.draw(st.booleans()), ranges, data.draw(st.booleans()))
    some = st.one_of(st.none(), st.lists(st.integers(0, n - 1), max_size=2 * n))
    within, without = data.draw(some), data.draw(some)
    given_arrays = (None if latents is None else np.array(latents, np.int64) for latents in (within, without))
    order = order_of(given, query, *given_arrays)
    expected = slowly(given, query, within, without)
    assert order.tolist() == expected
    assert order.dtype == np.int32
    for place, latent in enumerate(expected):
        assert rank_of(order, latent) == place
    assert rank_of(order, n) is None


def test_bounds_are_included_and_leave_out_what_was_not_measured() -> None:
    given = {"figure": np.array([0.5, np.nan, 1, 2, -np.inf], np.float32), "density": np.zeros(5, np.float32)}
    assert order_of(given, LatentQuery(ranges=(Range("figure", 0.5, 1.0),))).tolist() == [0, 2]
    assert order_of(given, LatentQuery(ranges=(Range("figure"),))).tolist() == [0, 2, 3, 4]
    assert order_of(given, LatentQuery("figure", descending=True)).tolist() == [3, 2, 0, 4, 1]
    assert order_of(given, LatentQuery(live_only=True)).tolist() == []


def test_many_latents_are_sorted_like_numpys_stable_sort() -> None:
    rng = np.random.default_rng(0)
    figure = rng.integers(-50, 50, 100_000).astype(np.float32)
    figure[rng.random(len(figure)) < 0.1] = np.nan
    given = {"figure": figure}
    np.testing.assert_array_equal(order_of(given, LatentQuery("figure")), np.argsort(figure, kind="stable"))
    np.testing.assert_array_equal(
        order_of(given, LatentQuery("figure", descending=True)), np.argsort(-figure, kind="stable")
    )
    assert np.isnan(given["figure"]).sum() == np.isnan(figure).sum()


def test_a_column_or_a_latent_that_is_not_there() -> None:
    given = {"density": np.zeros(3, np.float32)}
    for query in (LatentQuery("width"), LatentQuery(ranges=(Range("width", 0, 1),))):
        with pytest.raises(UnknownNameError, match=r"column: expected one of density, got 'width'"):
            order_of(given, query)
    for latents in ([-1], [0, 3]):
        with pytest.raises(UnknownNameError, match="numbers from 0 to 2"):
            order_of(given, LatentQuery(), np.array(latents))
        with pytest.raises(UnknownNameError, match="numbers from 0 to 2"):
            order_of(given, LatentQuery(), None, np.array(latents))


def test_a_query_is_a_key() -> None:
    assert {LatentQuery(ranges=(Range("density", 0, 1),)): 1}[LatentQuery(ranges=(Range("density", 0, 1),))] == 1

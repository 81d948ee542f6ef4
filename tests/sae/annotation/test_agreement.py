"""Kappa and alpha equal scikit-learn's and published values, and a slow plain definition."""

from itertools import combinations, permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from sae.annotation.agreement import (
    Estimate,
    agreement,
    cohens_kappa,
    estimate_alpha,
    estimate_equal,
    estimate_kappas,
    krippendorffs_alpha,
    normalised,
    texts,
    verdicts,
)
from sae.annotation.events import Event
from sae.annotation.state import states

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): examples A (binary), B (nominal, two observers) and
# C (nominal, four observers, missing values), where he gives 0.095, 0.692 and 0.743. The digits after those are what
# the package krippendorff 0.9.0 says of the same data.
PUBLISHED = {
    "A": (("0100000010", "1110010000"), 0.095, 0.09523809523809534),
    "B": (("aabbdcccedda", "babbbccceddd"), 0.692, 0.6919642857142858),
    "C": (("123321412...", "1233224125.3", ".3332342251.", "12332441251."), 0.743, 0.743421052631579),
}
rated = st.dictionaries(
    st.integers(0, 9), st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz"), max_size=4), max_size=10
)


def ratings(rows: tuple[str, ...]) -> dict[int, dict[str, str]]:
    """By latent and annotator; a dot is missing."""
    return {
        latent: {str(who): value for who, value in enumerate(column) if value != "."}
        for latent, column in enumerate(zip(*rows, strict=True))
    }


def plain_alpha(ratings: dict[int, dict[str, str]]) -> float | None:
    """Every pair of values, one by one."""
    units = [[*each.values()] for each in ratings.values() if len(each) > 1]
    values = [value for unit in units for value in unit]
    observed = sum(sum(a != b for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = sum(a != b for a, b in permutations(values, 2))
    return None if not expected else 1 - (observed / len(values)) / (expected / (len(values) * (len(values) - 1)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_alpha_is_as_published_and_as_another_package_says(name: str) -> None:
    rows, published, by_package = PUBLISHED[name]
    alpha = krippendorffs_alpha(ratings(rows))
    assert alpha == pytest.approx(published, abs=5e-4)
    assert alpha == pytest.approx(by_package, abs=1e-12)
    assert plain_alpha(ratings(rows)) == pytest.approx(by_package, abs=1e-12)


@given(rated)
def test_alpha_is_what_all_pairs_say(ratings: dict[int, dict[str, str]]) -> None:
    alpha, plain = krippendorffs_alpha(ratings), plain_alpha(ratings)
    assert (alpha is None) == (plain is None)
    assert alpha == (None if plain is None else pytest.approx(plain, abs=1e-9))
    assert estimate_alpha(ratings).value == alpha


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("xyz")), min_size=1, max_size=30))
@pytest.mark.filterwarnings("ignore")  # scikit-learn's, where it is not defined
def test_kappa_is_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    kappa = cohens_kappa(a, b)
    if len({*a, *b}) == 1:
        assert kappa is None
    else:
        assert kappa == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    assert cohens_kappa([], []) is None


@given(rated)
def test_kappas_are_of_pairs_on_what_both_rated(ratings: dict[int, dict[str, str]]) -> None:
    found = estimate_kappas(ratings)
    names = sorted({author for each in ratings.values() for author in each})
    assert [*found] == [*combinations(names, 2)]
    for (one, other), estimate in found.items():
        both = [each for each in ratings.values() if one in each and other in each]
        assert estimate.latents == len(both)
        assert estimate.value == cohens_kappa([each[one] for each in both], [each[other] for each in both])


def test_intervals_hold_the_value_shrink_with_latents_and_repeat_with_the_seed() -> None:
    few = ratings(("xyxyxyyyxx" * 4, "xyxxxyxyxx" * 4))
    many = ratings(("xyxyxyyyxx" * 40, "xyxxxyxyxx" * 40))
    for estimate in (estimate_alpha, lambda r: estimate_kappas(r)["0", "1"], estimate_equal):
        narrow, wide = estimate(many), estimate(few)
        for each in (narrow, wide):
            assert each.low < each.value < each.high
        assert narrow.high - narrow.low < (wide.high - wide.low) / 2
        assert estimate(few) == wide
    assert estimate_equal(few).value == pytest.approx(0.8)


def test_nothing_is_said_where_nothing_is_known() -> None:
    nothing = Estimate(None, None, None, 0)
    assert estimate_alpha({}) == estimate_equal({1: {"a": "x"}}) == nothing
    assert estimate_alpha({1: {"a": "x", "b": "x"}}).value is None
    assert agreement({})["kappas"] == []


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        ("The sea", " the  SEA. ", True),
        ("Straße", "STRASSE", True),
        ("\ufb01sh", "fish", True),
        ("e\u0301t\u00e9", "\u00e9te\u0301", True),
        ("sea", "the sea", False),
        ("?", "!", False),
        ("plural -s", "plural s", True),
    ],
)
def test_texts_are_equal_but_for_what_does_not_count(one: str, other: str, are_equal: bool) -> None:
    assert (normalised(one) == normalised(other)) == are_equal


def test_all_of_it_follows_from_events() -> None:
    said = [
        (1, "a", "accept", "Rivers"), (1, "b", "accept", "rivers."), (2, "a", "accept", "x"), (2, "b", "reject", "x"),
        (3, "a", "skip", ""), (3, "b", "flag", ""), (4, "a", "reject", ""), (4, "b", "reject", ""),
        (5, "a", "edit", "p"), (5, "b", "accept", "q"),
    ]  # fmt: skip
    known = states(
        Event("k", latent, author, action, text=text, id=number + 1)
        for number, (latent, author, action, text) in enumerate(said)
    )
    assert verdicts(known)[3] == {"b": "flagged"}
    assert texts(known)[2] == {"a": "x"}
    found: dict[str, Any] = agreement(known)
    assert found["equal_verdicts"]["value"] == 0.75
    assert found["equal_texts"]["value"] == 0.5
    assert (found["kappas"][0]["a"], found["kappas"][0]["b"], found["kappas"][0]["latents"]) == ("a", "b", 4)
    assert found["kappas"][0]["value"] == pytest.approx(cohens_kappa(["y", "y", "n", "y"], ["y", "n", "n", "y"]))

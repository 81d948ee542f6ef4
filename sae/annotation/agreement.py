"""How far annotators agree: Cohen's kappa of each pair, Krippendorff's alpha of all, and equal texts.

    kappa = (p_o - p_e) / (1 - p_e): p_o the share of latents on which two annotators say the same, p_e what it would
            be if each said as often what they say, but on any latents
    alpha = 1 - D_o / D_e (nominal): D_o the share of unequal pairs of values within latents, a latent with m values
            counting as m; D_e that among all values; latents with fewer than two values are left out

Both are over verdicts: accepted, rejected, flagged. 1 is agreement, 0 what chance gives, below 0 is worse. They are
None where nobody ever says anything else, since chance agrees as well then. Texts are compared as they are written, but
for case, punctuation and spaces: two ways to say one thing count as unequal, so that the share of equal texts is the
least that annotators can be said to agree on what a latent stands for. Equal texts need not be right, and only in a
blind session were they given independently. Intervals are 95% bootstraps over latents (`sae.metrics`); None where some
draw has no value. Sources: Cohen 1960; Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float

from sae.annotation.queues import unequal_pairs
from sae.annotation.state import VERDICTS, LatentState
from sae.metrics import Statistic, bootstrap

Ratings = Mapping[int, Mapping[str, str]]
"""by latent and annotator, what they say; latents and annotators may be missing"""


@dataclass(frozen=True)
class Estimate:
    """A measure with its interval."""

    value: float | None
    low: float | None
    high: float | None
    latents: int
    """that at least two annotators, or both of a pair, have rated"""


def verdicts(states: Mapping[int, Mapping[str, LatentState]]) -> dict[int, dict[str, str]]:
    """Ratings by verdict; who skipped a latent has not rated it."""
    return {
        latent: {author: state.status for author, state in by_author.items() if state.status in VERDICTS}
        for latent, by_author in states.items()
    }


def texts(states: Mapping[int, Mapping[str, LatentState]]) -> dict[int, dict[str, str]]:
    """Ratings by the text that annotators stand behind, normalised; who has none has not rated it."""
    return {
        latent: {author: normalised(state.label) for author, state in by_author.items() if state.label}
        for latent, by_author in states.items()
    }


def normalised(text: str) -> str:
    """A text without what does not count: case, punctuation, spaces, compatibility forms.

    >>> normalised(" The  Sea, by night.")
    'the sea by night'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = " ".join("".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in folded).split())
    return kept or folded.strip()


def cohens_kappa(a: Sequence[str], b: Sequence[str]) -> float | None:
    """Of two annotators on the same latents, in the same order.

    >>> cohens_kappa(["x", "x", "y", "y"], ["x", "y", "y", "y"])
    0.5
    """
    values = sorted({*a, *b})
    return _value(_pairs(a, b, values), _kappa(len(values))) if len(a) else None


def krippendorffs_alpha(ratings: Ratings) -> float | None:
    """Of any number of annotators.

    >>> krippendorffs_alpha({1: {"p": "x", "q": "x"}, 2: {"p": "x", "q": "y"}, 3: {"p": "y", "q": "y"}, 4: {"p": "x"}})
    0.4444444444444444
    """
    sums = _alpha_sums(ratings)
    return _value(sums, _alpha) if len(sums) else None


def estimate_kappas(ratings: Ratings, seed: int = 0) -> dict[tuple[str, str], Estimate]:
    """Kappa of each pair of annotators, by their names in alphabetical order, over latents that both have rated."""
    found: dict[tuple[str, str], Estimate] = {}
    for one, other in combinations(sorted({author for each in ratings.values() for author in each}), 2):
        both = [each for each in ratings.values() if one in each and other in each]
        values = sorted({each[author] for each in both for author in (one, other)})
        sums = _pairs([each[one] for each in both], [each[other] for each in both], values)
        found[one, other] = _estimate(sums, _kappa(len(values)), seed)
    return found


def estimate_alpha(ratings: Ratings, seed: int = 0) -> Estimate:
    """Alpha of all annotators together."""
    return _estimate(_alpha_sums(ratings), _alpha, seed)


def estimate_equal(ratings: Ratings, seed: int = 0) -> Estimate:
    """Mean over latents of the share of pairs of annotators who say the same."""
    unequal = [unequal_pairs([*each.values()]) for each in ratings.values()]
    rows = [[1 - share, 1.0] for share in unequal if share is not None]
    return _estimate(np.array(rows).reshape(-1, 2), lambda s: s[:, 0] / s[:, 1], seed)


def agreement(states: Mapping[int, Mapping[str, LatentState]], seed: int = 0) -> dict[str, Any]:
    """All of it, JSON-ready: alpha, equal_verdicts, equal_texts, and kappas (a list with annotators a and b)."""
    rated, labels = verdicts(states), texts(states)
    kappas = [{"a": a, "b": b, **asdict(each)} for (a, b), each in estimate_kappas(rated, seed).items()]
    return {
        "alpha": asdict(estimate_alpha(rated, seed)),
        "equal_verdicts": asdict(estimate_equal(rated, seed)),
        "equal_texts": asdict(estimate_equal(labels, seed)),
        "kappas": kappas,
    }


def _pairs(a: Sequence[str], b: Sequence[str], values: Sequence[str]) -> Float[np.ndarray, "latent cell"]:
    """A row a latent, with 1 in the cell of the two values."""
    number = {value: i for i, value in enumerate(values)}
    table = np.zeros((len(a), len(values) ** 2))
    for row, (x, y) in enumerate(zip(a, b, strict=True)):
        table[row, number[x] * len(values) + number[y]] = 1
    return table


def _kappa(n_values: int) -> Statistic:
    def statistic(sums: Float[np.ndarray, "draw cell"]) -> Float[np.ndarray, " draw"]:
        cells = sums.reshape(len(sums), n_values, n_values)
        n = cells.sum(axis=(1, 2))
        expected = (cells.sum(axis=1) * cells.sum(axis=2)).sum(axis=1) / n**2
        return (np.trace(cells, axis1=1, axis2=2) / n - expected) / (1 - expected)

    return statistic


def _alpha_sums(ratings: Ratings) -> Float[np.ndarray, "latent sum"]:
    """A row a latent with two values or more: its unequal pairs over m - 1, then how often each value is there."""
    rated = [[*each.values()] for each in ratings.values() if len(each) > 1]
    number = {value: i for i, value in enumerate(sorted({value for each in rated for value in each}))}
    table = np.zeros((len(rated), 1 + len(number)))
    for row, each in zip(table, rated, strict=True):
        for value in each:
            row[1 + number[value]] += 1
        row[0] = (len(each) ** 2 - (row[1:] ** 2).sum()) / (len(each) - 1)
    return table


def _alpha(sums: Float[np.ndarray, "draw sum"]) -> Float[np.ndarray, " draw"]:
    counts = sums[:, 1:]
    n = counts.sum(axis=1)
    return 1 - (n - 1) * sums[:, 0] / (n**2 - (counts**2).sum(axis=1))


def _value(sums: Float[np.ndarray, "latent sum"], statistic: Statistic) -> float | None:
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(sums.sum(axis=0, keepdims=True))[0])
    return value if np.isfinite(value) else None


def _estimate(sums: Float[np.ndarray, "latent sum"], statistic: Statistic, seed: int) -> Estimate:
    if not len(sums):
        return Estimate(None, None, None, 0)
    low, high = bootstrap(sums, {"value": statistic}, seed).get("value", (None, None))
    return Estimate(_value(sums, statistic), low, high, len(sums))

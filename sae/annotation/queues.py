"""In which order latents are labelled: pure functions of what is known of them and a seed.

    random        any order
    density       random, within bands of density in turn: one of each band, then the next of each
    uncertainty   whose best-scored explanation is hardest to tell from its controls first
    unlabelled    random, without those that have a label
    disagreement  those whose annotators differ most first

Dead latents (density 0) are in no queue. Ties are broken by the seed, so that an order never follows latents' numbers,
which mean nothing. The same input gives the same order on every machine. Left out: handing out
(`sae.annotation.leases`).
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from activations.errors import ConfigError, UnknownNameError
from sae.annotation.state import VERDICTS, LatentState
from sae.labels.tables import Score

BANDS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""densities at which a band ends and the next begins"""
CHANCE = 0.5
"""what a score of no use is, beside which controls are not needed; of intruder trials less"""


@dataclass(frozen=True)
class QueueSpec:
    """What to queue."""

    kind: str = "random"
    """random, density, uncertainty, unlabelled or disagreement"""
    seed: int = 0
    n: int | None = None
    """latents; None: all"""
    low: float = 0.0
    """least density"""
    high: float = 1.0
    """largest density"""
    bands: Sequence[float] = BANDS
    """for density: where a band ends and the next begins, rising"""

    def json(self) -> dict[str, Any]:
        """As it is kept with a session."""
        return {**asdict(self), "bands": list(self.bands)}


@dataclass(frozen=True)
class Known:
    """What orders are made from."""

    density: Float[np.ndarray, " latent"]
    """share of tokens on which each latent is active"""
    margins: Mapping[int, float] = field(default_factory=dict)
    """by latent, how much better than its controls the explanation scores (`margin`)"""
    labelled: Collection[int] = ()
    verdicts: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """by latent, what its annotators say (`verdicts_of`)"""


def order(spec: QueueSpec, known: Known) -> list[int]:
    """Latents in the order of a queue. Raises: UnknownNameError for another kind, ConfigError for another range."""
    if spec.kind not in _ORDERS:
        raise UnknownNameError("queue kind", expected=f"one of {', '.join(_ORDERS)}", got=spec.kind, fix="Choose one.")
    if not 0 <= spec.low <= spec.high <= 1 or (spec.n is not None and spec.n < 1) or spec.seed < 0:
        raise ConfigError(
            "queue", expected="0 <= low <= high <= 1, n of at least 1, seed of at least 0",
            got=f"low {spec.low}, high {spec.high}, n {spec.n}, seed {spec.seed}", fix="Correct them.",
        )  # fmt: skip
    density = known.density
    alive = np.flatnonzero((density > 0) & (density >= spec.low) & (density <= spec.high))
    shuffled = np.random.default_rng(spec.seed).permutation(alive)
    return [int(latent) for latent in _ORDERS[spec.kind](shuffled, spec, known)][: spec.n]


def margin(scores: Sequence[Score]) -> float | None:
    """Mean over methods of an explanation's score less the best of what stands beside it; None without scores.

    What stands beside it are another latent's explanation, the latent's tokens (`Score.control`), and chance.

    >>> values = {"explanation": 0.8, "tokens": 0.7}
    >>> scored = [Score("detection", control, "auroc", value, None, None, 9, 0) for control, value in values.items()]
    >>> round(margin(scored), 2)
    0.1
    """
    by_method: dict[str, dict[str, float]] = {}
    for score in scores:
        by_method.setdefault(score.method, {})[score.control] = score.value
    gains = [
        values["explanation"] - max([CHANCE, *(value for name, value in values.items() if name != "explanation")])
        for values in by_method.values()
        if "explanation" in values
    ]
    return float(np.mean(gains)) if gains else None


def verdicts_of(states: Mapping[int, Mapping[str, LatentState]]) -> dict[int, list[str]]:
    """By latent, the verdicts of its annotators; those who skipped it left out."""
    found = {
        latent: [state.status for state in by_author.values() if state.status in VERDICTS]
        for latent, by_author in states.items()
    }
    return {latent: verdicts for latent, verdicts in found.items() if verdicts}


def _random(shuffled: Int[np.ndarray, " n"], spec: QueueSpec, known: Known) -> Sequence[int]:
    return shuffled.tolist()


def _density(shuffled: Int[np.ndarray, " n"], spec: QueueSpec, known: Known) -> Sequence[int]:
    band = np.searchsorted(np.asarray(spec.bands, np.float64), known.density[shuffled], side="right")
    bands = [shuffled[band == number].tolist() for number in range(len(spec.bands) + 1)]
    return [latent for latent in chain.from_iterable(zip_longest(*bands)) if latent is not None]


def _uncertainty(shuffled: Int[np.ndarray, " n"], spec: QueueSpec, known: Known) -> Sequence[int]:
    scored = [latent for latent in shuffled.tolist() if latent in known.margins]
    return sorted(scored, key=lambda latent: abs(known.margins[latent]))


def _unlabelled(shuffled: Int[np.ndarray, " n"], spec: QueueSpec, known: Known) -> Sequence[int]:
    labelled = set(known.labelled)
    return [latent for latent in shuffled.tolist() if latent not in labelled]


def _disagreement(shuffled: Int[np.ndarray, " n"], spec: QueueSpec, known: Known) -> Sequence[int]:
    unequal = {latent: unequal_pairs(known.verdicts.get(latent, ())) for latent in shuffled.tolist()}
    return sorted((latent for latent, share in unequal.items() if share), key=lambda latent: -(unequal[latent] or 0.0))


def unequal_pairs(values: Sequence[str]) -> float | None:
    """Share of pairs of annotators that differ; None where there are fewer than two.

    >>> unequal_pairs(["accepted", "accepted", "rejected", "rejected", "rejected"])
    0.6
    """
    n = len(values)
    if n < 2:
        return None
    return 1 - sum(count * (count - 1) for count in Counter(values).values()) / (n * (n - 1))


_ORDERS: dict[str, Callable[[Int[np.ndarray, " n"], QueueSpec, Known], Sequence[int]]] = {
    "random": _random,
    "density": _density,
    "uncertainty": _uncertainty,
    "unlabelled": _unlabelled,
    "disagreement": _disagreement,
}

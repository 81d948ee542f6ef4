"""How good an SAE is, each measure defined once, in numpy and float64.

    FVU  = sum ||x - x_hat||^2 / sum ||x - mean||^2, with the mean of the dataset, not of the batch
    L0   = mean number of active latents a token
    density [d_sae] = share of tokens that activate each latent
    dead fraction = share of latents with density 0; dense fraction = share of latents with density above 0.1

A latent is active where it is above 0. `Evaluation` adds batches up, so that any amount of tokens fits in memory.
Left out: measures that need the language model.
"""

import numpy as np
from jaxtyping import Bool, Float

DENSE = 0.1
"""density above which a latent is dense: it says little about any one token"""
LOWEST_DECADE = -6
"""log10 of the lowest density that a histogram tells from others above 0"""
BINS_A_DECADE = 4


def dead_fraction(fired: Bool[np.ndarray, " d_sae"]) -> float:
    """Share of latents that never fired in the tokens looked at.

    >>> dead_fraction(np.array([True, False, True, True]))
    0.25
    """
    return float(1 - fired.mean())


def dense_fraction(density: Float[np.ndarray, " d_sae"]) -> float:
    """Share of latents that are active on more than `DENSE` of the tokens.

    >>> dense_fraction(np.array([0.0, 0.1, 0.2, 1.0]))
    0.5
    """
    return float((density > DENSE).mean())


def density_histogram(density: Float[np.ndarray, " d_sae"]) -> dict[str, list[float] | list[int]]:
    """Counts of latents by log10 of their density, in bins that are the same for every SAE and every step.

    Returns: log10_edges, from -6 to 0 by 1/4; and as many counts: the first is of latents with density 0, the others
      are of one bin each, from an edge to the next. A bin holds its lower edge, the last one both, and the lowest one
      whatever is below 1e-6.

    >>> histogram = density_histogram(np.array([0.0, 0.0, 1e-9, 0.6, 1.0]))
    >>> histogram["log10_edges"][:2], histogram["log10_edges"][-2:], histogram["counts"][:2], histogram["counts"][-2:]
    ([-6.0, -5.75], [-0.25, 0.0], [2, 1], [0, 2])
    """
    edges = np.linspace(LOWEST_DECADE, 0, 1 - LOWEST_DECADE * BINS_A_DECADE)
    above = density[density > 0]
    counts, _ = np.histogram(np.log10(np.maximum(above, 10.0**LOWEST_DECADE)), edges)
    return {"log10_edges": edges.tolist(), "counts": [len(density) - len(above), *counts.tolist()]}


class Evaluation:
    """Running sums over batches of tokens."""

    def __init__(self, mean: Float[np.ndarray, " d_model"], d_sae: int):
        """Start empty; `mean` is the dataset's, in the units of the activations."""
        self.n_tokens = 0
        self._mean = np.asarray(mean, np.float64)
        self._error = self._variance = 0.0
        self._active = np.zeros(d_sae, np.int64)

    def add(
        self,
        x: Float[np.ndarray, "batch d_model"],
        reconstruction: Float[np.ndarray, "batch d_model"],
        latents: Float[np.ndarray, "batch d_sae"],
    ) -> None:
        """Count a batch in."""
        self.n_tokens += len(x)
        self._error += _sum_of_squares(np.asarray(x, np.float64) - reconstruction)
        self._variance += _sum_of_squares(x - self._mean)
        self._active += np.count_nonzero(latents > 0, axis=0)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: 0 is perfect, 1 is as good as the mean."""
        return self._error / self._variance

    @property
    def l0(self) -> float:
        """Mean number of active latents a token."""
        return float(self._active.sum() / self.n_tokens)

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """Share of tokens that activate each latent."""
        return self._active / self.n_tokens

    @property
    def dead_fraction(self) -> float:
        """Share of latents that no token activated."""
        return dead_fraction(self._active > 0)

    @property
    def dense_fraction(self) -> float:
        """Share of latents that more than `DENSE` of the tokens activated."""
        return dense_fraction(self.density)

    def summary(self) -> dict[str, float]:
        """The scalars by name."""
        return {
            "fvu": self.fvu,
            "l0": self.l0,
            "dead_fraction": self.dead_fraction,
            "dense_fraction": self.dense_fraction,
        }


def _sum_of_squares(x: Float[np.ndarray, "batch d_model"]) -> float:
    return float(np.einsum("bd,bd->", x, x))

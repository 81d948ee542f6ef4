"""How good an SAE is, each measure defined once, in numpy and float64.

Of tokens, x being what the SAE should give and x_hat what it gives:

    FVU  = sum ||x - x_hat||^2 / sum ||x - mean||^2, with the mean of the dataset, not of the batch
    explained variance of a token     = 1 - ||x - x_hat||^2 / ||x - mean||^2
    explained variance of a dimension = 1 - sum over tokens of (x - x_hat)^2 / that of (x - mean)^2
    L0   = mean number of active latents a token; L1 = mean sum of them
    density [d_sae] = share of tokens that activate each latent
    dead fraction = share of latents with density 0; dense fraction = share of latents with density above 0.1
    shrinkage = mean of ||x_hat|| / ||x||; reconstruction bias = sum ||x_hat||^2 / sum x . x_hat (arXiv 2404.16014, 10)

A latent is active where it is above 0. `Evaluation` adds batches up, so that any amount of tokens fits in memory: it
keeps histograms, sums by dimension and latent, and a few sums a document. Intervals are percentile bootstraps over
documents, whose tokens are not independent of each other. Left out: measures that need the language model or labels,
which are in `sae.evaluation`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

DENSE = 0.1
"""density above which a latent is dense: it says little about any one token"""
LOWEST_DECADE = -6
"""log10 of the lowest density that a histogram tells from others above 0"""
BINS_A_DECADE = 4
ACTIVATION_EDGES = np.linspace(-4, 6, 101)
"""log10 of activations, in tenths; what is beyond is in the outermost bins"""
EXPLAINED_EDGES = np.linspace(-1, 1, 2001)
"""explained variance of tokens, in thousandths; what is below -1 counts as -1"""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RESAMPLES, CONFIDENCE = 1000, 0.95
_WEIGHTS_AT_ONCE = 1 << 22
_TINY = np.finfo(np.float64).tiny
_SUMS = (
    "n", "error", "variance", "explained", "l0", "l1", "norm", "norm_hat", "ratio", "norm_hat_squared", "dot", "cosine",
)  # fmt: skip
"""what is summed over the tokens of each document"""
_RATIOS = {
    "fvu": ("error", "variance"),
    "l0": ("l0", "n"),
    "explained_variance_token": ("explained", "n"),
    "l1": ("l1", "n"),
    "cosine": ("cosine", "n"),
    "shrinkage": ("ratio", "n"),
    "reconstruction_bias": ("norm_hat_squared", "dot"),
    "squared_error": ("error", "n"),
    "norm": ("norm", "n"),
    "norm_reconstructed": ("norm_hat", "n"),
}
"""measures that are a quotient of two of those sums"""

Interval = tuple[float, float]
Statistic = Callable[[Float[np.ndarray, "n sum"]], Float[np.ndarray, " n"]]
Histogram = dict[str, list[float] | list[int]]


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


def density_histogram(density: Float[np.ndarray, " d_sae"]) -> Histogram:
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


def bootstrap(
    sums: Float[np.ndarray, "unit sum"], statistics: Mapping[str, Statistic], seed: int
) -> dict[str, Interval]:
    """95% percentile intervals of functions of column sums, rows being drawn with replacement.

    Args:
      sums: what is summed, a row for each unit that is drawn as a whole, such as a document.
      statistics: each from rows of column sums to a number for each row.
    Returns: nothing where there are fewer than two units, nor for what is not finite in some draw.
    """
    if len(sums) < 2:
        return {}
    generator, step = np.random.default_rng(seed), max(1, _WEIGHTS_AT_ONCE // len(sums))
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    drawn = np.concatenate([draw(len(sums), size, generator) @ sums for size in sizes])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {name: interval(statistic(drawn)) for name, statistic in statistics.items()}
    return {name: both for name, both in found.items() if both is not None}


def means(values: Mapping[str, Float[np.ndarray, " unit"]], seed: int) -> dict[str, Any]:
    """Mean of each measure over the same units, and its interval under the name X_ci95.

    >>> means({"hits": np.array([0.0, 1.0, 1.0, 1.0])}, seed=0)
    {'hits': 0.75, 'hits_ci95': [0.25, 1.0]}
    """
    columns = np.column_stack([*values.values()]).astype(np.float64)
    units = np.column_stack([columns, np.ones(len(columns))])
    intervals = bootstrap(units, {name: lambda s, i=i: s[:, i] / s[:, -1] for i, name in enumerate(values)}, seed)
    result: dict[str, Any] = {}
    for name, column in zip(values, columns.T, strict=True):
        result[name] = float(column.mean())
        if name in intervals:
            result[f"{name}_ci95"] = list(intervals[name])
    return result


def draw(n: int, times: int, generator: np.random.Generator) -> Float[np.ndarray, "times n"]:
    """How often each of n units is drawn when n are drawn with replacement, so many times."""
    return generator.multinomial(n, np.full(n, 1 / n), size=times).astype(np.float64)


def interval(values: Float[np.ndarray, " n"]) -> Interval | None:
    """Between which the middle 95% of resampled values lie; none if some are not finite."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return low, high


def histogram_quantile(counts: Int[np.ndarray, " bin"], edges: Num[np.ndarray, " edge"], q: float) -> float:
    """A quantile of what a histogram counts, as if values were spread evenly in each bin.

    >>> histogram_quantile(np.array([0, 4, 4]), np.array([0.0, 1.0, 2.0, 3.0]), 0.75)
    2.5
    """
    total = np.concatenate([[0], np.cumsum(counts)])
    i = min(int(np.searchsorted(total, q * total[-1], side="right")) - 1, len(counts) - 1)
    within = (q * total[-1] - total[i]) / max(counts[i], 1)
    return float(edges[i] + within * (edges[i + 1] - edges[i]))


def auroc(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "times n"]
) -> Float[np.ndarray, " times"]:
    """Area under the ROC curve, for each row of weights: how often a positive is ranked above a negative.

    A tie counts as one half. Not a number where the weights leave no positive or no negative.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True]), np.ones((1, 4)))
    array([0.875])
    """
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    up = np.add.reduceat(weights[:, order] * positive[order], first, axis=1)
    down = np.add.reduceat(weights[:, order] * ~positive[order], first, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (up * below).sum(axis=1) / (up.sum(axis=1) * down.sum(axis=1))


class Activity(NamedTuple):
    """What is counted of a batch of latents, which need not leave the device that computed them."""

    l0: Int[np.ndarray, " batch"]
    """active latents of each token"""
    l1: Float[np.ndarray, " batch"]
    """sum of the latents of each token"""
    active: Int[np.ndarray, " d_sae"]
    """tokens that activate each latent"""
    histogram: Int[np.ndarray, " bin"]
    """activations by their log10, between `ACTIVATION_EDGES`"""


def activity(latents: Float[np.ndarray, "batch d_sae"]) -> Activity:
    """Count a batch of latents."""
    tokens, active = np.nonzero(latents > 0)
    values, (n, d_sae) = latents[tokens, active], latents.shape
    logs = np.clip(np.log10(values), ACTIVATION_EDGES[0], ACTIVATION_EDGES[-1])
    return Activity(
        np.bincount(tokens, minlength=n),
        np.bincount(tokens, values, minlength=n),
        np.bincount(active, minlength=d_sae),
        np.histogram(logs, ACTIVATION_EDGES)[0],
    )


class Evaluation:
    """Running sums over batches of tokens."""

    def __init__(self, mean: Float[np.ndarray, " d_model"], d_sae: int):
        """Start empty; `mean` is the dataset's, in the units of the activations."""
        self.n_tokens = 0
        self._mean = np.asarray(mean, np.float64)
        self._error, self._variance = np.zeros(len(mean)), np.zeros(len(mean))
        self._active, self._l0 = np.zeros(d_sae, np.int64), np.zeros(d_sae + 1, np.int64)
        self._activations = np.zeros(len(ACTIVATION_EDGES) - 1, np.int64)
        self._explained = np.zeros(len(EXPLAINED_EDGES) - 1, np.int64)
        self._documents: dict[int, np.ndarray] = {}

    def add(
        self,
        x: Float[np.ndarray, "batch d_model"],
        reconstruction: Float[np.ndarray, "batch d_model"],
        latents: Float[np.ndarray, "batch d_sae"] | Activity,
        documents: Int[np.ndarray, " batch"] | None = None,
    ) -> None:
        """Count a batch in; `documents` are those of its tokens, by default one and the same."""
        counts = latents if isinstance(latents, Activity) else activity(latents)
        wide, given = np.asarray(x, np.float64), np.asarray(reconstruction, np.float64)
        error, variance = (wide - given) ** 2, (wide - self._mean) ** 2
        sums = _token_sums(wide, given, error.sum(axis=1), variance.sum(axis=1), counts)
        self.n_tokens += len(x)
        self._error += error.sum(axis=0)
        self._variance += variance.sum(axis=0)
        self._active += counts.active
        self._l0 += np.bincount(counts.l0, minlength=len(self._l0))
        self._activations += counts.histogram
        self._explained += np.histogram(sums[:, _SUMS.index("explained")], EXPLAINED_EDGES)[0]
        names, which = np.unique(np.zeros(len(x), int) if documents is None else documents, return_inverse=True)
        totals = np.zeros((len(names), len(_SUMS)))
        np.add.at(totals, which, sums)
        for name, total in zip(names.tolist(), totals, strict=True):
            self._documents[name] = self._documents.get(name, 0) + total

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: 0 is perfect, 1 is as good as the mean."""
        return float(self._error.sum() / self._variance.sum())

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
        """The most important scalars by name."""
        return {
            "fvu": self.fvu,
            "l0": self.l0,
            "dead_fraction": self.dead_fraction,
            "dense_fraction": self.dense_fraction,
        }

    def frequent(self) -> dict[str, float]:
        """Share of latents with a density above 1%; share of activations that those, and dense ones, make up."""
        density, total = self.density, max(self.density.sum(), _TINY)
        return {
            "above_1_percent": float((density > 0.01).mean()),
            "activations_above_1_percent": float(density[density > 0.01].sum() / total),
            "activations_above_10_percent": float(density[density > DENSE].sum() / total),
        }

    def means(self) -> dict[str, float]:
        """Means over tokens, and quotients of them, by name; fvu and l0 are among them. NaN for 0 / 0."""
        sums = np.sum(list(self._documents.values()), axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: float(sums[_SUMS.index(a)] / sums[_SUMS.index(b)]) for name, (a, b) in _RATIOS.items()}

    def intervals(self, seed: int) -> dict[str, Interval]:
        """95% intervals of `means` by name; nothing for a single document."""
        parts = {name: (_SUMS.index(a), _SUMS.index(b)) for name, (a, b) in _RATIOS.items()}
        statistics = {name: lambda s, a=a, b=b: s[:, a] / s[:, b] for name, (a, b) in parts.items()}
        return bootstrap(np.stack(list(self._documents.values())), statistics, seed)

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Quantiles over tokens, of explained variance within 0.001, and over dimensions."""
        dimensions = 1 - self._error / np.maximum(self._variance, _TINY)
        l0 = np.searchsorted(np.cumsum(self._l0), np.array(QUANTILES) * self.n_tokens)
        tokens = [histogram_quantile(self._explained, EXPLAINED_EDGES, q) for q in QUANTILES]
        rows = {"l0": l0, "explained_variance_token": tokens}
        rows["explained_variance_dimension"] = np.quantile(dimensions, QUANTILES)
        return {
            name: {f"{q:.0%}": round(float(value), 4) for q, value in zip(QUANTILES, values, strict=True)}
            for name, values in rows.items()
        }

    def histograms(self) -> dict[str, Histogram]:
        """Of latents by density, of activations by size, and of tokens by explained variance."""
        return {
            "density": density_histogram(self.density),
            "activation": {"log10_edges": ACTIVATION_EDGES.round(1).tolist(), "counts": self._activations.tolist()},
            "explained_variance_token": {
                "edges": EXPLAINED_EDGES[::20].round(2).tolist(),
                "counts": self._explained.reshape(-1, 20).sum(axis=1).tolist(),
            },
        }


def _token_sums(
    x: Float[np.ndarray, "batch d_model"],
    x_hat: Float[np.ndarray, "batch d_model"],
    error: Float[np.ndarray, " batch"],
    variance: Float[np.ndarray, " batch"],
    counts: Activity,
) -> Float[np.ndarray, "batch sum"]:
    """What each token adds to `_SUMS`."""
    norm, norm_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    dot, explained = np.einsum("bd,bd->b", x, x_hat), np.clip(1 - error / np.maximum(variance, _TINY), -1, 1)
    ratio, cosine = norm_hat / np.maximum(norm, _TINY), dot / np.maximum(norm * norm_hat, _TINY)
    return np.stack(
        [
            np.ones_like(dot), error, variance, explained, counts.l0, counts.l1, norm, norm_hat, ratio, norm_hat**2,
            dot, cosine,
        ],
        axis=1,
    )  # fmt: skip

"""What the latents of two SAEs do on the same tokens, whatever they read there: correlations and shared tokens.

Activations are sparse matrices [token, latent], of a row a token that both SAEs saw. They come
1. from a store with the hook points of both: sequences spread evenly over it are encoded by both;
2. or from two feature indices over the same text: each keeps the active latents of a sample of tokens, which hangs on
   the text and the seed alone (`sae.priorities`), so that the same tokens are in both. Activations are then 0 or 1.

With a and b the activations of two latents on n tokens, n_a, n_b and n_ab those on which either and both are active:

    correlation  = (n sum ab - sum a sum b) / sqrt((n sum a^2 - (sum a)^2) (n sum b^2 - (sum b)^2))     -1..1 (Pearson)
    a inside b   = n_ab / n_a                                                                           0..1

Sums come from products of sparse matrices, a part of the latents at a time; pairs that are never active together cannot
be what is looked for, and are not visited. Memory follows the active latents of the tokens and the size of a part.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse

from activations.progress import progress
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.codes import select
from sae.index_pass import block_tokens
from sae.index_state import load_sample
from sae.torch_view import TorchSae
from sae.wiring import Wiring, side_by_side

Activity = Any
"""activations [token, latent], a scipy.sparse.csr_array, which is not typed"""
_CELLS = 1 << 23
"""additions of a product of sparse matrices, and so pairs in memory, at a time"""


class Related(NamedTuple):
    """Pairs of latents by what they do: those that were asked for, and those that are correlated."""

    one: Int[np.ndarray, " pair"]
    """latents of the one SAE, ascending"""
    other: Int[np.ndarray, " pair"]
    """and those of the other"""
    correlation: Float[np.ndarray, " pair"]
    one_inside: Float[np.ndarray, " pair"]
    """share of the tokens of the one's latent on which the other's is active"""
    other_inside: Float[np.ndarray, " pair"]
    """share of the tokens of the other's latent on which the one's is active"""
    largest: Float[np.ndarray, " n"]
    """largest correlation of each latent of the one, 0 if none is above"""
    largest_back: Float[np.ndarray, " m"]
    """the same of the other"""


def from_store(store: ActivationStore, saes: Sequence[SaeArtefact], n_tokens: int) -> list[Activity]:
    """Activations of each SAE on about `n_tokens` unmasked tokens, in whole sequences spread evenly over the store.

    Raises: HookPointError if the store lacks one that an SAE reads.
    """
    wide = max(sae.d_sae for sae in saes)
    views = [(TorchSae(sae), Wiring.parse(sae.hook_point).reads) for sae in saes]
    names = tuple(dict.fromkeys(name for _, reads in views for name in reads))
    parts: list[list[Activity]] = [[] for _ in saes]
    spans = list(_spans(store, n_tokens, max(1, block_tokens(wide, torch.device("cpu")) // store.ctx)))
    with progress("compare", sum(stop - start for start, stop in spans), "seq") as advance:
        for start, stop in spans:
            mask = store.mask(start, stop)
            x = {name: store.activations(name, start, stop)[mask] for name in names}
            for part, (sae, reads) in zip(parts, views, strict=True):
                part.append(_encoded(sae, side_by_side(x, reads)))
            advance(stop - start)
    return [sparse.vstack(part, format="csr") for part in parts]


def from_indices(one: Path, other: Path, widths: tuple[int, int]) -> list[Activity]:
    """0 or 1 for each latent of two indices on the tokens that are in the samples of both; of none, no rows."""
    samples = [load_sample(path, d_sae) for path, d_sae in zip((one, other), widths, strict=True)]
    _, *rows = np.intersect1d(samples[0].priority.numpy(), samples[1].priority.numpy(), return_indices=True)
    activities = []
    for sample, row, d_sae in zip(samples, rows, widths, strict=True):
        starts = np.concatenate([[0], np.cumsum(sample.counts.numpy())])
        fired = np.ones(len(sample.latents), np.float32), sample.latents.numpy(), starts
        activities.append(sparse.csr_array(fired, (len(sample.counts), d_sae))[row])
    return activities


def related(
    one: Activity, other: Activity, least: float, asked: tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]
) -> Related:
    """Figures of the pairs of latents that are `asked` for, and of all with a correlation of at least `least` > 0."""
    sums = _Sums(one, other)
    m = other.shape[1]
    keys = np.sort(asked[0].astype(np.int64) * m + asked[1])
    largest, back, parts = np.zeros(one.shape[1]), np.zeros(m), []
    for low, high, pair, both, dot in sums.together():
        correlation = sums.correlation(pair // m, pair % m, dot)
        np.maximum.at(largest, pair // m, correlation)
        np.maximum.at(back, pair % m, correlation)
        within = keys[slice(*np.searchsorted(keys, (low * m, high * m)))]
        wanted = np.union1d(within, pair[correlation >= least])
        at = np.searchsorted(pair, wanted)
        is_there = np.append(pair, -1)[at] == wanted
        both, dot = (np.where(is_there, np.append(values, 0)[at], 0) for values in (both, dot))
        parts.append((wanted // m, wanted % m, sums.correlation(wanted // m, wanted % m, dot), both))
    i, j, correlation, both = (np.concatenate(column) for column in zip(*parts, strict=True))
    inside, inside_back = (both / np.maximum(active[k], 1) for active, k in zip(sums.active, (i, j), strict=True))
    return Related(i, j, correlation, inside, inside_back, largest, back)


class _Sums:
    """Sums over tokens of the activations of single latents and of pairs."""

    def __init__(self, one: Activity, other: Activity):
        self.n_tokens = one.shape[0]
        self._values = tuple(part.astype(np.float64) for part in (one, other))
        self._fired = tuple(_indicator(part) for part in self._values)
        self.active = tuple(np.asarray(part.sum(0)) for part in self._fired)
        self._total = tuple(np.asarray(part.sum(0)) for part in self._values)
        spreads = ((part.multiply(part).sum(0), total) for part, total in zip(self._values, self._total, strict=True))
        self._spread = tuple(np.sqrt(np.maximum(self.n_tokens * squares - total**2, 0)) for squares, total in spreads)

    def correlation(
        self, i: Int[np.ndarray, " pair"], j: Int[np.ndarray, " pair"], dot: Float[np.ndarray, " pair"]
    ) -> Float[np.ndarray, " pair"]:
        """Of latents i and j whose activations have this sum of products; 0 where one of them never changes."""
        spread = self._spread[0][i] * self._spread[1][j]
        return np.where(spread > 0, self.n_tokens * dot - self._total[0][i] * self._total[1][j], 0) / np.where(
            spread > 0, spread, 1
        )

    def together(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
        """Pairs that are active together, by latents `low` to `high` of the one, in ascending order.

        Yields: low, high, i * m + j of each pair, tokens on which both are active, and sum of products.
        """
        fired, values = (part.T.tocsr() for part in (self._fired[0], self._values[0]))
        m = self._values[1].shape[1]
        work = np.cumsum(fired @ self._fired[1].sum(1))
        cuts = np.flatnonzero(np.diff(work // _CELLS)) + 1
        bounds = [0, *cuts.tolist(), fired.shape[0]]
        for low, high in pairwise(bounds):
            both, dot = fired[low:high] @ self._fired[1], values[low:high] @ self._values[1]
            both.sort_indices()
            dot.sort_indices()
            row = np.repeat(np.arange(low, high, dtype=np.int64), np.diff(both.indptr))
            yield low, high, row * m + both.indices, both.data, dot.data


def _indicator(values: Activity) -> Activity:
    return sparse.csr_array((np.ones_like(values.data), values.indices, values.indptr), values.shape)


def _encoded(sae: TorchSae, x: Float[np.ndarray, "token d_in"]) -> Activity:
    with torch.inference_mode():
        codes = select(sae, sae.preactivations(torch.from_numpy(x)))
    place = codes.row.numpy(), codes.latent.numpy()
    return sparse.csr_array((codes.value.numpy(), place), (len(x), sae.d_sae))


def _spans(store: ActivationStore, n_tokens: int, most: int) -> Iterator[tuple[int, int]]:
    """Sequences to read, at most `most` of a span."""
    kept = np.concatenate([np.arange(part.start, part.stop) for part in store.kept()] or [np.zeros(0, int)])
    n_unmasked = sum(int(store.mask(part.start, part.stop).sum()) for part in store.kept())
    n = min(len(kept), -(-n_tokens * len(kept) // max(n_unmasked, 1)))
    chosen = kept[np.arange(n) * len(kept) // max(n, 1)]
    for run in np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1):
        for part in np.split(run, range(most, len(run), most)):
            if len(part):
                yield int(part[0]), int(part[-1]) + 1

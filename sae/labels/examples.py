"""Contexts of a latent as what an explainer is shown and what a label is tested on.

Flow for a latent:
1. one context a document, of its uniform sample and of its strongest, ordered by activation; of each two that follow
   each other, a coin sends one to the explainer and keeps the other for scoring, so that both sides span all quantiles
   and no document is on both;
2. each side is taken from quantile bins in turn;
3. as many contexts without it: half near misses, which are from sequences where it is never active, and half contexts
   of random other latents that were read anew and do not activate it (`sae.labels.reading`).

Everything follows from index and seed. Left out: what is asked about them (`sae.labels.questions`).
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae.contexts import Context
from sae.histogram import share_below
from sae.index_db import FeatureIndex, LatentRow
from sae.labels.words import one_line, shown

MARKED = 0.3
"""share of a context's largest activation above which a token is marked"""
MAX_LETTERS = 2000
"""letters of a context that are shown"""


class Case(NamedTuple):
    """One latent, with what it is explained from and scored on."""

    row: LatentRow
    shown: list[Context]
    """contexts for the explainer"""
    positives: list[Context]
    """others, of other documents, in which it is active too"""
    negatives: list[Context]
    """as many in which it is not"""

    @property
    def latent(self) -> int:
        """Its number."""
        return self.row.latent


class Pool(NamedTuple):
    """Contexts of random latents, and which latents are active in them."""

    contexts: list[Context]
    active: Bool[np.ndarray, "pool d_sae"]


def split(row: LatentRow, seed: int) -> tuple[list[Context], list[Context]]:
    """Contexts for the explainer and contexts for scoring, each strongest first."""
    ranked = sorted(row.one_a_document(), key=lambda context: -context.score)
    coins = np.random.default_rng([seed, row.latent]).integers(2, size=len(ranked) // 2 + 1).tolist()
    sides: tuple[list[Context], list[Context]] = [], []
    for rank, context in enumerate(ranked):
        sides[(coins[rank // 2] + rank) % 2].append(context)
    return sides


def spread(row: LatentRow, contexts: Iterable[Context], n: int, n_bins: int) -> list[Context]:
    """Up to `n` contexts from quantile bins of the latent's activation in turn, from the strongest bin on."""
    bins: list[list[Context]] = [[] for _ in range(n_bins)]
    for context in contexts:
        share = share_below(row.histogram, row.histogram_start, context.score)
        bins[n_bins - 1 - min(int(share * n_bins), n_bins - 1)].append(context)
    turns = max(map(len, bins), default=0)
    return [each[turn] for turn in range(turns) for each in bins if turn < len(each)][:n]


def draw_pool(index: FeatureIndex, n: int, seed: int) -> list[Context]:
    """A sampled context of each of up to `n` random latents, no two of one document."""
    live = index.latents(min_density=np.finfo(float).tiny)
    rng = np.random.default_rng([seed, 1])
    found: dict[tuple[int, int], Context] = {}
    for latent in rng.permutation(live).tolist():
        if len(found) == n:
            break
        for context in index.latent(latent).sampled:
            if (context.source, context.document) not in found:
                found[context.source, context.document] = context
                break
    return list(found.values())


def make_case(row: LatentRow, pool: Pool, n_shown: int, n_positives: int, n_bins: int, seed: int) -> Case:
    """The contexts of a latent, as many with it as without it."""
    offered, held = split(row, seed)
    shown = spread(row, offered, n_shown, n_bins)
    positives = spread(row, held, n_positives, n_bins)
    rng = np.random.default_rng([seed, row.latent, 2])
    silent = np.flatnonzero(~pool.active[:, row.latent])
    easy = _elsewhere([pool.contexts[i] for i in rng.permutation(silent).tolist()], [*offered, *held])
    near = _elsewhere(row.near_misses, shown)
    n_near = max(min(len(near), len(positives) // 2), len(positives) - len(easy))
    negatives = [*near[:n_near], *easy[: len(positives) - n_near]][: len(positives)]
    return Case(row, shown, positives[: len(negatives)], negatives)


def _elsewhere(contexts: Iterable[Context], others: Iterable[Context]) -> list[Context]:
    """Contexts of documents that others are not of."""
    taken = {(other.source, other.document) for other in others}
    return [context for context in contexts if (context.source, context.document) not in taken]


def marks(context: Context) -> Bool[np.ndarray, " window"]:
    """Which tokens of a context the latent is active on, weak activations left out."""
    return context.activations > MARKED * max(float(context.activations.max()), 0.0)


def wrong_marks(right: Bool[np.ndarray, " window"], seed: Sequence[int]) -> Bool[np.ndarray, " window"] | None:
    """As many marks, in the same pattern where that is possible, on none of the right tokens; none if there is no room.

    >>> wrong_marks(np.array([True, True, False, False, False, False]), [0]).nonzero()[0].tolist()
    [3, 4]
    """
    rng = np.random.default_rng(seed)
    n, others = int(right.sum()), np.flatnonzero(~right)
    if not n or n > len(others):
        return None
    for offset in rng.permutation(len(right)).tolist():
        moved = np.roll(right, offset)
        if not (moved & right).any():
            return moved
    wrong = np.zeros_like(right)
    wrong[rng.permutation(others)[:n]] = True
    return wrong


def text_of(
    decode: Callable[[list[int]], str], tokens: Int[np.ndarray, " n"], marked: Bool[np.ndarray, " n"] | None = None
) -> str:
    """A context in one line, with marked tokens between << and >>."""
    ids = tokens.tolist()
    if marked is None:
        return _line(decode(ids))
    edges = [0, *(np.flatnonzero(np.diff(marked)) + 1).tolist(), len(ids)]
    parts, before = [], ""
    for start, stop in pairwise(edges):
        after = decode(ids[:stop])  # from the start, because a tokenizer may drop the space of a first token
        text = after[len(before) :].replace("<<", "< <").replace(">>", "> >")
        before = after
        if marked[start] and text:
            inner = text.lstrip()
            parts.append(f"{text[: len(text) - len(inner)]}<<{inner or shown(text)}>>")
        else:
            parts.append(text)
    return _line("".join(parts))


def _line(text: str) -> str:
    return one_line(text.replace("\n", " ↵ "), MAX_LETTERS)


def strength(context: Context, largest: float) -> int:
    """1..10: the context's activation in tenths of the latent's largest.

    >>> strength(Context(0, 0, np.array([1]), np.array([3.0])), 4.0)
    8
    """
    share: Float[np.ndarray, ""] = np.asarray(context.activations.max() / max(largest, 1e-9))
    return int(np.clip(np.round(10 * share), 1, 10))

"""Which latents of two SAEs are the same, which are parents and children of each other: from weights and activations.

Flow of `classify`:
1. candidates: pairs with a decoder cosine of at least `child_cosine` (of a latent of the one at most MOST_PAIRS, the
   nearest), found in blocks (`sae.cosines`), and pairs with a correlation of at least `correlation`, from products of
   sparse matrices (`sae.same_tokens`);
2. cosines of decoder rows and encoder columns, correlation and shared tokens of each;
3. classes:

    matched     one to one: the assignment with the largest sum of decoder cosines among pairs whose decoder rows and
                encoder columns both have a cosine of at least `cosine`; at one hook point alone, since what another
                one has is read by another column
    aligned     the same whatever the encoder columns
    correlated  the same with correlations of at least `correlation`, whatever the weights
    split       a latent of the one with several children in the other. A child's parent is the nearest of those with a
                decoder cosine of at least `child_cosine` that, where activations are known, are active on at least a
                share `contained` of the child's tokens
    merged      the other way: several latents of the one are children of one of the other

Classes overlap: a latent that splits is mostly matched with one of its children. Sources: matching by both cosines,
Paulo and Belrose (arXiv 2501.16615); feature splitting, Bricken et al. 2023, "Towards Monosemanticity". Left out: files
and words (`sae.compare`).
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from sae.config import CompareConfig
from sae.cosines import near, paired
from sae.same_tokens import Activity, related

MOST_PAIRS = 32
Latents = Int[np.ndarray, " n"]


class Side(NamedTuple):
    """What is compared of an SAE: its latents that are not silent."""

    decoder: Float[Tensor, "n d_out"]
    encoder: Float[Tensor, "n d_in"]
    """a row a latent"""
    activity: Activity
    """on the tokens that both saw; None where that is not known"""


class Pairs(NamedTuple):
    """Pairs of latents, one of either SAE, in ascending order; NaN where activations are not known."""

    one: Latents
    other: Latents
    decoder_cosine: Float[np.ndarray, " n"]
    encoder_cosine: Float[np.ndarray, " n"]
    correlation: Float[np.ndarray, " n"]
    one_inside: Float[np.ndarray, " n"]
    """share of the one's active tokens on which the other is active"""
    other_inside: Float[np.ndarray, " n"]
    """share of the other's active tokens on which the one is active"""


class Found(NamedTuple):
    """What the comparison gave."""

    pairs: Pairs
    classes: dict[str, Bool[np.ndarray, " n"]]
    """which pairs make a class"""
    nearest: dict[str, tuple[np.ndarray, np.ndarray]]
    """largest decoder cosine, and correlation, of each latent of the one and of the other"""


def classify(one: Side, other: Side, config: CompareConfig, is_one_place: bool) -> Found:
    """Find the pairs of latents of two SAEs, and the class of each."""
    cosines = near(one.decoder, other.decoder, min(config.cosine, config.child_cosine), MOST_PAIRS)
    asked = cosines.row.numpy(), cosines.other.numpy()
    nearest = {"decoder_cosine": (cosines.largest.numpy(), cosines.largest_back.numpy())}
    correlation = inside = back = np.full(len(asked[0]), np.nan)
    if one.activity is not None:
        done = related(one.activity, other.activity, config.correlation, asked)
        asked, nearest["correlation"] = (done.one, done.other), (done.largest, done.largest_back)
        correlation, inside, back = done.correlation, done.one_inside, done.other_inside
    row, column = (torch.from_numpy(part) for part in asked)
    decoder = paired(one.decoder, other.decoder, row, column).numpy()
    encoder = paired(one.encoder, other.encoder, row, column).numpy()
    pairs = Pairs(*asked, decoder, encoder, correlation, inside, back)
    return Found(pairs, _classes(pairs, config, is_one_place, "correlation" in nearest), nearest)


def by_chance(side: Side, seed: int) -> Side:
    """Random directions in place of an SAE's, which do on shuffled tokens what its latents do."""
    generator = torch.Generator().manual_seed(seed)
    decoder, encoder = (torch.randn(part.shape, generator=generator) for part in (side.decoder, side.encoder))
    if side.activity is None:
        return Side(decoder, encoder, None)
    shuffled = np.random.default_rng(seed).permutation(side.activity.shape[0])
    return Side(decoder, encoder, side.activity[shuffled])


def assigned(row: Latents, column: Latents, weight: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which of the listed pairs are in the one-to-one assignment with the largest sum of weights, which are in 0..1.

    It equals the Hungarian method's on the whole matrix with 0 for pairs that are not listed, of which none counts.
    Each row may also take a column of its own, for a weight of 0: with those, an assignment of all rows exists.
    """
    chosen = np.zeros(len(row), bool)
    if not len(row):
        return chosen
    (rows, i), (columns, j) = (np.unique(part, return_inverse=True) for part in (row, column))
    n, m, own = len(rows), len(columns), np.arange(len(rows))
    costs = np.concatenate([2.0 - weight, np.full(n, 2.0)])  # above 0, since 0 would mean that there is no such pair
    graph = sparse.csr_array((costs, (np.concatenate([i, own]), np.concatenate([j, m + own]))), (n, m + n))
    taken = min_weight_full_bipartite_matching(graph)[1]
    return taken[i] == j


def families(
    parent: Latents, child: Latents, cosine: Float[np.ndarray, " n"], may: Bool[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Which of the pairs that `may` be are of a parent with several children, each child having its nearest parent."""
    where = np.flatnonzero(may)
    order = where[np.lexsort((parent[where], -cosine[where], child[where]))]
    nearest = order[np.unique(child[order], return_index=True)[1]]
    _, family, size = np.unique(parent[nearest], return_inverse=True, return_counts=True)
    result = np.zeros(len(parent), bool)
    result[nearest[size[family] > 1]] = True
    return result


def _classes(
    pairs: Pairs, config: CompareConfig, is_one_place: bool, has_activations: bool
) -> dict[str, Bool[np.ndarray, " n"]]:
    def contained(share: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return np.isnan(share) | (share >= config.contained)

    def one_to_one(weight: Float[np.ndarray, " n"], may: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        result = np.zeros(len(may), bool)
        result[may] = assigned(pairs.one[may], pairs.other[may], weight[may])
        return result

    is_near, has_children = pairs.decoder_cosine >= config.child_cosine, partial(families, cosine=pairs.decoder_cosine)
    is_aligned = pairs.decoder_cosine >= config.cosine
    classes = {"aligned": one_to_one(pairs.decoder_cosine, is_aligned)}
    if is_one_place:
        both = is_aligned & (pairs.encoder_cosine >= config.cosine)
        classes = {"matched": one_to_one(pairs.decoder_cosine, both)} | classes
    if has_activations:
        classes["correlated"] = one_to_one(pairs.correlation, pairs.correlation >= config.correlation)
    return classes | {
        "split": has_children(pairs.one, pairs.other, may=is_near & contained(pairs.other_inside)),
        "merged": has_children(pairs.other, pairs.one, may=is_near & contained(pairs.one_inside)),
    }

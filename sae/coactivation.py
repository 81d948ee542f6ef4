"""Which latents are active together, counted exactly on a uniform sample of tokens.

Counting all pairs takes d_sae^2 numbers, 17 GB at 65,536 latents, and L0^2 additions a token. So the codes of a
bottom-k sample of tokens are kept (`sae.priorities`): all of them while the text has no more, else as many of a uniform
sample without replacement, whichever blocks, runs or merges they came in. Pairs of it are counted exactly at the end.
With n_i, n_j and n_ij tokens of N on which i, j and both are active:

    Jaccard = n_ij / (n_i + n_j - n_ij)   0..1, 1 where they are always active together; it orders the list
    lift    = n_ij N / (n_i n_j)          1 where they have nothing to do with each other; its log is PMI

Memory is 2 * n tokens of codes. Left out: latents too rare to be in the sample, which have no list.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import Codes
from sae.priorities import LARGEST

MIN_TOGETHER = 2
"""tokens on which two latents must be active together; one is chance"""
_COUNTERS = 1 << 23


class TokenSample(NamedTuple):
    """The codes of some tokens."""

    priority: Int[Tensor, " token"]
    counts: Int[Tensor, " token"]
    """active latents of each token"""
    latents: Int[Tensor, " entry"]
    """those, one token behind the other"""
    bound: Int[Tensor, ""]
    """no token of a larger priority will be in the first n"""


class Partners(NamedTuple):
    """The latents that are most often active together with each latent, strongest first."""

    latent: Int[Tensor, "d_sae n"]
    jaccard: Float[Tensor, "d_sae n"]
    """0 where there are not as many"""
    lift: Float[Tensor, "d_sae n"]


def empty(device: torch.device | str) -> TokenSample:
    """A sample without tokens."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return TokenSample(none, none, none.int(), torch.tensor(LARGEST, device=device))


def add(sample: TokenSample, codes: Codes, priority: Int[Tensor, " row"], n: int) -> TokenSample:
    """The sample with more tokens; cut to the first `n` once it has twice as many."""
    is_in = priority <= sample.bound
    entry = is_in[codes.row]
    counts = torch.bincount(codes.row[entry], minlength=len(priority))[is_in]
    more = priority[is_in], counts, codes.latent[entry].int()
    joined = (torch.cat(parts) for parts in zip(sample[:3], more, strict=True))
    sample = TokenSample(*joined, bound=sample.bound)
    return first(sample, n) if len(sample.priority) > 2 * n else sample


def merged(sample: TokenSample, other: TokenSample, n: int) -> TokenSample:
    """The first `n` tokens of two samples of different tokens."""
    joined = (torch.cat(parts) for parts in zip(sample[:3], other[:3], strict=True))
    return first(TokenSample(*joined, bound=torch.minimum(sample.bound, other.bound)), n)


def first(sample: TokenSample, n: int) -> TokenSample:
    """The `n` tokens of smallest priority, in that order."""
    order = sample.priority.argsort()[:n]
    bound = sample.priority[order[-1]] if len(order) == n else sample.bound
    return TokenSample(sample.priority[order], sample.counts[order], sample.latents[_entries(sample, order)], bound)


def partners(sample: TokenSample, d_sae: int, n: int) -> Partners:
    """The `n` latents with the largest Jaccard index with each latent, over the sample."""
    device, n = sample.latents.device, min(n, d_sae - 1)
    token = torch.arange(len(sample.counts), device=device).repeat_interleave(sample.counts)
    by_latent = sample.latents.long().argsort(stable=True)
    latent, token = sample.latents.long()[by_latent], token[by_latent]
    active = torch.bincount(latent, minlength=d_sae)
    ends = active.cumsum(0)
    rows = max(1, _COUNTERS // d_sae)
    parts = []
    for low in range(0, d_sae, rows):
        high = min(low + rows, d_sae)
        part = slice(int(ends[low] - active[low]), int(ends[high - 1]))
        together = _together(sample, latent[part] - low, token[part], high - low, d_sae)
        together[torch.arange(high - low, device=device), torch.arange(low, high, device=device)] = 0
        either = active[low:high, None] + active[None] - together
        jaccard = torch.where(together >= MIN_TOGETHER, together / either.clamp(min=1), 0.0)
        values, other = jaccard.topk(n, dim=1)
        both = together.gather(1, other).double()
        lift = both * len(sample.counts) / (active[low:high, None] * active[other]).clamp(min=1)
        parts.append((other, values, lift.float()))
    return Partners(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _together(
    sample: TokenSample, latent: Int[Tensor, " entry"], token: Int[Tensor, " entry"], n: int, d_sae: int
) -> Int[Tensor, "n d_sae"]:
    """Tokens on which each of `n` latents is active together with each latent; a part of the entries at a time."""
    together = torch.zeros(n * d_sae, dtype=torch.int32, device=latent.device)
    most = int(sample.counts.max()) if len(sample.counts) else 1
    for rows, tokens in zip(*(part.split(max(1, _COUNTERS // (8 * most))) for part in (latent, token)), strict=True):
        pair = (rows * d_sae).repeat_interleave(sample.counts[tokens]) + sample.latents[_entries(sample, tokens)]
        together.index_add_(0, pair, torch.ones_like(pair, dtype=torch.int32))
    return together.view(n, d_sae)


def _entries(sample: TokenSample, tokens: Int[Tensor, " n"]) -> Int[Tensor, " entry"]:
    """Where the codes of some tokens are, one token behind the other."""
    ends, counts = sample.counts.cumsum(0)[tokens], sample.counts[tokens]
    behind = counts.cumsum(0)
    shift = (ends - behind).repeat_interleave(counts)
    return torch.arange(len(shift), device=shift.device) + shift

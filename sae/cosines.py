"""Rows of two matrices by cosine, exact, in blocks, so that memory does not grow with the product of their numbers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_CELLS = 1 << 25
"""cosines in memory, 128 MiB of float32"""


class Near(NamedTuple):
    """How the n rows of one matrix lie to the m rows of another."""

    largest: Float[Tensor, " n"]
    """largest cosine of each row of the one"""
    largest_back: Float[Tensor, " m"]
    """largest cosine of each row of the other"""
    row: Int[Tensor, " pair"]
    """rows of the one, ascending, in pairs with a cosine of at least what was asked for"""
    other: Int[Tensor, " pair"]
    """and those of the other"""


def nearest(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], k: int, *, same: bool = False
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest cosines of each row of a with rows of b, k being at most their number, and which rows these are.

    Args:
      same: a and b are one matrix, and each row has itself last, at -inf. Rows of zeros have cosine 0.
    """
    parts = []
    for start, cosines in _blocks(a, b):
        if same:
            rows = torch.arange(len(cosines), device=cosines.device)
            cosines[rows, rows + start] = -torch.inf
        parts.append(cosines.topk(k, dim=1))
    values, indices = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(indices)


def mean_largest(a: Float[Tensor, "n d"], others: Sequence[Float[Tensor, "_ d"]]) -> Float[Tensor, " n"]:
    """The largest cosine of each row of a with rows of another matrix, the mean over several; NaN for none."""
    if not others:
        return torch.full((len(a),), torch.nan, device=a.device)
    return torch.stack([nearest(a, other, 1)[0][:, 0] for other in others]).mean(0)


def near(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], least: float, most: int) -> Near:
    """The largest cosine of each row of either, and all pairs of rows with a cosine of at least `least` above 0.

    Of a row of a that has more than `most` such pairs, the `most` with the largest cosines.
    """
    largest, back, pairs = [], torch.full((len(b),), -torch.inf, device=b.device), []
    for start, cosines in _blocks(a, b):
        largest.append(cosines.amax(1))
        back = torch.maximum(back, cosines.amax(0))
        is_near = cosines >= least
        crowded = (is_near.sum(1) > most).nonzero().squeeze(1)
        if len(crowded):
            kept = cosines[crowded].topk(most, dim=1).indices
            is_near[crowded] = torch.zeros_like(is_near[crowded]).scatter(1, kept, True)
        row, other = is_near.nonzero(as_tuple=True)
        pairs.append((row + start, other))
    row, other = (torch.cat(part) for part in zip(*pairs, strict=True))
    return Near(torch.cat(largest), back, row, other)


def paired(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], row: Int[Tensor, " pair"], other: Int[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    """Cosines of rows of a with rows of b, pair by pair."""
    step = max(1, _CELLS // a.shape[1])
    parts = zip(row.split(step), other.split(step), strict=True)
    return torch.cat([functional.cosine_similarity(a[i], b[j], dim=1) for i, j in parts])


def _blocks(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Iterator[tuple[int, Float[Tensor, "part m"]]]:
    """Cosines of some rows of a with all rows of b, and the number of the first of them."""
    b = functional.normalize(b.float(), dim=1)
    step = max(1, _CELLS // len(b))
    for start in range(0, len(a), step):
        yield start, functional.normalize(a[start : start + step].float(), dim=1) @ b.T

"""Nearest rows by cosine, exact, in blocks, so that memory does not grow with the square of their number."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_CELLS = 1 << 25
"""cosines in memory, 128 MiB of float32"""


def nearest(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], k: int, *, same: bool = False
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest cosines of each row of a with rows of b, k being at most their number, and which rows these are.

    Args:
      same: a and b are one matrix, and each row has itself last, at -inf. Rows of zeros have cosine 0.
    """
    a, b = (functional.normalize(part.float(), dim=1) for part in (a, b))
    step, parts = max(1, _CELLS // len(b)), []
    for start in range(0, len(a), step):
        cosines = a[start : start + step] @ b.T
        if same:
            rows = torch.arange(len(cosines), device=cosines.device)
            cosines[rows, rows + start] = -torch.inf
        parts.append(cosines.topk(k, dim=1))
    values, indices = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(indices)

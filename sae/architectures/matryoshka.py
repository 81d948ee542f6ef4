"""Matryoshka BatchTopK: nested dictionaries, each of which must reconstruct on its own.

The latents are split into groups; the first m groups make the m-th dictionary, and the loss is the mean of their
squared errors. General features settle in the small dictionaries and special ones in the rest, which lessens absorption
at some cost in reconstruction. Latents are selected as in BatchTopK, over all groups. Source: Bussmann et al. 2025,
arXiv:2503.17547.
"""

from itertools import pairwise
from typing import ClassVar

from jaxtyping import Array, Float, Key

from activations.errors import ConfigError
from sae.architectures.base import Means
from sae.architectures.batchtopk import BatchTopK
from sae.config import SaeConfig
from sae.kernels import Codes, decode_nested


class Matryoshka(BatchTopK):
    """BatchTopK with a loss on each nested dictionary."""

    widens: ClassVar[bool] = False

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """As BatchTopK; raises ConfigError if the groups do not split the latents."""
        super().__init__(config, means, key)
        self.bounds = bounds(config.groups, self.d_sae)

    def errors(
        self, codes: Codes, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"]
    ) -> tuple[Float[Array, ""], Float[Array, "batch d_out"]]:
        """Mean over the nested dictionaries, and the residual of the largest."""
        residuals = (y - self.b_dec[...])[:, None] - decode_nested(codes, self.W_dec[...], self.bounds)
        return (residuals**2).sum(axis=2).mean(), residuals[:, -1]


def bounds(groups: tuple[float, ...], d_sae: int) -> tuple[int, ...]:
    """Where the groups begin and end.

    Raises: ConfigError if the shares do not add up to 1 or a group would be empty.

    >>> bounds((0.25, 0.25, 0.5), 64)
    (0, 16, 32, 64)
    """
    where, fix = "sae.groups", "Give shares of the latents that add up to 1, none too small for d_sae."
    if abs(sum(groups) - 1) > 1e-6:
        raise ConfigError(where, expected="shares that add up to 1", got=f"{sum(groups):g}", fix=fix)
    edges = (0, *(round(d_sae * sum(groups[: i + 1])) for i in range(len(groups))))
    if any(low >= high for low, high in pairwise(edges)):
        raise ConfigError(where, expected=f"at least one of d_sae={d_sae} latents a group", got=list(groups), fix=fix)
    return edges

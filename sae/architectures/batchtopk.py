"""BatchTopK: each batch keeps its k * batch largest latents, so that tokens share a budget.

latents = pre * (pre >= cutoff) with the cutoff that leaves k * batch positive ones. Only the 2k largest of a token
compete, which avoids a sort over batch * d_sae values. Source: Bussmann et al. 2024, arXiv:2412.06410.

At inference a token stands alone: latents = pre * (pre > threshold), a JumpReLU, which is how the SAE is saved. A
running mean of the cutoffs, as in the paper, would let more than k pass, since cutoffs are taken where no token has
more than 2k. So the threshold is moved by what it lets pass itself: each step multiplies it by (passing / k)^0.1.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from sae.architectures.base import Context, Means, Output
from sae.architectures.selecting import Amount, Selecting
from sae.artefact import SavedArchitecture
from sae.config import SaeConfig
from sae.kernels import Codes, keep_above, kth_largest, largest

RATE = 0.1


class BatchTopK(Selecting):
    """The k * batch largest latents of each batch."""

    threshold: nnx.BatchStat[Float[Array, ""]]

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """As all SAEs start; the threshold is 0 until a batch was seen."""
        super().__init__(config, means, key)
        self.threshold = nnx.BatchStat(jnp.float32(0))

    def select(self, x: Float[Array, "batch d_in"], k: Amount, most: Amount) -> tuple[Codes, dict[str, Array]]:
        """The k * batch largest, at most `most` of a token; their cutoff, and how many a token pass the threshold."""
        weights = self.W_enc[...], self.b_enc[...]
        candidates, passing = largest(x - self.centre, *weights, most, self.slots, self.threshold[...])
        codes = keep_above(candidates, kth_largest(candidates.values, k * len(x)), self.d_sae)
        cutoff = jnp.where(codes.values > 0, codes.values, jnp.inf).min()
        return codes, {"cutoff": cutoff, "passing": passing.mean()}

    def observe(self, output: Output, context: Context) -> None:
        """Move the threshold to where k pass; it starts at the first batch's cutoff."""
        old, cutoff = self.threshold[...], output.observed["cutoff"]
        excess = jnp.clip(output.observed["passing"] / self.aim(context), 0.1, 10)
        moved = jnp.where(old == 0, cutoff, old * excess**RATE)
        self.threshold[...] = jnp.where(jnp.isfinite(cutoff), moved, old)

    def saved(self) -> tuple[SavedArchitecture, np.ndarray | None, int | None]:
        """Saved as jumprelu, with the same threshold for each latent."""
        return "jumprelu", np.full(self.d_sae, self.threshold[...], np.float32), None

    def adopt_threshold(self, threshold: Float[Array, " d_sae"]) -> None:
        """Start from the median of those that are finite."""
        self.threshold[...] = jnp.nanmedian(jnp.where(jnp.isfinite(threshold), threshold, jnp.nan))

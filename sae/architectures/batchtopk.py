"""BatchTopK: each batch keeps its k * batch largest latents, so that tokens share a budget.

latents = pre * (pre >= cutoff) with the cutoff that leaves k * batch positive ones. At inference a token stands alone:
the cutoff's exponential moving average becomes the threshold of a JumpReLU, latents = pre * (pre > threshold), which is
how the SAE is saved. Source: Bussmann et al. 2024, arXiv:2412.06410.

Only the 2k largest latents of a token compete, which avoids a sort over batch * d_sae values.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key

from sae.architectures.base import Context, Means, Output
from sae.architectures.selecting import Selecting
from sae.artefact import SavedArchitecture
from sae.config import SaeConfig
from sae.kernels import Codes, kth_largest

CAPACITY = 2
EMA_RATE = 0.1


class BatchTopK(Selecting):
    """The k * batch largest latents of each batch."""

    threshold: nnx.BatchStat[Float[Array, ""]]

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """As all SAEs start; the threshold is 0 until a batch was seen."""
        super().__init__(config, means, key)
        self.threshold = nnx.BatchStat(jnp.float32(0))

    def select(self, pre: Float[Array, "batch d_sae"]) -> Codes:
        """The k * batch largest, at most 2k of them in a row."""
        values, indices = lax.top_k(jax.nn.relu(pre), min(CAPACITY * self.config.k, pre.shape[1]))
        cutoff = kth_largest(values, self.config.k * len(values))
        return Codes(jnp.where(values >= cutoff, values, 0), indices)

    def observe(self, output: Output, context: Context) -> None:
        """Move the threshold towards this batch's cutoff, its smallest active latent."""
        old = self.threshold[...]
        moved = jnp.where(old == 0, output.cutoff, old + EMA_RATE * (output.cutoff - old))
        self.threshold[...] = jnp.where(jnp.isfinite(output.cutoff), moved, old)

    def saved(self) -> tuple[SavedArchitecture, np.ndarray | None, int | None]:
        """Saved as jumprelu, with the same threshold for each latent."""
        return "jumprelu", np.full(self.d_sae, self.threshold[...], np.float32), None

    def adopt_threshold(self, threshold: Float[Array, " d_sae"]) -> None:
        """Start from the median of those that are finite."""
        self.threshold[...] = jnp.nanmedian(jnp.where(jnp.isfinite(threshold), threshold, jnp.nan))

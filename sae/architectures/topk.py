"""TopK: each token keeps its k largest latents.

latents = TopK_k(relu((x - b_dec) @ W_enc + b_enc)). L0 is k wherever k pre-activations are positive.
Source: Makhzani & Frey 2013, arXiv:1312.5663; Gao et al. 2024, arXiv:2406.04093.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae.architectures.selecting import SPARE, Selecting, largest
from sae.artefact import SavedArchitecture
from sae.kernels import Codes


class TopK(Selecting):
    """The k largest latents of each token."""

    def select(
        self,
        pre: Float[Array, "batch d_sae"],
        k: int | float | Float[Array, ""],
        most: Float[Array, ""] | None = None,
    ) -> Codes:
        """The k largest of each row; where fewer are positive, zeros fill up."""
        width = self.config.k * SPARE if self.config.k_anneal else self.config.k
        values, indices = largest(jax.nn.relu(pre), min(width, pre.shape[1]))
        return Codes(jnp.where(jnp.arange(values.shape[1]) < k, values, 0), indices)

    def saved(self) -> tuple[SavedArchitecture, np.ndarray | None, int | None]:
        """Saved as topk."""
        return "topk", None, self.config.k

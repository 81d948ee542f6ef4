"""TopK: each token keeps its k largest latents.

latents = TopK_k(relu((x - b_dec) @ W_enc + b_enc)). L0 is k wherever k pre-activations are positive.
Source: Makhzani & Frey 2013, arXiv:1312.5663; Gao et al. 2024, arXiv:2406.04093.
"""

import numpy as np
from jaxtyping import Array, Float

from sae.architectures.selecting import Amount, Selecting
from sae.artefact import SavedArchitecture
from sae.kernels import Codes, largest


class TopK(Selecting):
    """The k largest latents of each token."""

    def select(self, x: Float[Array, "batch d_in"], k: Amount, most: Amount) -> tuple[Codes, dict[str, Array]]:
        """The k largest of each token; where fewer are positive, zeros fill up."""
        slots = self.slots if self.config.k_anneal else self.config.k
        return largest(x - self.centre, self.W_enc[...], self.b_enc[...], k, slots)[0], {}

    def saved(self) -> tuple[SavedArchitecture, np.ndarray | None, int | None]:
        """Saved as topk."""
        return "topk", None, self.config.k

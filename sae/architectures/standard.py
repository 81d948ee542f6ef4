"""Standard: every positive pre-activation is a latent, and an L1 penalty keeps them few.

latents = relu((x - b_dec) @ W_enc + b_enc), penalty = mean over tokens of sum_j latents_j / d_model; decoder rows have
norm 1, so that latents cannot shrink for free. The penalty shrinks all latents, which the others here avoid.
Source: Bricken et al. 2023, transformer-circuits.pub/2023/monosemantic-features; Cunningham et al. 2023,
arXiv:2309.08600.
"""

import jax
import numpy as np
from jaxtyping import Array, Float

from sae.architectures.penalised import Penalised, mean_norm
from sae.artefact import SavedArchitecture


class Standard(Penalised):
    """ReLU and L1."""

    def activate(self, x: Float[Array, "batch d_in"]) -> tuple[Float[Array, "batch d_sae"], dict[str, Array]]:
        """relu(pre), and its L1 norm."""
        latents = jax.nn.relu(self.preactivations(x))
        return latents, {"sparsity": mean_norm(latents) / x.shape[1]}

    def saved(self) -> tuple[SavedArchitecture, np.ndarray | None, int | None]:
        """Saved as standard."""
        return "standard", None, None

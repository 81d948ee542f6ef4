"""Gated: one set of pre-activations decides which latents are active, another how strong they are.

    gate      = (x - b_dec) @ W_enc + b_enc
    magnitude = (x - b_dec) @ (W_enc exp(r_mag)) + b_mag
    latents   = relu(magnitude) where gate > 0
    loss adds   coefficient * sum_j relu(gate_j) / d_model   and   ||y - relu(gate) @ W_dec - b_dec||^2 / d_model

in which the last term, through a decoder that gets no gradient from it, keeps the gates meaningful. The penalty touches
the gates alone, so that it does not shrink the latents. Source: Rajamanoharan et al. 2024, arXiv:2404.16014, who note
that this is a JumpReLU: gate > 0 where magnitude > b_mag - b_enc exp(r_mag). It is saved as one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key

from sae.architectures.base import Means, Scaling
from sae.architectures.penalised import Penalised, mean_norm
from sae.artefact import SaeArtefact, SavedArchitecture
from sae.config import SaeConfig
from sae.kernels import project, reconstruct


class Gated(Penalised):
    """Gates and magnitudes with shared encoder directions; b_enc is the bias of the gates."""

    r_mag: nnx.Param[Float[Array, " d_sae"]]
    b_mag: nnx.Param[Float[Array, " d_sae"]]

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """As all SAEs start; gates and magnitudes are equal at first."""
        super().__init__(config, means, key)
        self.r_mag, self.b_mag = nnx.Param(jnp.zeros(self.d_sae)), nnx.Param(jnp.zeros(self.d_sae))

    def activate(self, x: Float[Array, "batch d_in"]) -> tuple[Float[Array, "batch d_sae"], dict[str, Array]]:
        """Gated magnitudes, the L1 norm of the gates, and what the gates alone leave unexplained."""
        projected = project(x, self.W_enc[...], self.centre)
        gate = projected + self.b_enc[...]
        magnitude = projected * jnp.exp(self.r_mag[...]) + self.b_mag[...]
        W_dec, b_dec = lax.stop_gradient((self.W_dec[...], self.b_dec[...]))
        open_gates, d = jax.nn.relu(gate), x.shape[1]
        error = x - b_dec - reconstruct(open_gates, W_dec)
        terms = {"sparsity": mean_norm(open_gates) / d, "gate_error": (error**2).sum(axis=1).mean() / d}
        return jnp.where(gate > 0, jax.nn.relu(magnitude), 0), terms

    def saved_encoder(self) -> tuple[Float[np.ndarray, "d_in d_sae"], Float[np.ndarray, " d_sae"]]:
        """Of the magnitudes."""
        return np.asarray(self.W_enc[...] * jnp.exp(self.r_mag[...])), np.asarray(self.b_mag[...])

    def saved(self) -> tuple[SavedArchitecture, np.ndarray | None, int | None]:
        """Saved as the jumprelu that it is."""
        return "jumprelu", np.asarray(self.b_mag[...] - self.b_enc[...] * jnp.exp(self.r_mag[...])), None

    def adopt(self, artefact: SaeArtefact, scaling: Scaling) -> None:
        """Magnitudes from the encoder of any SAE, gates that open at its thresholds."""
        self.r_mag[...] = jnp.zeros(self.d_sae)
        super().adopt(artefact, scaling)
        if artefact.threshold is None:
            self.b_mag[...] = self.b_enc[...]

    def adopt_threshold(self, threshold: Float[Array, " d_sae"]) -> None:
        """gate = magnitude - threshold."""
        self.b_mag[...] = self.b_enc[...]
        self.b_enc[...] -= jnp.where(jnp.isfinite(threshold), threshold, 1e3)

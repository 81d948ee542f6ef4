"""What all sparse autoencoders here share: four parameters, the losses, and the way to disk.

    latents = select(relu((x - b_dec) @ W_enc + b_enc)),   x_hat = latents @ W_dec + b_dec
    loss = ||x - x_hat||^2 / variance + aux_coefficient * aux_loss

An architecture is a subclass that says which latents stay active. Inputs are centred on b_dec and scaled to unit
variance a dimension by the trainer; `to_artefact` folds that scale away. Left out: the optimiser and the data.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key

from sae.artefact import SaeArtefact, SavedArchitecture
from sae.config import SaeConfig
from sae.kernels import Codes, attach, decode

Sae = TypeVar("Sae", bound="SparseCoder")


class Output(NamedTuple):
    """What one batch gives."""

    loss: Float[Array, ""]
    """what training minimises"""
    fvu: Float[Array, ""]
    """mean squared error over the variance of the store: 0 is perfect, 1 is predicting the mean"""
    aux: Float[Array, ""]
    """share of the residual that dead latents leave unexplained; 0 if none is dead"""
    codes: Codes
    """the active latents"""


class SparseCoder(nnx.Module):
    """Parameters and losses of a sparse autoencoder; subclasses choose the active latents."""

    W_enc: nnx.Param[Float[Array, "d_model d_sae"]]
    b_enc: nnx.Param[Float[Array, " d_sae"]]
    W_dec: nnx.Param[Float[Array, "d_sae d_model"]]
    b_dec: nnx.Param[Float[Array, " d_model"]]

    def __init__(self, config: SaeConfig, mean: Float[Array, " d_model"], key: Key[Array, ""]):
        """Start from random unit decoder rows, the encoder tied to them, and b_dec at the dataset mean."""
        rows = unit_rows(jax.random.normal(key, (config.width(len(mean)), len(mean))))
        self.config = config
        self.W_enc, self.b_enc = nnx.Param(rows.T), nnx.Param(jnp.zeros(len(rows)))
        self.W_dec, self.b_dec = nnx.Param(rows), nnx.Param(jnp.asarray(mean, jnp.float32))

    def preactivations(self, x: Float[Array, "batch d_model"]) -> Float[Array, "batch d_sae"]:
        """(x - b_dec) @ W_enc + b_enc."""
        return (x - self.b_dec[...]) @ self.W_enc[...] + self.b_enc[...]

    def select(self, pre: Float[Array, "batch d_sae"]) -> Codes:
        """Active latents of a training batch, given its pre-activations."""
        raise NotImplementedError

    def encode(self, x: Float[Array, "batch d_model"]) -> Float[Array, "batch d_sae"]:
        """Latents at inference, where each token stands alone."""
        raise NotImplementedError

    def decode(self, latents: Float[Array, "batch d_sae"]) -> Float[Array, "batch d_model"]:
        """latents @ W_dec + b_dec."""
        return latents @ self.W_dec[...] + self.b_dec[...]

    def observe(self, codes: Codes) -> None:
        """Update running statistics after a training step; most architectures have none."""

    def loss(
        self, x: Float[Array, "batch d_model"], variance: float, idle: Int[Array, " d_sae"], dead_after: int
    ) -> Output:
        """Losses of a batch.

        Args:
          x: scaled activations.
          variance: mean ||x - mean||^2 over the store, in the same scale.
          idle: tokens since each latent was last active.
          dead_after: how many such tokens make a latent dead.
        """
        weights = self.W_enc[...], self.b_enc[...], self.b_dec[...]
        codes = attach(self.select(lax.stop_gradient(self.preactivations(x))), x, *weights)
        residual = x - self.b_dec[...] - decode(codes, self.W_dec[...])
        fvu = (residual**2).sum(axis=1).mean() / variance
        aux = self.aux_loss(x, lax.stop_gradient(residual), idle, dead_after)
        return Output(fvu + self.config.aux_coefficient * aux, fvu, aux, codes)

    def aux_loss(
        self,
        x: Float[Array, "batch d_model"],
        residual: Float[Array, "batch d_model"],
        idle: Int[Array, " d_sae"],
        dead_after: int,
    ) -> Float[Array, ""]:
        """AuxK: the share of the residual's variance that dead latents leave unexplained, or 0 if none is dead.

        ||r - relu(pre) @ W_dec||^2 / ||r - mean r||^2 over the aux_k longest idle dead latents; gradients reach their
        encoder columns and decoder rows, and nothing else. Source: Gao et al. 2024, arXiv:2406.04093, A.2, who choose
        the aux_k dead latents anew for each token; here a queue does, since a second top-k costs as much as the first.
        """
        tokens, chosen = lax.top_k(idle, min(self.config.aux_k, len(idle)))
        dead = tokens >= dead_after

        def unexplained() -> Array:
            W_enc, W_dec = self.W_enc[...].T[chosen], self.W_dec[...][chosen]
            pre = (x - lax.stop_gradient(self.b_dec[...])) @ W_enc.T + self.b_enc[...][chosen]
            error = residual - jnp.where(dead, jax.nn.relu(pre), 0) @ W_dec
            centred = residual - residual.mean(axis=0)
            return (error**2).sum() / jnp.maximum((centred**2).sum(), 1e-12)

        return lax.cond(dead.any(), unexplained, lambda: jnp.float32(0))

    def threshold_and_k(self) -> tuple[SavedArchitecture, np.ndarray | None, int | None]:
        """Name of the saved form, its thresholds or none, its k or none."""
        raise NotImplementedError

    def to_artefact(self, scale: float, metadata: dict) -> SaeArtefact:
        """The SAE as it is saved: it reads raw activations, which are the trainer's inputs divided by `scale`."""
        architecture, threshold, k = self.threshold_and_k()
        raw = np.float32(1 / scale)
        return SaeArtefact(
            architecture=architecture,
            W_enc=np.asarray(self.W_enc[...]),
            b_enc=np.asarray(self.b_enc[...]) * raw,
            W_dec=np.asarray(self.W_dec[...]),
            b_dec=np.asarray(self.b_dec[...]) * raw,
            threshold=None if threshold is None else threshold * raw,
            k=k,
            metadata=metadata,
        )

    @classmethod
    def from_artefact(cls: type[Sae], artefact: SaeArtefact) -> Sae:
        """The SAE that was saved, for inference on raw activations; training settings are not restored."""
        config = SaeConfig(d_sae=artefact.d_sae, k=artefact.k or 1)
        sae = cls(config, jnp.asarray(artefact.b_dec), jax.random.key(0))
        for name in ("W_enc", "b_enc", "W_dec"):
            getattr(sae, name)[...] = jnp.asarray(getattr(artefact, name))
        return sae


def unit_rows(W: Float[Array, "d_sae d_model"]) -> Float[Array, "d_sae d_model"]:
    """Scale each row to norm 1."""
    return W / jnp.maximum(jnp.linalg.norm(W, axis=1, keepdims=True), 1e-12)


def project_gradient(
    W_dec: Float[Array, "d_sae d_model"], g: Float[Array, "d_sae d_model"]
) -> Float[Array, "d_sae d_model"]:
    """Remove from each row of `g` the part along the same, unit, row of W_dec, which would only change its norm."""
    return g - (g * W_dec).sum(axis=1, keepdims=True) * W_dec

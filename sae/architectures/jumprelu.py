"""JumpReLU: a latent is active where its pre-activation passes a threshold of its own, which is learnt.

    latents = pre * (pre > threshold),   pre = (x - b_dec) @ W_enc + b_enc

The step has no useful gradient, so that thresholds get one from the pre-activations within half a bandwidth of them:
d latents / d threshold = -threshold / bandwidth and d [pre > threshold] / d threshold = -1 / bandwidth there, 0 elsewhere.

`JumpReLU` adds coefficient * (L0 / k - 1)^2, whose gradient moves thresholds alone. `TanhJumpReLU` adds
coefficient * sum_j tanh(4 latents_j) / d_model, whose gradient reaches everything. Thresholds are parameters themselves, not their logarithms, whose steps are far too small,
and start where k of d_sae normally distributed pre-activations would pass. Dead latents are revived as in the other
architectures (AuxK), instead of by a penalty on their pre-activations.

Source: Rajamanoharan et al. 2024, arXiv:2407.14435 (straight-through gradients and the quadratic form); Anthropic 2025,
transformer-circuits.pub/2025/january-update (tanh).
"""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Key

from sae.architectures.base import Context, Means, Output
from sae.architectures.penalised import Penalised
from sae.artefact import SavedArchitecture
from sae.config import SaeConfig

TANH_SLOPE = 4.0


class JumpReLU(Penalised):
    """Thresholds that aim at an L0 of k."""

    start: ClassVar[float] = 1.0
    threshold: nnx.Param[Float[Array, " d_sae"]]

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """As all SAEs start, with thresholds that let k normally distributed pre-activations pass."""
        super().__init__(config, means, key)
        self.threshold = nnx.Param(jnp.full(self.d_sae, jnp.maximum(ndtri(1 - config.k / self.d_sae), 0.01)))

    def activate(self, x: Float[Array, "batch d_in"]) -> tuple[Float[Array, "batch d_sae"], dict[str, Array]]:
        """pre where it passes, and how far L0 is from k."""
        pre, threshold, bandwidth = self.preactivations(x), self.threshold[...], self.config.bandwidth
        l0 = passes(pre, threshold, bandwidth).sum(axis=1).mean()
        return jump(pre, threshold, bandwidth), {"sparsity": (l0 / self.config.k - 1) ** 2}

    def observe(self, output: Output, context: Context) -> None:
        """Nothing: the penalty names its target itself."""

    def saved(self) -> tuple[SavedArchitecture, np.ndarray | None, int | None]:
        """Saved as jumprelu."""
        return "jumprelu", np.asarray(self.threshold[...]), None

    def adopt_threshold(self, threshold: Float[Array, " d_sae"]) -> None:
        """Start from these; a latent that was switched off starts from the median."""
        finite = jnp.isfinite(threshold)
        median = jnp.nanmedian(jnp.where(finite, threshold, jnp.nan))
        self.threshold[...] = jnp.where(finite, threshold, median)


class TanhJumpReLU(JumpReLU):
    """A penalty that counts latents, smoothly, as far as they are small."""

    start: ClassVar[float] = 1e-3

    def activate(self, x: Float[Array, "batch d_in"]) -> tuple[Float[Array, "batch d_sae"], dict[str, Array]]:
        """pre where it passes, and the sum of their tanh."""
        latents = jump(self.preactivations(x), self.threshold[...], self.config.bandwidth)
        return latents, {"sparsity": jnp.tanh(TANH_SLOPE * latents).sum(axis=1).mean() / x.shape[1]}

    def observe(self, output: Output, context: Context) -> None:
        """Move the weight of the penalty, as with all penalties but the quadratic one."""
        super(JumpReLU, self).observe(output, context)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(
    pre: Float[Array, "batch d_sae"], threshold: Float[Array, " d_sae"], bandwidth: float
) -> Float[Array, "batch d_sae"]:
    """relu(pre) where pre > threshold, else 0; thresholds get a straight-through gradient."""
    return jnp.where(pre > threshold, jax.nn.relu(pre), 0)


def _jump_forward(pre: Array, threshold: Array, bandwidth: float) -> tuple[Array, tuple[Array, Array]]:
    return jump(pre, threshold, bandwidth), (pre, threshold)


def _jump_backward(bandwidth: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    pre, threshold = saved
    near = jnp.abs(pre - threshold) < bandwidth / 2
    to_pre = jnp.where((pre > threshold) & (pre > 0), g, 0)
    return to_pre, -(threshold / bandwidth) * jnp.where(near, g, 0).sum(axis=0)


jump.defvjp(_jump_forward, _jump_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def passes(
    pre: Float[Array, "batch d_sae"], threshold: Float[Array, " d_sae"], bandwidth: float
) -> Float[Array, "batch d_sae"]:
    """1 where pre > threshold, else 0; only thresholds get a straight-through gradient."""
    return (pre > threshold).astype(pre.dtype)


def _passes_forward(pre: Array, threshold: Array, bandwidth: float) -> tuple[Array, tuple[Array, Array]]:
    return passes(pre, threshold, bandwidth), (pre, threshold)


def _passes_backward(bandwidth: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    pre, threshold = saved
    near = jnp.abs(pre - threshold) < bandwidth / 2
    return jnp.zeros_like(pre), -jnp.where(near, g, 0).sum(axis=0) / bandwidth


passes.defvjp(_passes_forward, _passes_backward)

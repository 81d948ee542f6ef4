"""JumpReLU: a latent is active where its pre-activation passes a threshold of its own, which is learnt.

    latents = pre * (pre > threshold),   pre = (x - b_dec) @ W_enc + b_enc

The step has no useful gradient, so that pre-activations within half a bandwidth of their threshold pass one on: there,
d latents / d pre is threshold / bandwidth more than it would be, d [pre > threshold] / d pre is 1 / bandwidth, and
thresholds get the same with a minus sign. That it reaches the pre-activations too, over a bandwidth of 2, is what keeps
latents alive (docs/LOG.md).

`JumpReLU` adds coefficient * (L0 / target - 1)^2, with a target that is moved from k until L0 is k, since
reconstruction pulls L0 above it. `TanhJumpReLU` adds coefficient * sum_j tanh(4 latents_j) / d_model. Thresholds are
parameters themselves, not their logarithms, whose steps are far too small, and start where k of d_sae normally
distributed pre-activations would pass. Dead latents are revived as in the other architectures (AuxK), instead of by a
penalty on their pre-activations.

Source: Rajamanoharan et al. 2024, arXiv:2407.14435 (straight-through gradients and the quadratic form); Anthropic 2025,
transformer-circuits.pub/2025/january-update (tanh, gradients to everything, the bandwidth).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Key

from sae.architectures.base import Context, Means, Output
from sae.architectures.penalised import Penalised, mean_norm, tally
from sae.artefact import SavedArchitecture
from sae.config import SaeConfig

TANH_SLOPE = 4.0
FARTHEST = 4.0
"""how many times k, or what part of it, the target of L0 may become"""


class JumpReLU(Penalised):
    """Thresholds that aim at an L0 of k."""

    threshold: nnx.Param[Float[Array, " d_sae"]]
    target: nnx.BatchStat[Float[Array, ""]]

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """As all SAEs start, with thresholds that let k normally distributed pre-activations pass."""
        super().__init__(config, means, key)
        self.threshold = nnx.Param(jnp.full(self.d_sae, jnp.maximum(ndtri(1 - config.k / self.d_sae), 0.01)))
        self.target = nnx.BatchStat(jnp.float32(config.k))

    def activate(self, x: Float[Array, "batch d_in"]) -> tuple[Float[Array, "batch d_sae"], dict[str, Array]]:
        """pre where it passes, and how far L0 is from the target."""
        pre, threshold, bandwidth = self.preactivations(x), self.threshold[...], self.config.bandwidth
        latents, l0 = jump(pre, threshold, bandwidth)
        return latents, {"sparsity": (l0 / self.target[...] - 1) ** 2}

    def observe(self, output: Output, context: Context) -> None:
        """Move the target; the weight stays. Bounds keep an L0 that is slow to follow from driving it away."""
        k = self.aim(context)
        self.target[...] = jnp.clip(self.target[...] / self.excess(output, context), k / FARTHEST, k * FARTHEST)

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

    def activate(self, x: Float[Array, "batch d_in"]) -> tuple[Float[Array, "batch d_sae"], dict[str, Array]]:
        """pre where it passes, and the sum of their tanh."""
        latents, _ = jump(self.preactivations(x), self.threshold[...], self.config.bandwidth)
        return latents, {"sparsity": mean_norm(jnp.tanh(TANH_SLOPE * latents)) / x.shape[1]}

    def observe(self, output: Output, context: Context) -> None:
        """Move the weight of the penalty, as with all penalties but the quadratic one."""
        super(JumpReLU, self).observe(output, context)


@jax.custom_vjp
def jump(
    pre: Float[Array, "batch d_sae"], threshold: Float[Array, " d_sae"], bandwidth: float | Float[Array, ""]
) -> tuple[Float[Array, "batch d_sae"], Float[Array, ""]]:
    """relu(pre) where pre > threshold, else 0, and their L0; the step passes the gradients of both on."""
    latents = jnp.where(pre > threshold, jax.nn.relu(pre), 0)
    return latents, tally(latents)[1]


def _jump_forward(pre: Array, threshold: Array, bandwidth: Any) -> tuple[tuple[Array, Array], tuple[Array, Array, Any]]:
    return jump(pre, threshold, bandwidth), (pre, threshold, bandwidth)


def _jump_backward(saved: tuple[Array, Array, Any], g: tuple[Array, Array]) -> tuple[Array, Array, None]:
    (pre, threshold, bandwidth), (to_latents, to_l0) = saved, g
    of_step = (to_latents * threshold + to_l0 / len(pre)) / bandwidth
    of_step = jnp.where(jnp.abs(pre - threshold) < bandwidth / 2, of_step, 0)
    return jnp.where((pre > threshold) & (pre > 0), to_latents, 0) + of_step, -of_step.sum(axis=0), None


jump.defvjp(_jump_forward, _jump_backward)

"""JumpReLU: a latent is active where its pre-activation passes a threshold of its own, which is learnt.

    latents = pre * (pre > threshold),   pre = (x - b_dec) @ W_enc + b_enc

The step has no useful gradient, so that pre-activations within half a bandwidth of their threshold pass one on: there,
d latents / d pre is threshold / bandwidth more than it would be, d [pre > threshold] / d pre is 1 / bandwidth, and
thresholds get the same with a minus sign. That it reaches the pre-activations too, over a bandwidth of 2, is what keeps
latents alive (docs/LOG.md).

Few latents are active, but many are within the bandwidth. So active ones are decoded, and get their gradient, as in
`Selecting`, while the gradient of the step, which takes three dense products, is estimated from `step_tokens` of a
batch, each of which stands for as many: batches are random, so that its mean is the same. In large batches that is even
better than all of them (docs/LOG.md).

`JumpReLU` adds coefficient * (L0 / target - 1)^2, with a target that is moved from k until L0 is k, since
reconstruction pulls L0 above it. `TanhJumpReLU` adds coefficient * sum_j tanh(4 latents_j) / d_model. Thresholds are
parameters themselves, not their logarithms, whose steps are far too small, and start where k of d_sae normally
distributed pre-activations would pass. Dead latents are revived as in the other architectures (AuxK), instead of by a
penalty on their pre-activations.

Source: Rajamanoharan et al. 2024, arXiv:2407.14435 (straight-through gradients and the quadratic form); Anthropic 2025,
transformer-circuits.pub/2025/january-update (tanh, gradients to everything, the bandwidth).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Int, Key

from sae.architectures.base import Context, Means, Output
from sae.architectures.penalised import Attempt, Penalised
from sae.artefact import SavedArchitecture
from sae.config import SaeConfig
from sae.kernels import Codes, attach, count_active, decode, largest, stored_product

TANH_SLOPE = 4.0
FARTHEST = 4.0
"""how many times k, or what part of it, the target of L0 may become"""
SPARE = 4
"""how many times k a token may take at most in training; of more that pass, those nearest their thresholds are left"""

Results = tuple[Float[Array, "batch d_out"], Float[Array, ""]]
"""what the latents reconstruct, and the mean over tokens of what the penalty measures"""


class JumpReLU(Penalised):
    """Thresholds that aim at an L0 of k."""

    threshold: nnx.Param[Float[Array, " d_sae"]]
    target: nnx.BatchStat[Float[Array, ""]]

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """As all SAEs start, with thresholds that let k normally distributed pre-activations pass."""
        super().__init__(config, means, key)
        self.threshold = nnx.Param(jnp.full(self.d_sae, jnp.maximum(ndtri(1 - config.k / self.d_sae), 0.01)))
        self.target = nnx.BatchStat(jnp.float32(config.k))

    def attempt(self, x: Float[Array, "batch d_in"], context: Context) -> Attempt:
        """What the latents that pass reconstruct and cost, with the gradient of their steps."""
        chosen, passing = self.select(x, context)
        codes, l0 = attach(chosen, x, self.W_enc[...], self.b_enc[...], self.centre), passing.mean(dtype=jnp.float32)
        results = decode(codes, self.W_dec[...]), self.measured(codes, l0)
        every = max(round(len(x) / self.config.step_tokens), 1)
        above = self.preactivations(one_in(every, x)) - self.threshold[...]
        threshold, W_dec = lax.stop_gradient(self.threshold[...]), lax.stop_gradient(self.W_dec[...])
        weights = threshold, W_dec, self.config.bandwidth
        y_hat, measured = with_steps(every, self.of_step, results, above, *weights)  # type: ignore[misc]
        return Attempt(y_hat, {"sparsity": self.penalty(measured, x.shape[1])}, count_active(chosen, self.d_sae), l0)

    def select(self, x: Float[Array, "batch d_in"], context: Context) -> tuple[Codes, Int[Array, " batch"]]:
        """The latents that pass, without a gradient, and how many of each token do."""
        threshold, k = lax.stop_gradient(jax.nn.relu(self.threshold[...])), self.config.k
        weights = self.W_enc[...], self.b_enc[...] - threshold
        above, passing = largest(x - self.centre, *weights, SPARE * self.aim(context), min(SPARE * k, self.d_sae))
        passed = jnp.where(above.values == 0, 0, threshold[jnp.minimum(above.indices, self.d_sae - 1)])
        return above._replace(values=above.values + passed), passing

    def measured(self, codes: Codes, l0: Float[Array, ""]) -> Float[Array, ""]:
        """What the penalty measures, mean over tokens: L0."""
        return l0

    def of_step(
        self, above: Float[Array, "n d_sae"], threshold: Float[Array, " d_sae"]
    ) -> Float[Array, "n d_sae"] | float:
        """What a token's measure gains by the step of each latent, of which `above` is pre - threshold."""
        return 1.0

    def penalty(self, measured: Float[Array, ""], d_in: int) -> Float[Array, ""]:
        """How far L0 is from the target."""
        return (measured / self.target[...] - 1) ** 2

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

    def measured(self, codes: Codes, l0: Float[Array, ""]) -> Float[Array, ""]:
        """The sum of the latents' tanh."""
        return jnp.tanh(TANH_SLOPE * codes.values).sum(axis=1).mean()

    def of_step(self, above: Float[Array, "n d_sae"], threshold: Float[Array, " d_sae"]) -> Float[Array, "n d_sae"]:
        """The slope of tanh at the latent, along a step as high as the threshold."""
        latents = jnp.where(above > 0, jax.nn.relu(above + threshold), 0)
        return threshold * TANH_SLOPE * (1 - jnp.tanh(TANH_SLOPE * latents) ** 2)

    def penalty(self, measured: Float[Array, ""], d_in: int) -> Float[Array, ""]:
        """That sum, a dimension."""
        return measured / d_in

    def observe(self, output: Output, context: Context) -> None:
        """Move the weight of the penalty, as with all penalties but the quadratic one."""
        super(JumpReLU, self).observe(output, context)


def one_in(n: int, rows: Float[Array, "batch d"]) -> Float[Array, "share d"]:
    """Every n-th row, beginning with the first; the last n - 1 may be left out.

    Devices that split rows keep theirs, which they would not if it were a slice of all.
    """
    batch, d = rows.shape
    return rows[: batch // n * n].reshape(-1, n, d)[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_steps(
    every: int,
    of_step: Callable[[Array, Array], Array | float],
    results: Results,
    above: Float[Array, "share d_sae"],
    threshold: Float[Array, " d_sae"],
    W_dec: Float[Array, "d_sae d_out"],
    bandwidth: float | Float[Array, ""],
) -> Results:
    """Return `results`, with the gradient that the steps of latents pass on to `above`.

    Args:
      every: how many tokens each of those in `above` stands for.
      of_step: what the second of the results gains, for a token, by the step of each latent.
      above: pre - threshold, of one token in `every`.
    """
    return results


def _with_steps_forward(every: int, of_step: Any, results: Results, *weights: Any) -> tuple[Results, tuple[Any, ...]]:
    return results, weights


def _with_steps_backward(every: int, of_step: Any, weights: tuple[Any, ...], g: Results) -> tuple[Any, ...]:
    (above, threshold, W_dec, bandwidth), (to_y, to_measured) = weights, g
    to_latents = stored_product(one_in(every, to_y), W_dec.T) * (len(to_y) / len(above))
    to_step = to_latents * threshold + to_measured / len(above) * of_step(above, threshold)
    return g, jnp.where(jnp.abs(above) < bandwidth / 2, to_step / bandwidth, 0), None, None, None


with_steps.defvjp(_with_steps_forward, _with_steps_backward)

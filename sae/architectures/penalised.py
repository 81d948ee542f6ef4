"""Sparse autoencoders whose latents a penalty pushes to 0.

    loss = ||y - y_hat||^2 / variance + coefficient * penalty + aux_coefficient * aux

A penalty's right weight differs between models, layers and widths by orders of magnitude, and finding it takes a sweep.
So `k` is what L0 should be here too: unless `sparsity_coefficient` is given, each step multiplies the weight by
(L0 / k)^rate, with that ratio held between 1/e and e, until L0 settles at k. The rate is 20 over the steps of the run,
so that weights over nine orders of magnitude are in reach, but at most 0.02, since L0 takes about a hundred steps to
follow. The weight starts at 0.1, in units in which predicting the mean costs 1 and activations vary by 1 a dimension. A
short run that starts far lower learns dense latents first, and one that starts higher loses some early (docs/LOG.md).
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from sae.architectures.base import Context, Means, Output, SparseCoder
from sae.config import SaeConfig
from sae.kernels import reconstruct

START, GAIN, FASTEST = 0.1, 20.0, 0.02


class Attempt(NamedTuple):
    """What the latents of a batch give."""

    y_hat: Float[Array, "batch d_out"]
    """their reconstruction, without b_dec"""
    terms: dict[str, Float[Array, ""]]
    """of the loss, by name; `sparsity` is weighted by the coefficient"""
    active: Int[Array, " d_sae"]
    """tokens on which each latent is active"""
    l0: Float[Array, ""]
    """mean number of active latents a token"""


class Penalised(SparseCoder):
    """Latents and a penalty on them, which subclasses give."""

    coefficient: nnx.BatchStat[Float[Array, ""]]

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]):
        """As all SAEs start, with the weight of the penalty as a running statistic."""
        super().__init__(config, means, key)
        given = config.sparsity_coefficient
        self.coefficient = nnx.BatchStat(jnp.float32(START if given is None else given))

    def attempt(self, x: Float[Array, "batch d_in"], context: Context) -> Attempt:
        """What a batch's latents reconstruct and cost; here all latents of a token are computed."""
        latents, terms = self.activate(x)
        active = (latents > 0).sum(axis=0, dtype=jnp.int32)
        l0 = active.sum(dtype=jnp.float32) / len(latents)  # a sum along rows would be another pass
        return Attempt(reconstruct(latents, self.W_dec[...]), terms, active, l0)

    def activate(self, x: Float[Array, "batch d_in"]) -> tuple[Float[Array, "batch d_sae"], dict[str, Array]]:
        """Latents of a batch, and terms of its loss, as in `Attempt`."""
        raise NotImplementedError

    def loss(self, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"], context: Context) -> Output:
        """Reconstruction, penalty, and the revival of dead latents."""
        y_hat, terms, active, l0 = self.attempt(x, context)
        residual = y - self.b_dec[...] - y_hat
        fvu = (residual**2).sum(axis=1).mean() / context.variance
        aux = self.revival(x, residual, context)
        others = sum((term for name, term in terms.items() if name != "sparsity"), jnp.float32(0))
        return Output(
            loss=fvu + self.coefficient[...] * terms["sparsity"] + others + self.config.aux_coefficient * aux,
            terms={"fvu": fvu, "aux": aux, **terms},
            l0=l0,
            active=active,
            observed={},
        )

    def observe(self, output: Output, context: Context) -> None:
        """Move the weight of the penalty towards one that leaves k latents active."""
        if self.config.sparsity_coefficient is None:
            self.coefficient[...] *= self.excess(output, context)

    def excess(self, output: Output, context: Context) -> Float[Array, ""]:
        """(L0 / k)^rate, which is above 1 while too many latents are active."""
        ratio = jnp.clip(jnp.log(jnp.maximum(output.l0, 1e-3) / self.aim(context)), -1, 1)
        return jnp.exp(min(GAIN / context.n_steps, FASTEST) * ratio)


def mean_norm(latents: Float[Array, "batch d_sae"]) -> Float[Array, ""]:
    """Mean L1 norm of a token's latents, none of which is negative; summed along columns first, as they are counted."""
    return latents.mean(axis=0).sum()

"""Sparse autoencoders that keep the k largest latents, so that sparsity needs no penalty and no tuning.

1. pre-activations of all latents, without a gradient; 2. `select` picks the active ones; 3. those few get their gradient
back (`sae.kernels.attach`) and are decoded row by row. Left out: which latents are picked.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sae.architectures.base import Context, Output, SparseCoder
from sae.kernels import Codes, attach, count_active, decode


class Selecting(SparseCoder):
    """The largest latents, by a rule that subclasses give."""

    def select(self, pre: Float[Array, "batch d_sae"]) -> Codes:
        """Active latents of a training batch, given its pre-activations."""
        raise NotImplementedError

    def errors(
        self, codes: Codes, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"]
    ) -> tuple[Float[Array, ""], Float[Array, "batch d_out"]]:
        """What reconstruction costs, in mean squares a token, and the residual y - y_hat."""
        residual = y - self.b_dec[...] - decode(codes, self.W_dec[...])
        return (residual**2).sum(axis=1).mean(), residual

    def loss(self, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"], context: Context) -> Output:
        """Reconstruction of the selected latents, and the revival of dead ones."""
        chosen = self.select(lax.stop_gradient(self.preactivations(x)))
        codes = attach(chosen, x, self.W_enc[...], self.b_enc[...], self.centre)
        cost, residual = self.errors(codes, x, y)
        fvu = (residual**2).sum(axis=1).mean() / context.variance
        aux = self.revival(x, residual, context)
        return Output(
            loss=cost / context.variance + self.config.aux_coefficient * aux,
            terms={"fvu": fvu, "aux": aux},
            l0=(chosen.values > 0).sum(axis=1).mean(),
            active=count_active(chosen, self.d_sae),
            cutoff=jnp.where(chosen.values > 0, chosen.values, jnp.inf).min(),
        )

"""Sparse autoencoders that keep the k largest latents, so that sparsity needs no penalty and no tuning.

1. `select` picks the active latents, without a gradient; 2. those few get their gradient back (`sae.kernels.attach`)
and are decoded row by row.

In the first `k_anneal` of a run more are picked: 2k at first, then fewer, down to k, which leaves fewer latents dead
(docs/LOG.md). Left out: which latents are picked.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sae.architectures.base import Context, Output, SparseCoder
from sae.kernels import Codes, attach, count_active, decode

Amount = int | float | Float[Array, ""]
SPARE = 2
"""how many times k a token may take at most"""


class Selecting(SparseCoder):
    """The largest latents, by a rule that subclasses give."""

    def select(self, x: Float[Array, "batch d_in"], k: Amount, most: Amount) -> tuple[Codes, dict[str, Array]]:
        """Active latents of a batch, about k a token and at most `most` of one; and what `observe` needs."""
        raise NotImplementedError

    def errors(
        self, codes: Codes, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"]
    ) -> tuple[Float[Array, ""], Float[Array, "batch d_out"]]:
        """What reconstruction costs, in mean squares a token, and the residual y - y_hat."""
        residual = y - self.b_dec[...] - decode(codes, self.W_dec[...])
        return (residual**2).sum(axis=1).mean(), residual

    def loss(self, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"], context: Context) -> Output:
        """Reconstruction of the selected latents, and the revival of dead ones."""
        chosen, observed = self.select(x, self.budget(context), SPARE * self.aim(context))
        codes = attach(chosen, x, self.W_enc[...], self.b_enc[...], self.centre)
        cost, residual = self.errors(codes, x, y)
        fvu = (residual**2).sum(axis=1).mean() / context.variance
        aux = self.revival(x, residual, context)
        return Output(
            loss=cost / context.variance + self.config.aux_coefficient * aux,
            terms={"fvu": fvu, "aux": aux},
            l0=(chosen.values > 0).sum(axis=1).mean(),
            active=count_active(chosen, self.d_sae),
            observed=observed,
        )

    @property
    def slots(self) -> int:
        """Most latents that a token may take."""
        return min(SPARE * self.config.k, self.d_sae)

    def budget(self, context: Context) -> float | Float[Array, ""]:
        """Latents a token at this step: k, or more while it is annealed."""
        k, annealed = self.aim(context), self.config.k_anneal * context.n_steps
        if not annealed:
            return float(k) if isinstance(k, int) else k
        return k * (1 + (SPARE - 1) * jnp.maximum(1 - context.step / annealed, 0))

"""Sparse autoencoders that keep the k largest latents, so that sparsity needs no penalty and no tuning.

1. pre-activations of all latents, without a gradient; 2. `select` picks the active ones; 3. those few get their
gradient back (`sae.kernels.attach`) and are decoded row by row.

In the first `k_anneal` of a run more are picked: 2k at first, then fewer, down to k, which leaves fewer latents dead
(docs/LOG.md). Left out: which latents are picked.
"""

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from sae.architectures.base import Context, Output, SparseCoder
from sae.kernels import Codes, attach, count_active, decode

SPARE = 2
"""how many times k a token may take at most"""


def largest(values: Float[Array, "batch d_sae"], n: int) -> tuple[Float[Array, "batch n"], Int[Array, "batch n"]]:
    """The n largest of each row and their places, from the largest on.

    Under `jax.vmap`, as in a sweep on an accelerator, a stack of batches is one long batch to it: XLA's fast top-k for
    a GPU takes two axes and no more.
    """

    @custom_vmap
    def top(values: Array) -> tuple[Array, Array]:
        found, where = lax.top_k(values, n)
        return found, where

    @top.def_vmap
    def _(size: int, _: list[bool], values: Array) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
        found, where = lax.top_k(values.reshape(-1, values.shape[-1]), n)
        return (found.reshape(size, -1, n), where.reshape(size, -1, n)), (True, True)

    return top(values)


class Selecting(SparseCoder):
    """The largest latents, by a rule that subclasses give."""

    def select(
        self,
        pre: Float[Array, "batch d_sae"],
        k: int | float | Float[Array, ""],
        most: Float[Array, ""] | None = None,
    ) -> Codes:
        """Active latents of a batch with these pre-activations: about k a token, at most twice `config.k` of one.

        Args:
          most: in a sweep of k, how many of one at most, since `config.k` is then the largest k of all.
        """
        raise NotImplementedError

    def errors(
        self, codes: Codes, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"]
    ) -> tuple[Float[Array, ""], Float[Array, "batch d_out"]]:
        """What reconstruction costs, in mean squares a token, and the residual y - y_hat."""
        residual = y - self.b_dec[...] - decode(codes, self.W_dec[...])
        return (residual**2).sum(axis=1).mean(), residual

    def watch(self, pre: Float[Array, "batch d_sae"], codes: Codes) -> dict[str, Array]:
        """What `observe` needs of a batch; most architectures need nothing."""
        return {}

    def loss(self, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"], context: Context) -> Output:
        """Reconstruction of the selected latents, and the revival of dead ones."""
        pre = lax.stop_gradient(self.preactivations(x))
        most = None if context.k is None else SPARE * context.k
        chosen = self.select(pre, self.budget(context), most)
        codes = attach(chosen, x, self.W_enc[...], self.b_enc[...], self.centre)
        cost, residual = self.errors(codes, x, y)
        fvu = (residual**2).sum(axis=1).mean() / context.variance
        aux = self.revival(x, residual, context)
        return Output(
            loss=cost / context.variance + self.config.aux_coefficient * aux,
            terms={"fvu": fvu, "aux": aux},
            l0=(chosen.values > 0).sum(axis=1).mean(),
            active=count_active(chosen, self.d_sae),
            observed=self.watch(pre, chosen),
        )

    def budget(self, context: Context) -> float | Float[Array, ""]:
        """Latents a token at this step: k, or more while it is annealed."""
        k, annealed = self.aim(context), self.config.k_anneal * context.n_steps
        if not annealed:
            return float(k) if isinstance(k, int) else k
        return k * (1 + (SPARE - 1) * jnp.maximum(1 - context.step / annealed, 0))

"""OrtSAE: a penalty on decoder rows that point almost the same way.

Latents are dealt at random into chunks; each is compared with the others of its chunk:

    alikeness = mean over latents of (max over others j of cos(W_dec_i, W_dec_j))^2

Comparing every few steps, and then so much heavier, does as well as every step, at a fraction of the cost. Source:
Korznikov et al. 2025, arXiv:2509.22033. Left out: comparing all with all, whose cost grows with the square of d_sae.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sae.config import SaeConfig


def alikeness(
    W_dec: Float[Array, "d_sae d_out"], step: Int[Array, ""], config: SaeConfig, seed: int
) -> Float[Array, ""]:
    """The penalty, times `orthogonality_every` in every such step, 0 in the others.

    Rows have norm 1. Where d_sae is no multiple of the number of chunks, a few latents are left out, others each time.
    """
    every, d_sae = config.orthogonality_every, len(W_dec)
    n_chunks = -(-d_sae // min(config.orthogonality_chunk, d_sae))
    size = d_sae // n_chunks

    def compare() -> Array:
        key = jax.random.fold_in(jax.random.key(seed), step)
        dealt = jax.random.permutation(key, d_sae)[: n_chunks * size].reshape(n_chunks, size)
        return every * lax.map(lambda chunk: closest(W_dec[chunk]), dealt).mean()

    return lax.cond(step % every == 0, compare, lambda: jnp.float32(0))


def closest(rows: Float[Array, "n d_out"]) -> Float[Array, ""]:
    """Mean over unit rows of the squared largest cosine with another.

    >>> round(float(closest(jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]))), 4)
    0.5467
    """
    cosines = rows @ rows.T - 2 * jnp.eye(len(rows))
    return (cosines.max(axis=1) ** 2).mean()

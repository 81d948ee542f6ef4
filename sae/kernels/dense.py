"""Products with all latents of a token, for architectures in which any number of them may be active.

At 16,384 latents and 8,192 tokens, to write or read what is as large as the latents in float32 takes a quarter of the
time of a product. So only what goes into a product or comes out of one is stored, and in bfloat16 where products are
low (`sae.kernels.choice.operand`), each entry rounded by 2^-9 at most: the encoder's product, the latents, and the
gradients of both. What is between is element-wise: callers write it in float32, and XLA fuses it into the passes that
read and write these. Sums are in float32. Left out: the element-wise part.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sae.kernels.choice import operand


@jax.custom_vjp
def project(
    x: Float[Array, "batch d_in"], W_enc: Float[Array, "d_in d_sae"], centre: Float[Array, " d_in"]
) -> Float[Array, "batch d_sae"]:
    """(x - centre) @ W_enc; the gradient reaches W_enc and centre. `x` is data and gets none."""
    return stored_product(x - centre, W_enc)


def _project_forward(x: Array, W_enc: Array, centre: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return project(x, W_enc, centre), (x, W_enc, centre)


def _project_backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, W_enc, centre = saved
    to_W_enc = _product(g.T, x - centre).T  # as a training state keeps it: a row a latent
    return jnp.zeros_like(x), to_W_enc, -_product(W_enc, g.sum(axis=0))


project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def reconstruct(
    latents: Float[Array, "batch d_sae"], W_dec: Float[Array, "d_sae d_out"]
) -> Float[Array, "batch d_out"]:
    """latents @ W_dec."""
    return _product(latents, W_dec)


def _reconstruct_forward(latents: Array, W_dec: Array) -> tuple[Array, tuple[Array, Array]]:
    return reconstruct(latents, W_dec), (latents, W_dec)


def _reconstruct_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    latents, W_dec = saved
    return stored_product(g, W_dec.T), _product(latents.T, g)


reconstruct.defvjp(_reconstruct_forward, _reconstruct_backward)


def _product(a: Float[Array, "n d"], b: Float[Array, "d ..."]) -> Float[Array, "n ..."]:
    """a @ b, of what is stored of a and b."""
    return _multiply(operand(a), operand(b), jnp.float32)


def stored_product(a: Float[Array, "n d"], b: Float[Array, "d m"]) -> Float[Array, "n m"]:
    """a @ b, where the result is as large as the latents and stored as they are."""
    a, b = operand(a), operand(b)
    return _multiply(a, b, a.dtype).astype(jnp.float32)


def _multiply(a: Array, b: Array, dtype: Any) -> Array:
    # Of operands that are low already there is nothing to ask, and XLA refuses to on a CPU if one is a vector.
    precision = lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=dtype)

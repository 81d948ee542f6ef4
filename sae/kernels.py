"""Linear algebra on sparse latents: a few active latents a token, kept as values and indices.

With k of d_sae latents active, decoding and every gradient touch k rows of a matrix instead of d_sae. Flow of one step:
1. `attach` gives the chosen pre-activations a gradient; 2. `decode` sums the chosen decoder rows. Their hand-written
gradients visit only the active rows where that is fast (CPU: 3x a whole step), and use dense products on accelerators,
which have arithmetic to spare and slow scatters.

Left out: choosing the latents, which is what architectures differ in.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped


class Codes(NamedTuple):
    """The active latents of each token."""

    values: Float[Array, "batch width"]
    """latents, positive ones first in each row; zero where fewer than `width` are active"""
    indices: Int[Array, "batch width"]
    """which latents these are, without repeats in a row; out of range where a slot is unused"""


def densify(codes: Codes, d_sae: int) -> Float[Array, "batch d_sae"]:
    """Write the values out at their indices.

    >>> densify(Codes(jnp.array([[2.0, 0.0]]), jnp.array([[1, 0]])), 3).tolist()
    [[0.0, 2.0, 0.0]]
    """
    rows = jnp.arange(len(codes.values))[:, None]
    return jnp.zeros((len(codes.values), d_sae)).at[rows, codes.indices].set(codes.values, mode="drop")


def count_active(codes: Codes, d_sae: int) -> Int[Array, " d_sae"]:
    """Tokens on which each latent is active.

    >>> count_active(Codes(jnp.array([[2.0, 0.0], [1.0, 3.0]]), jnp.array([[1, 0], [1, 2]])), 3).tolist()
    [0, 2, 1]
    """
    return total(codes.indices, (codes.values > 0).astype(jnp.int32), d_sae)


def total(
    indices: Int[Array, "batch width"], weights: Shaped[Array, "batch width"], d_sae: int
) -> Shaped[Array, " d_sae"]:
    """sum_{b, s : indices[b, s] = j} weights[b, s] for each latent j."""
    rows, dense = partial(_total_rows, d_sae), partial(_total_dense, d_sae)
    return lax.platform_dependent(indices, weights, cpu=rows, default=dense)


def restrict(codes: Codes, start: int, stop: int) -> Codes:
    """The codes of latents start..stop, counted from `start`; unused slots hold 0 and an index out of range.

    >>> restrict(Codes(jnp.array([[2.0, 1.0]]), jnp.array([[0, 4]])), 3, 6)
    Codes(values=Array([[1., 0.]], dtype=float32), indices=Array([[1, 3]], dtype=int32))
    """
    inside = (codes.indices >= start) & (codes.indices < stop) & (codes.values > 0)
    order = jnp.argsort(~inside, axis=1, stable=True)  # positive values stay first, as `Codes` promises
    values, indices = jnp.where(inside, codes.values, 0), jnp.where(inside, codes.indices - start, stop - start)
    return Codes(jnp.take_along_axis(values, order, axis=1), jnp.take_along_axis(indices, order, axis=1))


@jax.custom_vjp
def decode(codes: Codes, W_dec: Float[Array, "d_sae d_model"]) -> Float[Array, "batch d_model"]:
    """`densify(codes) @ W_dec`, that is sum_s values[b, s] W_dec[indices[b, s]]."""
    return lax.platform_dependent(*codes, W_dec, cpu=_decode_rows, default=_decode_dense)


def _decode_forward(codes: Codes, W_dec: Array) -> tuple[Array, tuple[Codes, Array]]:
    return decode(codes, W_dec), (codes, W_dec)


def _decode_backward(saved: tuple[Codes, Array], g: Array) -> tuple[Codes, Array]:
    codes, W_dec = saved
    to_values = lax.platform_dependent(codes.indices, W_dec, g, cpu=_dot_rows, default=_dot_dense)
    return Codes(to_values, _no_gradient(codes.indices)), sum_rows(codes, codes.values, g, len(W_dec))


decode.defvjp(_decode_forward, _decode_backward)


@jax.custom_vjp
def attach(
    codes: Codes,
    x: Float[Array, "batch d_model"],
    W_enc: Float[Array, "d_model d_sae"],
    b_enc: Float[Array, " d_sae"],
    b_dec: Float[Array, " d_model"],
) -> Codes:
    """Return `codes`, whose values must be relu((x - b_dec) @ W_enc + b_enc) at the indices, with that gradient.

    The gradient reaches W_enc, b_enc and b_dec. `x` is data and gets none.
    """
    return codes


def _attach_forward(codes: Codes, x: Array, W_enc: Array, b_enc: Array, b_dec: Array) -> tuple[Codes, tuple]:
    return codes, (codes, x, W_enc, b_dec)


def _attach_backward(saved: tuple[Codes, Array, Array, Array], g: Codes) -> tuple[Codes, Array, Array, Array, Array]:
    codes, x, W_enc, b_dec = saved
    to_pre = jnp.where(codes.values > 0, g.values, 0)
    to_b_enc = total(codes.indices, to_pre, W_enc.shape[1])
    to_W_enc = sum_rows(codes, to_pre, x - b_dec, W_enc.shape[1]).T
    nothing = Codes(jnp.zeros_like(codes.values), _no_gradient(codes.indices))
    return nothing, jnp.zeros_like(x), to_W_enc, to_b_enc, -W_enc @ to_b_enc


attach.defvjp(_attach_forward, _attach_backward)


def sum_rows(
    codes: Codes, weights: Float[Array, "batch width"], rows: Float[Array, "batch d_model"], d_sae: int
) -> Float[Array, "d_sae d_model"]:
    """sum_{b, s : indices[b, s] = j} weights[b, s] rows[b] for each latent j; inactive latents are left out."""
    n_active = (codes.values > 0).sum(axis=1)
    start = jnp.zeros((d_sae, rows.shape[1]))
    return lax.platform_dependent(
        start, codes.indices, n_active, weights, rows, cpu=_sum_rows_one_by_one, default=_sum_rows_dense
    )


def _decode_rows(values: Array, indices: Array, W_dec: Array) -> Array:
    def add(total: Array, chosen: tuple[Array, Array]) -> tuple[Array, None]:
        value, index = chosen
        return total + value[:, None] * W_dec[index], None

    start = jnp.zeros((len(values), W_dec.shape[1]))
    return lax.scan(add, start, (values.T, indices.T))[0]


def _decode_dense(values: Array, indices: Array, W_dec: Array) -> Array:
    return densify(Codes(values, indices), len(W_dec)) @ W_dec


def _dot_rows(indices: Array, W_dec: Array, g: Array) -> Array:
    return lax.scan(lambda _, index: (None, (W_dec[index] * g).sum(axis=1)), None, indices.T)[1].T


def _dot_dense(indices: Array, W_dec: Array, g: Array) -> Array:
    return jnp.take_along_axis(g @ W_dec.T, indices, axis=1)


def _sum_rows_one_by_one(start: Array, indices: Array, n_active: Array, weights: Array, rows: Array) -> Array:
    # XLA's own scatter-add takes 8 times as long on CPU, since it writes all batch * width products to memory first.
    def add_token(token: Array, total: Array) -> Array:
        row = lax.dynamic_slice_in_dim(rows, token, 1)

        def add(slot: Array, total: Array) -> Array:
            index = indices[token, slot]
            changed = lax.dynamic_slice_in_dim(total, index, 1) + weights[token, slot] * row
            return lax.dynamic_update_slice_in_dim(total, changed, index, 0)

        return lax.fori_loop(0, n_active[token], add, total)

    return lax.fori_loop(0, len(rows), add_token, start)


def _sum_rows_dense(start: Array, indices: Array, n_active: Array, weights: Array, rows: Array) -> Array:
    return start + densify(Codes(weights, indices), len(start)).T @ rows


def _total_rows(d_sae: int, indices: Array, weights: Array) -> Array:
    return jnp.zeros(d_sae, weights.dtype).at[indices].add(weights)


def _total_dense(d_sae: int, indices: Array, weights: Array) -> Array:
    # Atomic additions to few addresses take a GPU a hundred times as long as the whole step otherwise does.
    rows = jnp.arange(len(weights))[:, None]
    return jnp.zeros((len(weights), d_sae), weights.dtype).at[rows, indices].set(weights, mode="drop").sum(axis=0)


def _no_gradient(indices: Array) -> Any:
    return np.zeros(indices.shape, jax.dtypes.float0)


def kth_largest(values: Float[Array, "..."], k: int | float | Float[Array, ""]) -> Float[Array, ""]:
    """The k-th largest of non-negative values, exactly, without a sort.

    Non-negative floats order like their bits, so 31 counting passes bisect the bits.

    >>> float(kth_largest(jnp.array([[0.5, 3.0], [0.0, 2.0]]), 2))
    2.0
    """
    bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)

    def narrow(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = (bits >= middle).sum() >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = lax.fori_loop(0, 31, narrow, (jnp.int32(0), bits.max() + 1))
    return lax.bitcast_convert_type(low, jnp.float32)

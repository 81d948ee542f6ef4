"""Sums over sparse latents: decoding, its gradients and the encoder's, and counts.

Each gradient is written by hand, so that it visits the active rows alone where that is fast: on a CPU one by one, on an
NVIDIA GPU in Triton's programs. Elsewhere products are dense, since accelerators have arithmetic to spare and scatter
slowly.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from sae.kernels import gpu
from sae.kernels.choice import operand, triton_is_chosen
from sae.kernels.codes import Codes, densify


@jax.custom_vjp
def decode(codes: Codes, W_dec: Float[Array, "d_sae d_model"]) -> Float[Array, "batch d_model"]:
    """`densify(codes) @ W_dec`, that is sum_s values[b, s] W_dec[indices[b, s]]."""
    if triton_is_chosen():
        return gpu.sum_active_rows(codes, operand(W_dec))
    return lax.platform_dependent(*codes, W_dec, cpu=_decode_rows, default=_decode_dense)


def _decode_forward(codes: Codes, W_dec: Array) -> tuple[Array, tuple[Codes, Array]]:
    return decode(codes, W_dec), (codes, W_dec)


def _decode_backward(saved: tuple[Codes, Array], g: Array) -> tuple[Codes, Array]:
    codes, W_dec = saved
    if triton_is_chosen():
        to_values = gpu.dot_active_rows(codes, operand(W_dec), operand(g))
    else:
        to_values = lax.platform_dependent(codes.indices, W_dec, g, cpu=_dot_rows, default=_dot_dense)
    return Codes(to_values, _no_gradient(codes.indices)), sum_rows(codes, codes.values, g, len(W_dec))[0]


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
    to_W_enc, to_b_enc = sum_rows(codes, to_pre, x - b_dec, W_enc.shape[1])
    nothing = Codes(jnp.zeros_like(codes.values), _no_gradient(codes.indices))
    return nothing, jnp.zeros_like(x), to_W_enc.T, to_b_enc, -W_enc @ to_b_enc


attach.defvjp(_attach_forward, _attach_backward)


def sum_rows(
    codes: Codes, weights: Float[Array, "batch width"], rows: Float[Array, "batch d_model"], d_sae: int
) -> tuple[Float[Array, "d_sae d_model"], Float[Array, " d_sae"]]:
    """sum_{b, s : indices[b, s] = j} weights[b, s] rows[b] for each latent j, and the same without rows.

    Slots whose value is 0 are left out.
    """
    if triton_is_chosen():
        return gpu.sum_by_latent(codes, weights, operand(rows), d_sae)
    n_active = (codes.values > 0).sum(axis=1)
    start = jnp.zeros((d_sae, rows.shape[1]))
    sums = lax.platform_dependent(
        start, codes.indices, n_active, weights, rows, cpu=_sum_rows_one_by_one, default=_sum_rows_dense
    )
    return sums, total(codes.indices, weights, d_sae)


def count_active(codes: Codes, d_sae: int) -> Int[Array, " d_sae"]:
    """Tokens on which each latent is active.

    >>> count_active(Codes(jnp.array([[2.0, 0.0], [1.0, 3.0]]), jnp.array([[1, 0], [1, 2]])), 3).tolist()
    [0, 2, 1]
    """
    if triton_is_chosen():
        return gpu.count_active(codes, d_sae)
    return total(codes.indices, (codes.values > 0).astype(jnp.int32), d_sae)


def total(
    indices: Int[Array, "batch width"], weights: Shaped[Array, "batch width"], d_sae: int
) -> Shaped[Array, " d_sae"]:
    """sum_{b, s : indices[b, s] = j} weights[b, s] for each latent j."""
    rows, dense = partial(_total_rows, d_sae), partial(_total_dense, d_sae)
    return lax.platform_dependent(indices, weights, cpu=rows, default=dense)


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
    return densify(Codes(weights, indices), d_sae).sum(axis=0)


def _no_gradient(indices: Array) -> Any:
    return np.zeros(indices.shape, jax.dtypes.float0)

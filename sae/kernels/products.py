"""Sums over sparse latents: decoding, its gradients and the encoder's, and counts.

Each gradient is written by hand, so that it visits the active rows alone where that is fast: on a CPU one by one, on an
NVIDIA GPU in Triton's programs. Elsewhere products are dense, since accelerators have arithmetic to spare and scatter
slowly. Functions that end in `_here` compute what one device has of it (`sae.kernels.devices`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from sae.kernels import gpu
from sae.kernels.choice import operand, triton_is_chosen
from sae.kernels.codes import Codes, densify, no_gradient
from sae.kernels.devices import (
    AT_REST,
    BY_BOTH,
    BY_LATENT,
    BY_TOKEN,
    LATENT,
    n_along,
    on_each,
    share_sum,
    sum_along,
    to_local,
)


@jax.custom_vjp
def decode(codes: Codes, W_dec: Float[Array, "d_sae d_model"]) -> Float[Array, "batch d_model"]:
    """`densify(codes) @ W_dec`, that is sum_s values[b, s] W_dec[indices[b, s]]."""
    W = operand(W_dec) if triton_is_chosen() else W_dec
    return on_each(_decode_here, (BY_BOTH, BY_LATENT), BY_TOKEN)(codes, W)


def _decode_here(codes: Codes, W: Array) -> Array:
    codes = to_local(codes, len(W))
    if triton_is_chosen():
        return sum_along(LATENT, gpu.sum_active_rows(codes, W))
    return sum_along(LATENT, lax.platform_dependent(*codes, W, cpu=_decode_rows, default=_decode_dense))


def _decode_forward(codes: Codes, W_dec: Array) -> tuple[Array, tuple[Codes, Array]]:
    return decode(codes, W_dec), (codes, W_dec)


def _decode_backward(saved: tuple[Codes, Array], g: Array) -> tuple[Codes, Array]:
    codes, W_dec = saved
    W, to_y = (operand(W_dec), operand(g)) if triton_is_chosen() else (W_dec, g)
    to_values = on_each(_dot_here, (BY_BOTH, BY_LATENT, BY_TOKEN), BY_BOTH)(codes, W, to_y)
    return Codes(to_values, no_gradient(codes.indices)), sum_rows(codes, codes.values, g, len(W_dec))[0]


def _dot_here(codes: Codes, W: Array, g: Array) -> Array:
    codes = to_local(codes, len(W))
    if triton_is_chosen():
        return gpu.dot_active_rows(codes, W, g)
    return lax.platform_dependent(codes.indices, W, g, cpu=_dot_rows, default=_dot_dense)


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
    nothing = Codes(jnp.zeros_like(codes.values), no_gradient(codes.indices))
    return nothing, jnp.zeros_like(x), to_W_enc.T, to_b_enc, -W_enc @ to_b_enc


attach.defvjp(_attach_forward, _attach_backward)


def sum_rows(
    codes: Codes, weights: Float[Array, "batch width"], rows: Float[Array, "batch d_model"], d_sae: int
) -> tuple[Float[Array, "d_sae d_model"], Float[Array, " d_sae"]]:
    """sum_{b, s : indices[b, s] = j} weights[b, s] rows[b] for each latent j, and the same without rows.

    Slots whose value is 0 are left out.
    """
    rows = operand(rows) if triton_is_chosen() else rows
    here = partial(_sum_rows_here, d_sae // n_along(LATENT))
    return on_each(here, (BY_BOTH, BY_BOTH, BY_TOKEN), (AT_REST, AT_REST))(codes, weights, rows)


def _sum_rows_here(d_sae: int, codes: Codes, weights: Array, rows: Array) -> tuple[Array, Array]:
    codes = to_local(codes, d_sae)
    if triton_is_chosen():
        sums, totals = gpu.sum_by_latent(codes, weights, rows, d_sae=d_sae)
    else:
        n_active = (codes.values > 0).sum(axis=1)
        start = jnp.zeros((d_sae, rows.shape[1]))
        sums = lax.platform_dependent(
            start, codes.indices, n_active, weights, rows, cpu=_sum_rows_one_by_one, default=_sum_rows_dense
        )
        totals = total(codes.indices, weights, d_sae)
    return share_sum(sums), share_sum(totals)


def count_active(codes: Codes, d_sae: int) -> Int[Array, " d_sae"]:
    """Tokens on which each latent is active.

    >>> count_active(Codes(jnp.array([[2.0, 0.0], [1.0, 3.0]]), jnp.array([[1, 0], [1, 2]])), 3).tolist()
    [0, 2, 1]
    """
    return on_each(partial(_count_here, d_sae // n_along(LATENT)), (BY_BOTH,), AT_REST)(codes)


def _count_here(d_sae: int, codes: Codes) -> Array:
    codes = to_local(codes, d_sae)
    if triton_is_chosen():
        return share_sum(gpu.count_active(codes, d_sae=d_sae))
    return share_sum(total(codes.indices, (codes.values > 0).astype(jnp.int32), d_sae))


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

"""Choosing the active latents: the largest of each token, and of a whole batch.

Where devices split the latents, each finds the largest of its own, and they agree on the largest of all.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sae.kernels import gpu
from sae.kernels.choice import fine_operand, triton_is_chosen
from sae.kernels.codes import Codes, positive_first
from sae.kernels.devices import (
    BY_BOTH,
    BY_LATENT,
    BY_TOKEN,
    LATENT,
    WHOLE,
    all_slots,
    n_along,
    n_devices,
    on_all,
    on_each,
    position,
    sum_along,
    to_global,
)

_UNSTABLE = {"is_stable": False} if "is_stable" in inspect.signature(lax.top_k).parameters else {}
"""ties in any order: jax 0.11 then selects on a GPU, instead of sorting, which takes 15 times as long"""


def largest(
    x: Float[Array, "batch d_in"],
    W: Float[Array, "d_in d_sae"],
    b: Float[Array, " d_sae"],
    k: int | float | Float[Array, ""],
    slots: int,
    threshold: float | Float[Array, ""] = 0.0,
) -> tuple[Codes, Int[Array, " batch"]]:
    """The ceil(k) largest of relu(x @ W + b) in each row, and how many of x @ W + b are above the threshold.

    `slots`, at least k, is how many a row has room for. No gradient passes. Where products are low and Triton's
    programs choose, x, W and x @ W are rounded to float16 (a relative error of at most 2^-12 each).
    """
    x, W, b, threshold = lax.stop_gradient((x, W, b, jnp.float32(threshold)))
    if triton_is_chosen():
        x, W = fine_operand(x), fine_operand(W)
    split = (BY_TOKEN, PartitionSpec(None, LATENT), BY_LATENT, WHOLE, WHOLE)
    return on_each(partial(_largest_here, slots), split, (BY_BOTH, BY_TOKEN))(x, W, b, jnp.float32(k), threshold)


def _largest_here(
    slots: int, x: Array, W: Array, b: Array, k: Array, threshold: Array
) -> tuple[Codes, Int[Array, " batch"]]:
    d_sae = len(b)
    precision = lax.Precision.DEFAULT if x.dtype == jnp.float16 else None  # what is low already needs no rounding
    products = jnp.matmul(x, W, precision=precision, preferred_element_type=x.dtype)
    codes, passing = _choose(products, b, k, min(slots, d_sae), threshold)
    if n_along(LATENT) > 1:
        codes = to_global(_choose_among_devices(codes, k, slots, d_sae), d_sae)
    return codes, sum_along(LATENT, passing)


def _choose(products: Array, b: Array, k: Array, slots: int, threshold: Array) -> tuple[Codes, Int[Array, " batch"]]:
    """The ceil(k) largest of relu(products + b) in each row, and how many of a row are above the threshold."""
    if triton_is_chosen():
        return gpu.keep_largest(products, b, jnp.ceil(k).astype(jnp.int32), threshold, slots=slots)
    pre = products + b
    values, indices = _top(jax.nn.relu(pre), slots)
    return Codes(jnp.where(jnp.arange(slots) < k, values, 0), indices), (pre > threshold).sum(axis=1)


def _choose_among_devices(codes: Codes, k: Array, slots: int, d_sae: int) -> Codes:
    """What this device has of the k largest that it and the others with the same tokens have found."""
    found, width = all_slots(codes.values), codes.values.shape[1]
    chosen, _ = _choose(found, jnp.zeros(found.shape[1]), k, min(slots, found.shape[1]), jnp.float32(0))
    places = chosen.indices - width * position(LATENT)
    is_mine = (places >= 0) & (places < width) & (chosen.values > 0)
    latents = jnp.take_along_axis(codes.indices, jnp.clip(places, 0, width - 1), axis=1)
    mine = Codes(jnp.where(is_mine, chosen.values, 0), jnp.where(is_mine, latents, d_sae))
    mine = gpu.keep_above(mine, jnp.float32(0), d_sae=d_sae) if triton_is_chosen() else positive_first(mine)
    return Codes(mine.values[:, :width], mine.indices[:, :width])


def _top(values: Array, n: int) -> tuple[Array, Array]:
    """`lax.top_k`; under `jax.vmap` a stack of batches is one long batch, since XLA's fast form takes two axes."""
    # Where one process has several GPUs, XLA's fast form gives wrong values (jaxlib 0.11.2, docs/LOG.md).
    settings = {} if jax.default_backend() == "cpu" or n_devices() > 1 else _UNSTABLE

    @custom_vmap
    def top(values: Array) -> tuple[Array, Array]:
        found, where = lax.top_k(values, n, **settings)
        return found, where

    @top.def_vmap
    def _(size: int, _: list[bool], values: Array) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
        found, where = lax.top_k(values.reshape(-1, values.shape[-1]), n, **settings)
        return (found.reshape(size, -1, n), where.reshape(size, -1, n)), (True, True)

    return top(values)


def keep_above(codes: Codes, cutoff: Float[Array, ""], d_sae: int) -> Codes:
    """The codes that reach the cutoff, largest first if they were."""
    if triton_is_chosen():
        return on_each(partial(gpu.keep_above, d_sae=d_sae), (BY_BOTH, WHOLE), BY_BOTH)(codes, cutoff)
    return Codes(jnp.where(codes.values >= cutoff, codes.values, 0), codes.indices)


def kth_largest(values: Float[Array, "..."], k: int | float | Float[Array, ""]) -> Float[Array, ""]:
    """The k-th largest of non-negative values, exactly, without a sort.

    Non-negative floats order like their bits, so their digits are found one by one, the highest first, by counting.

    >>> float(kth_largest(jnp.array([[0.5, 3.0], [0.0, 2.0]]), 2))
    2.0
    """
    values = on_all(values.astype(jnp.float32))  # a few values a token, and then devices need not agree on each count
    bits = lax.bitcast_convert_type(values, jnp.uint32).ravel()
    digit = 1 if jax.default_backend() == "cpu" else 4  # bits: more counts a pass, where a pass costs its launch
    found = jnp.uint32(0)
    for shift in range(32 - digit, -1, -digit):
        cuts = found + (jnp.arange(1, 2**digit, dtype=jnp.uint32) << shift)
        enough = jnp.stack([(bits >= cut).sum() for cut in cuts]) >= k
        found += enough.sum().astype(jnp.uint32) << shift
    return lax.bitcast_convert_type(found, jnp.float32)

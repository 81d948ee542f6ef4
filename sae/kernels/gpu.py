"""Triton's programs as functions of JAX arrays; `jax_triton` is imported where they are first called.

Under `jax.vmap`, which a sweep of SAEs takes, a function calls its program once, on all SAEs stacked along their rows:
token t of SAE i is row i * batch + t, and its latent j is i * d_sae + j. Sizes of blocks and numbers of warps were
measured on an H100 (docs/LOG.md). Left out: gradients, and when to call them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from sae.kernels.codes import Codes

LEAST_CHUNK = 2048


def _stacks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let `function`, which takes `n_saes` stacked SAEs, be called for one, or for several by `jax.vmap`."""

    @functools.wraps(function)
    def call(*arguments: Any, n_saes: int = 1, **settings: Any) -> Any:
        at_once = custom_vmap(functools.partial(function, n_saes=n_saes, **settings))

        @at_once.def_vmap
        def _(n: int, is_stacked: Any, *arguments: Any) -> tuple[Any, Any]:
            def stack(argument: Array, there: bool) -> Array:
                whole = argument if there else jnp.broadcast_to(argument, (n, *argument.shape))
                return whole.reshape(-1, *whole.shape[2:])

            stacked = jax.tree.map(stack, list(arguments), list(is_stacked))
            results = call(*stacked, n_saes=n * n_saes, **settings)
            results = jax.tree.map(lambda result: result.reshape(n, -1, *result.shape[1:]), results)
            return results, jax.tree.map(lambda _: True, results)

        return at_once(*arguments)

    return call


def _call(program: str, *inputs: Array, out: Any, grid: Any, **sizes: Any) -> Any:
    import jax_triton  # type: ignore[reportMissingImports]

    from sae.kernels import triton_programs

    return jax_triton.triton_call(*inputs, kernel=getattr(triton_programs, program), out_shape=out, grid=grid, **sizes)


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@_stacks
def keep_largest(
    products: Float[Array, "batch d_sae"],
    b: Float[Array, " latents"],
    k: Int[Array, "*saes"],
    threshold: Float[Array, "*saes"],
    *,
    slots: int,
    n_saes: int,
) -> tuple[Codes, Int[Array, " batch"]]:
    """The k largest of products + b in each row, and how many of a row are above the threshold."""
    batch, d_sae = products.shape
    padded = _power_of_2(slots)
    chunk = max(LEAST_CHUNK, 2 * padded, _power_of_2(math.isqrt(padded * d_sae) // 2 + 1))
    values, indices, passing, _ = _call(
        "keep_largest", products, b, k.ravel(), threshold.ravel(),
        out=(_shape(batch, slots), _shape(batch, slots, dtype=jnp.int32), _shape(batch, dtype=jnp.int32),
             _shape(batch, padded, dtype=jnp.int32)),
        grid=(batch,), BATCH=batch, D_SAE=d_sae, SLOTS=slots, PADDED=padded, CHUNK=chunk,
        DEPTH=_power_of_2(-(-d_sae // chunk)), ROWS=1, ROWS_A_SAE=batch // n_saes,
        num_warps=min(4 * chunk // LEAST_CHUNK, 32),
    )  # fmt: skip
    return Codes(values, indices), passing


@_stacks
def keep_above(codes: Codes, cutoff: Float[Array, "*saes"], *, d_sae: int, n_saes: int) -> Codes:
    """The codes that reach the cutoff, moved forward."""
    batch, slots = codes.values.shape
    return Codes(*_call(
        "keep_above", *codes, cutoff.ravel(), out=(_shape(batch, slots), _shape(batch, slots, dtype=jnp.int32)),
        grid=(-(-batch // 4),), BATCH=batch, D_SAE=d_sae, SLOTS=slots, PADDED=_power_of_2(slots), ROWS=4,
        ROWS_A_SAE=batch // n_saes, num_warps=4,
    ))  # fmt: skip


def sum_active_rows(codes: Codes, W: Float[Array, "d_sae d"]) -> Float[Array, "batch d"]:
    """sum_s values[b, s] W[indices[b, s]]."""
    (batch, slots), d = codes.values.shape, W.shape[1]
    columns = min(1024, _power_of_2(d))
    return _call(
        "sum_active_rows", *codes, _in_use(codes), W, out=_shape(batch, d), grid=(batch, -(-d // columns)),
        D=d, SLOTS=slots, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


def dot_active_rows(
    codes: Codes, W: Float[Array, "d_sae d"], g: Float[Array, "batch d"]
) -> Float[Array, "batch slots"]:
    """W[indices[b, s]] . g[b]; 0 where a slot is unused."""
    (batch, slots), d, rows = codes.values.shape, W.shape[1], 16
    return _call(
        "dot_active_rows", codes.indices, _in_use(codes), W, g, out=_shape(batch, slots),
        grid=(batch, -(-slots // rows)), D=d, SLOTS=slots, ROWS=rows, COLUMNS=min(256, _power_of_2(d)), num_warps=4,
    )  # fmt: skip


def count_active(codes: Codes, d_sae: int) -> Int[Array, " d_sae"]:
    """Tokens on which each latent is active."""
    latents, block = _active_latents(codes, d_sae), 1024
    return _call(
        "count_slots", latents, out=_shape(d_sae, dtype=jnp.int32), grid=(-(-len(latents) // block),),
        N=len(latents), D_SAE=d_sae, BLOCK=block, zeroed_outputs=(0,), num_warps=4,
    )  # fmt: skip


def sum_by_latent(
    codes: Codes, weights: Float[Array, "batch slots"], rows: Float[Array, "batch d"], d_sae: int
) -> tuple[Float[Array, "d_sae d"], Float[Array, " d_sae"]]:
    """sum_{b, s : indices[b, s] = j} weights[b, s] rows[b] for each latent j, and the sum of the weights alone."""
    slots, d = weights.shape[1], rows.shape[1]
    latents = _active_latents(codes, d_sae)
    _, order = lax.sort((latents, jnp.arange(len(latents), dtype=jnp.int32)), num_keys=1, is_stable=True)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count_active(codes, d_sae), dtype=jnp.int32)])
    columns = min(1024, _power_of_2(d))
    return _call(
        "sum_by_latent", first, order, weights, rows, out=(_shape(d_sae, d), _shape(d_sae)),
        grid=(d_sae, -(-d // columns)), D=d, SLOTS=slots, ROWS=4, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


@_stacks
def descend(
    W: Float[Array, "n d"],
    g: Float[Array, "n d"],
    mean: Float[Array, "n d"],
    square: Float[Array, "n d"],
    scalars: Float[Array, " five_a_sae"],
    *,
    on_sphere: bool,
    n_saes: int,
) -> tuple[Float[Array, "n d"], Float[Array, "n d"], Float[Array, "n d"]]:
    """The next W, mean and square, in the place of the old ones."""
    n, d = W.shape
    return _call(
        "descend", W, g, mean, square, scalars, out=(_shape(n, d),) * 3, grid=(n,),
        input_output_aliases={0: 0, 2: 1, 3: 2}, D=d, PADDED=_power_of_2(d), ON_SPHERE=on_sphere,
        ROWS_A_SAE=n // n_saes, num_warps=8,
    )  # fmt: skip


def _in_use(codes: Codes) -> Int[Array, " batch"]:
    return (codes.values != 0).sum(axis=1, dtype=jnp.int32)  # NaN is in use, so that it is seen


def _active_latents(codes: Codes, d_sae: int) -> Int[Array, " slots_of_all_tokens"]:
    return jnp.where(codes.values != 0, codes.indices, d_sae).ravel()

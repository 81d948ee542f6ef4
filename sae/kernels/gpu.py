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
NARROW = 4096
"""latents up to which chunks of half the size are faster"""
ROWS = 1
"""whose largest a program looks for at a time"""
Groups = Int[Array, " latents"] | None
"""of each latent, where rows of tokens come once a group"""


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
    least = LEAST_CHUNK // 2 if d_sae <= NARROW else LEAST_CHUNK
    chunk = max(least, 2 * padded, _power_of_2(math.isqrt(padded * d_sae) // 2 + 1))
    values, indices, passing, _ = _call(
        "keep_largest", products, b, k.ravel(), threshold.ravel(),
        out=(_shape(batch, slots), _shape(batch, slots, dtype=jnp.int32), _shape(batch, dtype=jnp.int32),
             _shape(batch, padded, dtype=jnp.int32)),
        grid=(-(-batch // ROWS),), BATCH=batch, D_SAE=d_sae, SLOTS=slots, PADDED=padded, CHUNK=chunk,
        DEPTH=_power_of_2(-(-d_sae // chunk)), ROWS=ROWS, ROWS_A_SAE=batch // n_saes,
        num_warps=min(chunk // 512, 32),
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


@_stacks
def sum_active_rows(codes: Codes, W: Float[Array, "latents d"], *, n_saes: int) -> Float[Array, "batch d"]:
    """sum_s values[b, s] W[indices[b, s]]."""
    (batch, slots), d = codes.values.shape, W.shape[1]
    columns = min(1024, _power_of_2(d))
    return _call(
        "sum_active_rows", *_renumbered(codes, len(W), n_saes), _in_use(codes), W, out=_shape(batch, d),
        grid=(batch, -(-d // columns)), D=d, SLOTS=slots, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


@_stacks
def sum_nested_rows(
    codes: Codes, W: Float[Array, "latents d"], groups: Int[Array, " latents"], *, n_groups: int, n_saes: int
) -> Float[Array, "batch n_groups d"]:
    """For each group m, sum_s values[b, s] W[indices[b, s]] over the latents of groups 0..m."""
    (batch, slots), d = codes.values.shape, W.shape[1]
    smaller = _power_of_2(n_groups - 1)
    columns = min(512, 2048 // smaller, _power_of_2(d))  # at most 32 sums a thread, beside those over all groups
    return _call(
        "sum_nested_rows", *_renumbered(codes, len(W), n_saes), _in_use(codes), groups, W,
        out=_shape(batch, n_groups, d), grid=(batch, -(-d // columns)), D=d, SLOTS=slots, GROUPS=n_groups,
        SMALLER=smaller, COLUMNS=columns, num_warps=2,
    )  # fmt: skip


@_stacks
def dot_active_rows(
    codes: Codes,
    W: Float[Array, "latents d"],
    g: Float[Array, "batch *n_groups d"],
    groups: Groups = None,
    *,
    n_saes: int,
) -> Float[Array, "batch slots"]:
    """W[indices[b, s]] . g[b], or . g[b, group of the latent]; 0 where a slot is unused."""
    (batch, slots), d, rows = codes.values.shape, W.shape[1], 16
    latents = _renumbered(codes, len(W), n_saes).indices
    return _call(
        "dot_active_rows", latents, _in_use(codes), _group_of_each(groups), W, g, out=_shape(batch, slots),
        grid=(batch, -(-slots // rows)), D=d, SLOTS=slots, GROUPS=_n_groups(g), ROWS=rows,
        COLUMNS=min(256, _power_of_2(d)), num_warps=4,
    )  # fmt: skip


@_stacks
def count_active(codes: Codes, *, d_sae: int, n_saes: int) -> Int[Array, " latents"]:
    """Tokens on which each latent is active."""
    n, block = d_sae * n_saes, 1024
    latents = _active_latents(_renumbered(codes, n, n_saes), n)
    return _call(
        "count_slots", latents, out=_shape(n, dtype=jnp.int32), grid=(-(-len(latents) // block),),
        N=len(latents), D_SAE=n, BLOCK=block, zeroed_outputs=(0,), num_warps=4,
    )  # fmt: skip


@_stacks
def sum_by_latent(
    codes: Codes,
    weights: Float[Array, "batch slots"],
    rows: Float[Array, "batch *n_groups d"],
    groups: Groups = None,
    *,
    d_sae: int,
    n_saes: int,
) -> tuple[Float[Array, "latents d"], Float[Array, " latents"]]:
    """sum_{b, s : indices[b, s] = j} weights[b, s] rows[b] for each latent j, and the sum of the weights alone.

    With groups, rows[b, group of j].
    """
    slots, d, n = weights.shape[1], rows.shape[-1], d_sae * n_saes
    codes = _renumbered(codes, n, n_saes)
    latents = _active_latents(codes, n)
    _, order = lax.sort((latents, jnp.arange(len(latents), dtype=jnp.int32)), num_keys=1, is_stable=True)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count_active(codes, d_sae=n), dtype=jnp.int32)])
    columns = min(1024, _power_of_2(d))
    return _call(
        "sum_by_latent", first, order, weights, _group_of_each(groups), rows, out=(_shape(n, d), _shape(n)),
        grid=(n, -(-d // columns)), D=d, SLOTS=slots, GROUPS=_n_groups(rows), ROWS=4, COLUMNS=columns, num_warps=4,
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


def _renumbered(codes: Codes, latents: int, n_saes: int) -> Codes:
    """Codes with the numbers that the latents of stacked SAEs have among all `latents`."""
    if n_saes == 1:
        return codes
    batch, d_sae = len(codes.values), latents // n_saes
    start = jnp.repeat(jnp.arange(n_saes, dtype=jnp.int32) * d_sae, batch // n_saes)[:, None]
    return codes._replace(indices=jnp.where(codes.indices < d_sae, codes.indices + start, latents))


def _group_of_each(groups: Groups) -> Int[Array, " n"]:
    """What programs take for it; for one group they read nothing."""
    return jnp.zeros(1, jnp.int32) if groups is None else groups


def _n_groups(rows: Float[Array, "batch *n_groups d"]) -> int:
    return rows.shape[1] if rows.ndim == 3 else 1


def _in_use(codes: Codes) -> Int[Array, " batch"]:
    return (codes.values != 0).sum(axis=1, dtype=jnp.int32)  # NaN is in use, so that it is seen


def _active_latents(codes: Codes, d_sae: int) -> Int[Array, " slots_of_all_tokens"]:
    return jnp.where(codes.values != 0, codes.indices, d_sae).ravel()

"""Triton's programs as functions of JAX arrays; `jax_triton` is imported where they are first called.

Sizes of blocks and numbers of warps were measured on an H100 (docs/LOG.md). Left out: gradients, and when to call them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sae.kernels.codes import Codes

CHUNK = 2048
Groups = Int[Array, " d_sae"] | None
"""of each latent, where rows of tokens come once a group"""


def _call(program: str, *inputs: Array, out: Any, grid: Any, **sizes: Any) -> Any:
    import jax_triton  # type: ignore[reportMissingImports]

    from sae.kernels import triton_programs

    return jax_triton.triton_call(*inputs, kernel=getattr(triton_programs, program), out_shape=out, grid=grid, **sizes)


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def keep_largest(
    products: Float[Array, "batch d_sae"],
    b: Float[Array, " d_sae"],
    k: Int[Array, ""],
    slots: int,
    threshold: float | Float[Array, ""],
) -> tuple[Codes, Int[Array, " batch"]]:
    """The k largest of products + b in each row, and how many of a row are above the threshold."""
    batch, d_sae = products.shape
    padded = _power_of_2(slots)
    chunk = max(CHUNK, 2 * padded)
    values, indices, passing, _ = _call(
        "keep_largest", products, b, k, jnp.float32(threshold),
        out=(_shape(batch, slots), _shape(batch, slots, dtype=jnp.int32), _shape(batch, dtype=jnp.int32),
             _shape(batch, padded, dtype=jnp.int32)),
        grid=(batch,), BATCH=batch, D_SAE=d_sae, SLOTS=slots, PADDED=padded, CHUNK=chunk,
        DEPTH=_power_of_2(-(-d_sae // chunk)), ROWS=1, num_warps=4,
    )  # fmt: skip
    return Codes(values, indices), passing


def keep_above(codes: Codes, cutoff: Float[Array, ""], d_sae: int) -> Codes:
    """The codes that reach the cutoff, moved forward."""
    batch, slots = codes.values.shape
    return Codes(*_call(
        "keep_above", *codes, cutoff, out=(_shape(batch, slots), _shape(batch, slots, dtype=jnp.int32)),
        grid=(-(-batch // 4),), BATCH=batch, D_SAE=d_sae, SLOTS=slots, PADDED=_power_of_2(slots), ROWS=4, num_warps=4,
    ))  # fmt: skip


def sum_active_rows(codes: Codes, W: Float[Array, "d_sae d"]) -> Float[Array, "batch d"]:
    """sum_s values[b, s] W[indices[b, s]]."""
    (batch, slots), d = codes.values.shape, W.shape[1]
    columns = min(1024, _power_of_2(d))
    return _call(
        "sum_active_rows", *codes, _in_use(codes), W, out=_shape(batch, d), grid=(batch, -(-d // columns)),
        D=d, SLOTS=slots, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


def sum_nested_rows(
    codes: Codes, W: Float[Array, "d_sae d"], groups: Int[Array, " d_sae"], n_groups: int
) -> Float[Array, "batch n_groups d"]:
    """For each group m, sum_s values[b, s] W[indices[b, s]] over the latents of groups 0..m."""
    (batch, slots), d = codes.values.shape, W.shape[1]
    smaller = _power_of_2(n_groups - 1)
    columns = min(512, 2048 // smaller, _power_of_2(d))  # at most 32 sums a thread, beside those over all groups
    return _call(
        "sum_nested_rows", *codes, _in_use(codes), groups, W, out=_shape(batch, n_groups, d),
        grid=(batch, -(-d // columns)), D=d, SLOTS=slots, GROUPS=n_groups, SMALLER=smaller,
        COLUMNS=columns, num_warps=2,
    )  # fmt: skip


def dot_active_rows(
    codes: Codes, W: Float[Array, "d_sae d"], g: Float[Array, "batch *n_groups d"], groups: Groups = None
) -> Float[Array, "batch slots"]:
    """W[indices[b, s]] . g[b], or . g[b, group of the latent]; 0 where a slot is unused."""
    (batch, slots), d, rows = codes.values.shape, W.shape[1], 16
    return _call(
        "dot_active_rows", codes.indices, _in_use(codes), _group_of_each(groups), W, g, out=_shape(batch, slots),
        grid=(batch, -(-slots // rows)), D=d, SLOTS=slots, GROUPS=_n_groups(g), ROWS=rows,
        COLUMNS=min(256, _power_of_2(d)), num_warps=4,
    )  # fmt: skip


def count_active(codes: Codes, d_sae: int) -> Int[Array, " d_sae"]:
    """Tokens on which each latent is active."""
    latents, block = _active_latents(codes, d_sae), 1024
    return _call(
        "count_slots", latents, out=_shape(d_sae, dtype=jnp.int32), grid=(-(-len(latents) // block),),
        N=len(latents), D_SAE=d_sae, BLOCK=block, zeroed_outputs=(0,), num_warps=4,
    )  # fmt: skip


def sum_by_latent(
    codes: Codes,
    weights: Float[Array, "batch slots"],
    rows: Float[Array, "batch *n_groups d"],
    d_sae: int,
    groups: Groups = None,
) -> tuple[Float[Array, "d_sae d"], Float[Array, " d_sae"]]:
    """sum_{b, s : indices[b, s] = j} weights[b, s] rows[b] for each latent j, and the sum of the weights alone.

    With groups, rows[b, group of j].
    """
    slots, d = weights.shape[1], rows.shape[-1]
    latents = _active_latents(codes, d_sae)
    _, order = lax.sort((latents, jnp.arange(len(latents), dtype=jnp.int32)), num_keys=1, is_stable=True)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count_active(codes, d_sae), dtype=jnp.int32)])
    columns = min(1024, _power_of_2(d))
    return _call(
        "sum_by_latent", first, order, weights, _group_of_each(groups), rows, out=(_shape(d_sae, d), _shape(d_sae)),
        grid=(d_sae, -(-d // columns)), D=d, SLOTS=slots, GROUPS=_n_groups(rows), ROWS=4, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


def descend(
    W: Float[Array, "n d"],
    g: Float[Array, "n d"],
    mean: Float[Array, "n d"],
    square: Float[Array, "n d"],
    scalars: Float[Array, "5"],
    on_sphere: bool,
) -> tuple[Float[Array, "n d"], Float[Array, "n d"], Float[Array, "n d"]]:
    """The next W, mean and square, in the place of the old ones."""
    n, d = W.shape
    return _call(
        "descend", W, g, mean, square, scalars, out=(_shape(n, d),) * 3, grid=(n,),
        input_output_aliases={0: 0, 2: 1, 3: 2}, D=d, PADDED=_power_of_2(d), ON_SPHERE=on_sphere, num_warps=8,
    )  # fmt: skip


def _group_of_each(groups: Groups) -> Int[Array, " n"]:
    """What programs take for it; for one group they read nothing."""
    return jnp.zeros(1, jnp.int32) if groups is None else groups


def _n_groups(rows: Float[Array, "batch *n_groups d"]) -> int:
    return rows.shape[1] if rows.ndim == 3 else 1


def _in_use(codes: Codes) -> Int[Array, " batch"]:
    return (codes.values != 0).sum(axis=1, dtype=jnp.int32)  # NaN is in use, so that it is seen


def _active_latents(codes: Codes, d_sae: int) -> Int[Array, " slots_of_all_tokens"]:
    return jnp.where(codes.values != 0, codes.indices, d_sae).ravel()

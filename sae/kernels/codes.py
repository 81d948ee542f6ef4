"""The active latents of each token: a few of many, kept as values and indices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped


class Codes(NamedTuple):
    """The active latents of each token."""

    values: Float[Array, "batch width"]
    """latents, positive ones first in each row; zero where fewer than `width` are active"""
    indices: Int[Array, "batch width"]
    """which latents these are, without repeats in a row; out of range where a slot is unused"""


def densify(codes: Codes, d_sae: int) -> Shaped[Array, "batch d_sae"]:
    """Write the values out at their indices.

    >>> densify(Codes(jnp.array([[2.0, 0.0]]), jnp.array([[1, 0]])), 3).tolist()
    [[0.0, 2.0, 0.0]]
    """
    rows = jnp.arange(len(codes.values))[:, None]
    return (
        jnp.zeros((len(codes.values), d_sae), codes.values.dtype).at[rows, codes.indices].set(codes.values, mode="drop")
    )


def restrict(codes: Codes, start: int, stop: int) -> Codes:
    """The codes of latents start..stop, counted from `start`; unused slots hold 0 and an index out of range.

    >>> restrict(Codes(jnp.array([[2.0, 1.0]]), jnp.array([[0, 4]])), 3, 6)
    Codes(values=Array([[1., 0.]], dtype=float32), indices=Array([[1, 3]], dtype=int32))
    """
    inside = (codes.indices >= start) & (codes.indices < stop) & (codes.values > 0)
    values, indices = jnp.where(inside, codes.values, 0), jnp.where(inside, codes.indices - start, stop - start)
    return positive_first(Codes(values, indices))


def positive_first(codes: Codes) -> Codes:
    """The codes in the order that `Codes` promises."""
    order = jnp.argsort(codes.values <= 0, axis=1, stable=True)
    return Codes(*(jnp.take_along_axis(slots, order, axis=1) for slots in codes))


def no_gradient(indices: Int[Array, "batch width"]) -> Any:
    """What a gradient rule returns for indices."""
    return np.zeros(indices.shape, jax.dtypes.float0)

"""One step of Adam on a matrix, whose rows may be held on the unit sphere."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sae.kernels import gpu
from sae.kernels.choice import triton_is_chosen
from sae.kernels.devices import AT_REST, WHOLE, n_devices, on_each

EPSILON = 1e-8
_WIDEST = 2**14


class Rates(NamedTuple):
    """Numbers of one step, the same for all weights."""

    scale: Float[Array, ""]
    """what gradients are multiplied by, which clips them"""
    rate: Float[Array, ""]
    """learning rate"""
    beta1: float
    beta2: float
    steps: Int[Array, ""]
    """steps taken, this one included"""


def descend(
    W: Float[Array, "*shape"],
    g: Float[Array, "*shape"],
    mean: Float[Array, "*shape"],
    square: Float[Array, "*shape"],
    rates: Rates,
    on_sphere: bool = False,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The next W, mean and square.

        g'     = scale (g - (g . W) W on the sphere, else g)
        mean   = beta1 mean + (1 - beta1) g'
        square = beta2 square + (1 - beta2) g'^2
        W      = W - rate (mean / (1 - beta1^steps)) / (sqrt(square / (1 - beta2^steps)) + 1e-8), rows back to norm 1

    Source: Kingma & Ba 2015, arXiv:1412.6980. Removing the part of the gradient along a unit row, which would only
    change its norm: Bricken et al. 2023, transformer-circuits.pub/2023/monosemantic-features.
    """
    scale, rate, beta1, beta2, steps = rates
    rate, correction = rate / (1 - beta1**steps), 1 / (1 - beta2**steps)
    if triton_is_chosen() and W.ndim == 2 and W.shape[1] <= _WIDEST:
        scalars = jnp.stack([jnp.float32(value) for value in (scale, beta1, beta2, rate, correction)])
        is_split = len(W) % n_devices() == 0  # rows stand alone, so that any split will do
        split = AT_REST if is_split else WHOLE
        here = partial(gpu.descend, on_sphere=on_sphere)
        return on_each(here, (split,) * 4 + (WHOLE,), (split,) * 3)(W, g, mean, square, scalars)
    g = scale * (project_gradient(W, g) if on_sphere else g)
    mean = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g**2
    W = W - rate * mean / (jnp.sqrt(square * correction) + EPSILON)
    return unit_rows(W) if on_sphere else W, mean, square


def squared_norm(W: Float[Array, "*shape"], g: Float[Array, "*shape"], on_sphere: bool = False) -> Float[Array, ""]:
    """||g||^2, on the sphere without the part along the rows of W: sum of ||g||^2 - (g . W)^2 over unit rows."""
    along = ((g * W).sum(axis=1) ** 2).sum() if on_sphere else 0
    return jnp.maximum((g**2).sum() - along, 0)


def unit_rows(W: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Scale each row to norm 1."""
    return W / jnp.maximum(jnp.linalg.norm(W, axis=1, keepdims=True), 1e-12)


def project_gradient(W: Float[Array, "n d"], g: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Remove from each row of `g` the part along the same, unit, row of W."""
    return g - (g * W).sum(axis=1, keepdims=True) * W

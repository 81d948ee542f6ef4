"""Several devices that take a step together: which of them keeps what, and how they agree.

The devices are a grid with two axes. Those along `latent` split the latents and see the same tokens; those along `data`
split the tokens. At rest each device keeps a share of its own of the rows of every matrix with a row a latent, of
Adam's moments too, so that no two devices update the same weight (as in ZeRO: Rajbhandari et al. 2020,
arXiv:1910.02054): devices along `data` gather the rows of their latents for a step, and share out the sums of their
gradients.

Arrays have the same meaning on a grid as on one device, and XLA divides what is written about them. Kernels are
written for one device: `on_each` runs one on what each device has, and inside it the functions below let devices agree.
On one device all of them do nothing. Devices may be those of several processes (`sae.hosts`), which run one program;
along `latent` they exchange a few numbers a token, along `data` weights and gradients.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from activations.errors import ConfigError
from sae.kernels.codes import Codes

LATENT, DATA = "latent", "data"
WHOLE = PartitionSpec()
BY_TOKEN = PartitionSpec(DATA)
BY_LATENT = PartitionSpec(LATENT)
BY_BOTH = PartitionSpec(DATA, LATENT)
"""of codes, whose slots lie with the latents that they hold"""
AT_REST = PartitionSpec((LATENT, DATA))

grid_in_use: ContextVar[Mesh | None] = ContextVar("grid_in_use", default=None)


def make_grid(latent: int, data: int) -> Mesh | None:
    """The grid of the first latent * data devices, or None for one device.

    Raises: ConfigError if there are not so many, or if there are others that belong to several processes.
    """
    there = jax.devices()
    if jax.process_count() > 1 and latent * data != len(there):
        where = "compute.latent_parallel * compute.data_parallel"
        expected = f"the {len(there)} devices of all {jax.process_count()} processes"
        raise ConfigError(where, expected=expected, got=latent * data, fix="Set them so, or start fewer processes.")
    if latent * data == 1:
        return None
    if len(there) < latent * data:
        where, fix = "compute.latent_parallel * compute.data_parallel", "Lower them, or make more devices visible."
        expected = f"at most the {len(there)} {there[0].platform} devices that JAX sees"
        raise ConfigError(where, expected=expected, got=latent * data, fix=fix)
    devices = np.array(there[: latent * data]).reshape(latent, data)
    return Mesh(devices, (LATENT, DATA), axis_types=(AxisType.Auto, AxisType.Auto))


def place(tree: Any, grid: Mesh | None, d_sae: int) -> Any:
    """Put the arrays of a tree where they are at rest."""
    return tree if grid is None else jax.device_put(tree, at_rest(tree, grid, d_sae))


def at_rest(tree: Any, grid: Mesh, d_sae: int) -> Any:
    """Where each array of a tree is at rest: what has a row a latent is split, the rest is everywhere."""

    def where(leaf: Any) -> NamedSharding:
        return NamedSharding(grid, AT_REST if leaf.shape[:1] == (d_sae,) else WHOLE)

    return jax.tree.map(where, tree)


def on_each(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` on each device of the grid, with the part of its arguments there; on one device `function` itself.

    Args:
      inputs: how each argument is split.
      outputs: how what it returns is split.
    """
    grid = grid_in_use.get()
    if grid is None:
        return function
    return jax.shard_map(function, mesh=grid, in_specs=inputs, out_specs=outputs, check_vma=False)


def n_along(axis: str) -> int:
    """Devices along an axis of the grid."""
    grid = grid_in_use.get()
    return grid.shape[axis] if grid is not None else 1


def n_devices() -> int:
    """Devices of the grid."""
    return n_along(LATENT) * n_along(DATA)


def sum_along(axis: str, values: Any) -> Any:
    """The sum over the devices along an axis; all of them have it."""
    return lax.psum(values, axis) if n_along(axis) > 1 else values


def share_sum(values: Shaped[Array, "latents ..."]) -> Shaped[Array, "share ..."]:
    """The sum over the devices along `data`, of which each keeps the rows that it has at rest."""
    return lax.psum_scatter(values, DATA, tiled=True) if n_along(DATA) > 1 else values


def all_slots(values: Shaped[Array, "batch width"]) -> Shaped[Array, "batch all_width"]:
    """The slots of all devices along `latent`, side by side."""
    return lax.all_gather(values, LATENT, axis=1, tiled=True) if n_along(LATENT) > 1 else values


def on_all(values: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The whole array on each device; not inside `on_each`."""
    grid = grid_in_use.get()
    return values if grid is None else lax.with_sharding_constraint(values, NamedSharding(grid, WHOLE))


def position(axis: str) -> int | Int[Array, ""]:
    """Which device along an axis this is."""
    return lax.axis_index(axis) if n_along(axis) > 1 else 0


def to_local(codes: Codes, n: int) -> Codes:
    """Codes by number among the n latents of this device; what is out of range stays so."""
    return codes._replace(indices=codes.indices - n * position(LATENT)) if n_along(LATENT) > 1 else codes


def to_global(codes: Codes, n: int) -> Codes:
    """The reverse."""
    if n_along(LATENT) == 1:
        return codes
    unused = n * n_along(LATENT)
    return codes._replace(indices=jnp.where(codes.indices < n, codes.indices + n * position(LATENT), unused))

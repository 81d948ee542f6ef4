"""Batches of which each of several processes reads a part of its own, and which their devices put together.

A batch is shuffled over a block, so that the tokens which the devices of one process take lie all over it, and a store
is read, and checked, by the sequence: a process that read what its devices take would read the whole block. So:

1. each process reads an equal part of the sequences of a block; 2. of each batch it copies the tokens of its part to
its devices, filled up to a number that is the same for all; 3. the devices gather what all have, and each takes its own
tokens of the batch, in their order. The arrays that a step gets are those of `sae.feed`, bit for bit.

Devices exchange a batch, batch * d_model values, which is little beside the weights and gradients that they exchange
where tokens are split. Where they are not, each process takes all tokens, and reads whole blocks: latents are split
over hosts because their network is slow. Left out: the order of the data; when a batch is copied (`sae.feed`).
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from activations.store_schema import Stored
from sae import hosts
from sae.data import OnHost, Rows
from sae.kernels.devices import AT_REST

STEPS = 8
"""of how many sizes the arrays are that devices exchange, so that few are compiled"""


class Part(NamedTuple):
    """What a process adds to a batch, in main memory."""

    tokens: Float[np.ndarray, "slots d_model"]
    """those of its part, in the order of the batch; behind them anything"""
    slots: Int[np.ndarray, " batch"]
    """where each token of the batch is among what all processes have"""


class DevicePart(NamedTuple):
    """The same on the devices, of all processes."""

    tokens: Float[Array, "all_slots d_model"]
    slots: Int[Array, " batch"]


class Exchange:
    """Which process reads what, and how batches come together."""

    def __init__(self, sharding: NamedSharding, owners: list[int], process: int):
        """Lay it out for one process.

        Args:
          sharding: how a batch is split, by its tokens alone.
          owners: the process of each device.
          process: this one.
        """
        self._sharding, devices = sharding, list(np.asarray(sharding.mesh.devices).flat)
        self._places = [np.flatnonzero(np.equal(owners, owner)) for owner in sorted(set(owners))]
        """of the devices of each process among all"""
        self._mine = sorted(set(owners)).index(process)
        self._devices = [devices[place] for place in self._places[self._mine]]

    def bounds(self, n_sequences: int, unit: int) -> Int[np.ndarray, " parts_1"]:
        """Where the parts of so many sequences begin and end, each a whole number of units."""
        n_parts, n_units = len(self._places), -(-n_sequences // unit)
        return np.minimum(np.arange(n_parts + 1) * n_units // n_parts * unit, n_sequences)

    def mine(self, bounds: Int[np.ndarray, " parts_1"]) -> tuple[int, int]:
        """Bounds of this process's part."""
        return int(bounds[self._mine]), int(bounds[self._mine + 1])

    def hold(self, host: OnHost, n_sequences: int, unit: int, ctx: int) -> "PartHeld":
        """What holds this process's part of a block of so many sequences at most."""
        return PartHeld(self, host, self.bounds(n_sequences, unit), ctx)

    def route(
        self, sequences: Int[np.ndarray, "n_batches batch"], bounds: Int[np.ndarray, " parts_1"]
    ) -> tuple[Int[np.ndarray, "n_batches slots"], Int[np.ndarray, "n_batches batch"]]:
        """For each of this process's slots which token of the batch it gets, and for each token its slot among all.

        Slots that are left over get token 0, or zeros where it is another process's; nothing reads them.
        """
        n, batch = sequences.shape
        part = np.searchsorted(bounds[1:-1], sequences, side="right")
        own = [part == number for number in range(len(self._places))]
        width = max(-(-int(of.sum(axis=1).max()) // len(at)) for of, at in zip(own, self._places, strict=True))
        step = max(1, batch // (STEPS * self._sharding.mesh.size))
        width = -(-width // step) * step
        taken = np.zeros((n, width * len(self._devices)), np.int64)
        slots = np.empty((n, batch), np.int32)
        for number, (of, at) in enumerate(zip(own, self._places, strict=True)):
            rank = np.cumsum(of, axis=1)[of] - 1
            slots[of] = at[rank // width] * width + rank % width
            if number == self._mine:
                which, token = np.nonzero(of)
                taken[which, rank] = token
        return taken, slots

    def put(self, batch: dict[str, Part]) -> dict[str, DevicePart]:
        """Parts of a batch by hook point, on the devices of this process."""
        return {name: self._put(part) for name, part in batch.items()}

    def _put(self, part: Part) -> DevicePart:
        flat = NamedSharding(self._sharding.mesh, AT_REST)
        shares = np.split(part.tokens, len(self._devices))
        there = [jax.device_put(share, device) for share, device in zip(shares, self._devices, strict=True)]
        shape = (len(shares[0]) * self._sharding.mesh.size, part.tokens.shape[1])
        tokens = jax.make_array_from_single_device_arrays(shape, flat, there)
        slots = jax.make_array_from_callback(part.slots.shape, self._sharding, lambda index: part.slots[index])
        return DevicePart(tokens, slots)

    def together(self, batch: dict[str, DevicePart]) -> dict[str, Float[Array, "batch d_model"]]:
        """The batch; all processes have to ask for the same ones in the same order."""
        hosts.busy()  # this one has read its part, which others may yet wait for
        return {name: _compiled(self._sharding)(*part) for name, part in batch.items()}


class PartHeld:
    """A part of a block in main memory; see `sae.data.Held`."""

    def __init__(self, exchange: Exchange, host: OnHost, bounds: Int[np.ndarray, " parts_1"], ctx: int):
        """Hold in `host` what is this process's within the bounds; a sequence has `ctx` tokens."""
        self._exchange, self._host, self._bounds, self._ctx = exchange, host, bounds, ctx
        self._first, self._last = exchange.mine(bounds)

    def fill(self, start: int, stop: int, read: Callable[[Stored, int], None]) -> None:
        """Have those of the sequences start..stop read that are of the part."""
        first, last = max(start, self._first), min(stop, self._last)
        if first < last:
            self._host.fill(first, last, lambda room, offset: read(room, offset + first - start))

    def batches(self, rows: Rows) -> Iterator[Part]:
        """What this process adds to each batch."""
        taken, slots = self._exchange.route(rows // self._ctx, self._bounds)
        return map(Part, self._host.batches(np.take_along_axis(rows, taken, axis=1)), slots)


@cache
def _compiled(sharding: NamedSharding) -> Callable[[Array, Array], Array]:
    """Puts a batch together; it comes out with that very sharding, since a step is compiled anew for any other name."""
    grid = sharding.mesh
    assert isinstance(grid, Mesh)

    def each(tokens: Array, slots: Array) -> Array:
        return lax.all_gather(tokens, grid.axis_names, tiled=True).at[slots].get(mode="promise_in_bounds")

    inputs = AT_REST, sharding.spec
    together = jax.shard_map(each, mesh=grid, in_specs=inputs, out_specs=sharding.spec, check_vma=False)
    return jax.jit(together, out_shardings=sharding)


def exchange_of(sharding: jax.sharding.Sharding | None) -> Exchange | None:
    """How the processes of this run exchange batches; None where each takes all tokens, or there is one."""
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_addressable:
        return None
    owners = [device.process_index for device in np.asarray(sharding.mesh.devices).flat]
    taken: dict[int, set[int | None]] = {}
    for device, (tokens,) in sharding.devices_indices_map((sharding.mesh.size,)).items():
        taken.setdefault(device.process_index, set()).add(tokens.start)
    is_split = any(part != set.union(*taken.values()) for part in taken.values())
    return Exchange(sharding, owners, jax.process_index()) if is_split else None

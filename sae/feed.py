"""Batches on the device before the step asks for them.

1. Threads read the chunks of the next block while batches are taken from this one. 2. Where blocks fit on one
accelerator, the same threads copy each shard there as soon as it is read, and the device gathers the rows of a batch.
Elsewhere blocks are in main memory: other threads gather, and others copy batches to the device, several at a time,
since one thread copies less than a GPU's bus carries. 3. One thread takes the batches in order, AHEAD of the step.
4. The loop takes them, and waits for the device where it is IN_FLIGHT steps ahead of it.

What a thread raises is raised where its batch is asked for; leaving the context drops what is not begun and waits for
the rest, chunks of a few hundred megabytes at most. The threads change no bit of a batch. Batches of a ring
(`sae.live`) are read as the loop asks for them, since what is there to read changes under it, and a harvest is slower.
Left out: the order of the data.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped

from activations.store_schema import Stored
from sae.data import BATCH_DTYPES, N_BLOCKS, Activations, DataOrder, OnHost, Rows, TokenOrder

DeviceActivations = dict[str, Float[Array, "token d_model"]]
"""activations of the same tokens by hook point, on the device"""
DeviceStored = tuple[Shaped[Array, "... d_model"], Float[Array, "..."] | None]
"""as `Stored`, on the device, with bfloat16 as such"""
AHEAD = 3
"""batches that are ready, or being made so, besides the one that is asked for"""
IN_FLIGHT = 2
"""steps that the device has yet to end when the next one is sent to it"""
READERS, GATHERERS, COPIERS = 4, 8, 4
"""threads at most; each chunk is decoded by several more"""
DEVICE_SHARE = 1 / 8
"""of an accelerator's memory that blocks may take"""


@contextmanager
def feed(
    order: DataOrder,
    start: int,
    stop: int,
    sharding: jax.sharding.Sharding | None = None,
    blocks_on_device: bool | None = None,
) -> Iterator[Iterator[DeviceActivations]]:
    """Batches start..stop, on the device.

    Args:
      sharding: how each is split over devices; none: all of it is on the first.
      blocks_on_device: where blocks are held; none: as `fits_on_device` says.
    """
    if not isinstance(order, TokenOrder):
        yield (jax.device_put(order.batch(i), sharding) for i in range(start, stop))
        return
    if blocks_on_device is None:
        blocks_on_device = sharding is None and fits_on_device(order)
    pools = [ThreadPoolExecutor(min(n, cores())) for n in (READERS, GATHERERS, COPIERS, 1)]
    readers, gatherers, copiers, thread = pools
    put: Callable[[Any], DeviceActivations]
    if blocks_on_device:
        rooms: deque[Stored] = deque()
        batches = order.batches(start, stop, readers.map, lambda _: OnDevice(lambda: _pinned(order.room()), rooms))
        put = _as_it_is
    else:
        memory = Memory() if jax.default_backend() != "cpu" else None
        room = memory.room if memory else np.empty
        batches = order.batches(start, stop, readers.map, lambda n: OnHost(order.room(n), gatherers.map, room))
        put = partial(_put, sharding, memory)
    try:
        yield _ahead(thread, lambda: copiers.submit(put, next(batches)), stop - start)
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown()


def fits_on_device(order: TokenOrder) -> bool:
    """Whether there is an accelerator, of whose memory a small share holds the blocks of an order."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    at_a_change = N_BLOCKS + 1  # the parts of the next block and what they become
    return jax.default_backend() != "cpu" and at_a_change * order.block_bytes <= DEVICE_SHARE * limit


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_it_is(batch: Any) -> Any:
    return batch


def _put(sharding: jax.sharding.Sharding | None, memory: "Memory | None", batch: Activations) -> DeviceActivations:
    there = jax.device_put(batch, sharding)
    if memory:
        jax.block_until_ready(there)
        memory.take_back(batch)
    return there


class OnDevice:
    """Activations of one hook point of a block on the device, which gathers the rows of a batch.

    A few sequences at a time pass through memory that is used again while the processor still has it in its caches,
    and that the device copies from by itself. A CPU as the device keeps that memory.
    """

    def __init__(self, new_room: Callable[[], Stored], rooms: deque[Stored]):
        """Hold nothing yet.

        Args:
          new_room: makes memory for a few sequences.
          rooms: memory that is free, of all blocks.
        """
        self._new_room, self._rooms = new_room, rooms
        self._parts: dict[int, DeviceStored] = {}
        self._whole: DeviceStored | None = None

    def fill(self, start: int, stop: int, read: Callable[[Stored, int], None]) -> None:
        """Have sequences start..stop read, and copied to the device."""
        self._whole = None
        try:
            room = self._rooms.pop()
        except IndexError:
            room = self._new_room()
        for first in range(start, stop, len(room.values)):
            part = room.cut(0, stop - first)
            read(part, first - start)
            values = part.values.view(BATCH_DTYPES["uint16"]) if part.values.dtype == np.uint16 else part.values
            self._parts[first] = jax.block_until_ready(jax.device_put((values, part.scale)))
            if jax.default_backend() == "cpu":
                room = self._new_room()
        self._rooms.append(room)

    def batch(self, rows: Rows) -> Float[Array, "token d_model"]:
        """Activations at these positions, of the type that `sae.data.OnHost` gives."""
        whole = self._whole or _joined([self._parts[first] for first in sorted(self._parts)])
        self._whole, self._parts = whole, {}
        return _taken(*whole, rows.astype(np.int32))


class _Pinned:
    """Memory that stays where it is, so that the device can copy from it without the processor's help.

    numpy sees it through `__array_interface__`, and keeps this object, and so the memory, as long as it does.
    """

    def __init__(self, like: np.ndarray):
        there = jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
        self._owner = jax.block_until_ready(jax.device_put(like, there))
        self.__array_interface__ = {**like.__array_interface__, "data": (self._owner.unsafe_buffer_pointer(), False)}


def _pinned(room: Stored) -> Stored:
    """Memory as large as a room, pinned where it makes a difference; an int8 scale is small."""
    return room if jax.default_backend() == "cpu" else Stored(np.asarray(_Pinned(room.values)), room.scale)


@jax.jit
def _joined(parts: list[DeviceStored]) -> DeviceStored:
    return jax.tree.map(lambda *x: rearrange(jnp.concatenate(x), "seq ctx ... -> (seq ctx) ..."), *parts)


@jax.jit
def _taken(
    values: Shaped[Array, "position d_model"], scale: Float[Array, " position"] | None, rows: Int[Array, " token"]
) -> Float[Array, "token d_model"]:
    x = values.at[rows].get(mode="promise_in_bounds")
    if scale is None:
        return x
    return x.astype(jnp.float32) * scale.at[rows].get(mode="promise_in_bounds")[:, None]


class Memory:
    """Memory of batches that were copied to the device, for others; on a CPU the device keeps the memory itself.

    New memory is given by the page, which takes longer than to gather a batch.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def room(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """What nothing reads any longer, or new memory."""
        free = self._free.setdefault((shape, dtype), [])
        return free.pop() if free else np.empty(shape, dtype)

    def take_back(self, batch: Activations) -> None:
        """Told that nothing will read a batch again; from any thread."""
        for x in batch.values():
            self._free[x.shape, x.dtype].append(x)


def _ahead(thread: Executor, make: Callable[[], Future[DeviceActivations]], n: int) -> Iterator[DeviceActivations]:
    """Results of what n calls begin, of which AHEAD are under way while one is used."""
    made: deque[Future[Future[DeviceActivations]]] = deque()
    for i in range(n):
        while len(made) <= AHEAD and i + len(made) < n:
            made.append(thread.submit(make))
        yield made.popleft().result().result()


class InFlight:
    """What the device has been sent and has not yet ended.

    Without a bound the host would run ahead by many steps, each with its batch in device memory, and a copy of a batch
    to the device may wait for all steps that were sent before it.
    """

    def __init__(self) -> None:
        self._results: deque[Any] = deque()

    def add(self, result: Any) -> None:
        """Wait until the device is at most IN_FLIGHT results behind this one."""
        self._results.append(result)
        if len(self._results) > IN_FLIGHT:
            jax.block_until_ready(self._results.popleft())

"""Batches on the device before the step asks for them.

1. Threads read the chunks of the next block while batches are taken from this one. 2. Where blocks fit on one
accelerator, the same threads copy a few shards at a time there as soon as they are read, and the device gathers the
rows of a batch.
Elsewhere blocks are in main memory: other threads gather, and others copy batches to the device, several at a time,
since one thread copies less than a GPU's bus carries; of several processes that split the tokens each reads a part of
the block, and their devices put a batch together (`sae.exchange`). 3. One thread takes the batches in order, AHEAD of
the step.
4. The loop takes them, and waits for the device where it is IN_FLIGHT steps ahead of it.

Whatever else a step copies to an accelerator waits behind the pieces of a block: it should be there from the start.

What a thread raises is raised where its batch is asked for; leaving the context drops what is not begun and waits for
the rest, chunks of a few hundred megabytes at most. The threads change no bit of a batch. Batches of a ring
(`sae.live`) are read as the loop asks for them, since what is there to read changes under it, and a harvest is slower.
Left out: the order of the data.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped

from activations.store_schema import Stored
from sae.data import BATCH_DTYPES, N_BLOCKS, Activations, DataOrder, Held, OnHost, Rows, TokenOrder
from sae.exchange import Part, exchange_of

DeviceActivations = dict[str, Float[Array, "token d_model"]]
"""activations of the same tokens by hook point, on the device"""
DeviceStored = tuple[Shaped[Array, "... d_model"], Float[Array, "..."] | None]
"""as `Stored`, on the device, with bfloat16 as such"""
AHEAD = 3
"""batches that are ready, or being made so, besides the one that is asked for"""
IN_FLIGHT = 2
"""steps that the device has yet to end when the next one is sent to it"""
READERS, GATHERERS, COPIERS = 8, 8, 4
"""threads at most"""
ROOMS = 32
"""pieces on their way to the device at most: several a reader, since a copy may wait for the steps before it"""
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
    put: Callable[[Any], Any]
    exchange = exchange_of(sharding)
    if blocks_on_device:
        rooms = Rooms(order.piece_sequences, order.room)
        batches = order.batches(start, stop, readers.map, partial(OnDevice, rooms))
        put = _as_it_is
    else:
        memory = Memory() if jax.default_backend() != "cpu" else None
        room = memory.room if memory else np.empty

        def hold(n: int) -> Held:
            host = OnHost(order.room(n), gatherers.map, room)
            return exchange.hold(host, n, order.chunk_sequences, order.ctx) if exchange else host

        batches = order.batches(start, stop, readers.map, hold)
        put = partial(_put, exchange.put if exchange else lambda batch: _split(batch, sharding), memory)
    try:
        ready = _ahead(thread, lambda: copiers.submit(put, next(batches)), stop - start)
        yield map(exchange.together, ready) if exchange else ready
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


def _put(put: Callable[[Any], Any], memory: "Memory | None", batch: Activations | dict[str, Part]) -> Any:
    there = put(batch)
    if memory:
        jax.block_until_ready(there)
        memory.take_back(x.tokens if isinstance(x, Part) else x for x in batch.values())
    return there


def _split(batch: Activations, sharding: jax.sharding.Sharding | None) -> DeviceActivations:
    """A batch that this process has whole, on its devices."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in batch.items()}


class OnDevice:
    """Activations of one hook point of a block on the device, which gathers the rows of a batch."""

    def __init__(self, rooms: "Rooms", n_sequences: int):
        """Hold nothing yet.

        Args:
          rooms: what pieces go through, which blocks share.
          n_sequences: that a block has at most.
        """
        self._rooms, self._pieces = rooms, range(0, n_sequences, rooms.n_sequences)
        self._parts: dict[int, DeviceStored] = {}
        self._whole: DeviceStored | None = None

    def fill(self, start: int, stop: int, read: Callable[[Stored, int], None]) -> None:
        """Have sequences start..stop read, and copied to the device."""
        self._whole = None
        for first in range(start, stop, self._pieces.step):
            room, there = self._rooms.take(), None
            try:
                read(room.cut(0, stop - first), first - start)
                values = room.values.view(BATCH_DTYPES["uint16"]) if room.values.dtype == np.uint16 else room.values
                there = self._parts[first] = jax.device_put((values, room.scale))
            finally:
                self._rooms.give(room, there)

    def batches(self, rows: Rows) -> Iterator[Float[Array, "batch d_model"]]:
        """Activations at these positions, of the type that `sae.data.OnHost` gives."""
        whole = self._whole
        if whole is None:  # of one shape, so that it is compiled once; nothing reads where a piece is missing
            some = next(iter(self._parts.values()))
            whole = _joined([self._parts.get(first, some) for first in self._pieces])
        self._whole, self._parts = whole, {}
        most = len(whole[0]) // rows.shape[1]
        # All at once: a copy of their own for each batch would wait behind the pieces of the next block.
        there = jax.device_put(np.pad(rows, ((0, most - len(rows)), (0, 0))).astype(np.int32))
        return _taken_in_turn(whole, there, len(rows))


def _taken_in_turn(whole: DeviceStored, rows: Int[Array, "most batch"], n: int) -> Iterator[Float[Array, "batch d"]]:
    number = jnp.zeros((), jnp.int32)
    for _ in range(n):
        batch, number = _taken(*whole, rows, number)
        yield batch


class Rooms:
    """Memory for a few sequences each, from which the device copies by itself while others are read.

    It is used again, so that it stays in the processor's caches. A CPU as the device keeps it instead.
    """

    def __init__(self, n_sequences: int, new: Callable[[int], Stored]):
        """Make at most ROOMS of `n_sequences` each, with `new`, when they are needed."""
        self.n_sequences, self._new = n_sequences, new
        self._free: SimpleQueue[tuple[Stored, DeviceStored | None] | None] = SimpleQueue()
        for _ in range(ROOMS):
            self._free.put(None)

    def take(self) -> Stored:
        """One that nothing reads any longer; waits until there is one. Give it back."""
        free = self._free.get()
        if free is None:
            return _pinned(self._new(self.n_sequences))
        room, there = free
        jax.block_until_ready(there)
        return room

    def give(self, room: Stored, there: DeviceStored | None) -> None:
        """Give one back, which may yet be copied to `there`."""
        self._free.put(None if jax.default_backend() == "cpu" else (room, there))


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
    values: Shaped[Array, "position d"],
    scale: Float[Array, " position"] | None,
    rows: Int[Array, "most batch"],
    number: Int[Array, ""],
) -> tuple[Float[Array, "batch d"], Int[Array, ""]]:
    """A batch, and the number of the next one."""
    its = rows[number]
    x = values.at[its].get(mode="promise_in_bounds")
    if scale is not None:
        x = x.astype(jnp.float32) * scale.at[its].get(mode="promise_in_bounds")[:, None]
    return x, number + 1


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

    def take_back(self, batch: Iterable[np.ndarray]) -> None:
        """Told that nothing will read these arrays again; from any thread."""
        for x in batch:
            self._free[x.shape, x.dtype].append(x)


def _ahead(thread: Executor, make: Callable[[], Future[Any]], n: int) -> Iterator[Any]:
    """Results of what n calls begin, of which AHEAD are under way while one is used."""
    made: deque[Future[Future[Any]]] = deque()
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

"""Batches on the device before the step asks for them.

1. Threads read the chunks of the next block while batches are taken from this one. 2. Others gather the rows of a
batch. 3. One takes the batches in order, AHEAD of the step, and others copy them to the device, several at a time,
since one thread copies less than a GPU's bus carries. 4. The loop takes them, and waits for the device where it is
IN_FLIGHT steps ahead of it.

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
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from sae.data import Activations, DataOrder, TokenOrder

DeviceActivations = dict[str, Float[Array, "token d_model"]]
"""activations of the same tokens by hook point, on the device"""
AHEAD = 3
"""batches that are ready, or being made so, besides the one that is asked for"""
IN_FLIGHT = 2
"""steps that the device has yet to end when the next one is sent to it"""
READERS, GATHERERS, COPIERS = 4, 8, 4
"""threads at most; each chunk is decoded by several more"""


@contextmanager
def feed(
    order: DataOrder, start: int, stop: int, sharding: jax.sharding.Sharding | None = None
) -> Iterator[Iterator[DeviceActivations]]:
    """Batches start..stop, on the device.

    Args:
      sharding: how each is split over devices; none: all of it is on the first.
    """
    if not isinstance(order, TokenOrder):
        yield (jax.device_put(order.batch(i), sharding) for i in range(start, stop))
        return
    pools = [ThreadPoolExecutor(min(n, cores())) for n in (READERS, GATHERERS, COPIERS, 1)]
    readers, gatherers, copiers, thread = pools
    memory = Memory() if jax.default_backend() != "cpu" else None
    batches = order.batches(start, stop, readers.map, gatherers.map, memory.room if memory else np.empty)

    def copied(batch: Activations) -> DeviceActivations:
        there = jax.device_put(batch, sharding)
        if memory:
            jax.block_until_ready(there)
            memory.take_back(batch)
        return there

    try:
        yield _ahead(thread, lambda: copiers.submit(copied, next(batches)), stop - start)
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown()


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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

"""Parts of batches, and how devices put them together: all processes are played by this one, which has the devices."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from activations.store import ActivationStore
from sae.data import OnHost, TokenOrder
from sae.exchange import DevicePart, Exchange, exchange_of
from sae.kernels.devices import AT_REST, BY_TOKEN, make_grid
from tests.sae.runs import HOOK

MakeStore = Callable[..., ActivationStore]
BATCH = 64
SPLITS = {
    "two": ((1, 2), [0, 1]),
    "two of two": ((2, 2), [0, 0, 1, 1]),
    "three, unlike": ((1, 4), [0, 1, 1, 2]),
    "more than there are units": ((1, 8), list(range(8))),
}
"""latent and data parallel, and the process of each device"""


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet holds numbers near float32's largest, which no product stays within."""
    empty = np.empty

    def dirty(*args: Any, **kwargs: Any) -> np.ndarray:
        made = empty(*args, **kwargs)
        if made.dtype.kind in "if":
            made.reshape(-1).view(np.uint8)[:] = 0x7E
        return made

    monkeypatch.setattr(np, "empty", dirty)


def order_of(store: ActivationStore) -> TokenOrder:
    return TokenOrder(store, (HOOK,), stop=store.n_sequences - 8, batch_size=BATCH, seed=3, memory_mb=1)


def sharding_of(grid: tuple[int, int]) -> NamedSharding:
    made = make_grid(*grid)
    assert made is not None
    return NamedSharding(made, BY_TOKEN)


class Counting:
    """The order of one process, which counts the sequences that it reads."""

    def __init__(self, store: ActivationStore, monkeypatch: pytest.MonkeyPatch):
        self.order, self.n_read, read = order_of(store), 0, ActivationStore.read_into

        def count(it: ActivationStore, room: Any, name: str, start: int) -> None:
            self.n_read += len(room.values) * (it is self.order._store)
            read(it, room, name, start)

        monkeypatch.setattr(ActivationStore, "read_into", count)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_devices_put_together_is_the_batch_and_nothing_is_read_twice(
    split: str, dtype: str, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, owners = SPLITS[split]
    sharding, store = sharding_of(grid), make_store(hook_points=(HOOK,), store_dtype=dtype)
    n = 2 * sum(block.n_batches for block in order_of(store).epoch(0))
    parts: dict[int, Iterator[Any]] = {}
    counts = []
    for process in sorted(set(owners)):
        counts.append(Counting(ActivationStore.open(store.path), monkeypatch))
        order, exchange = counts[-1].order, Exchange(sharding, owners, process)

        def hold(n: int, order: TokenOrder = order, exchange: Exchange = exchange) -> Any:
            return exchange.hold(OnHost(order.room(n)), n, order.chunk_sequences, order.ctx)

        parts[process] = order.batches(0, n, hold=hold)
    last = Exchange(sharding, owners, owners[-1])
    for whole in order_of(store).batches(0, n):
        own = {process: next(batches)[HOOK] for process, batches in parts.items()}
        of_devices: list[Any] = [None] * len(owners)
        for process, part in own.items():
            places = np.flatnonzero(np.equal(owners, process))
            for place, tokens in zip(places, np.split(part.tokens, len(places)), strict=True):
                of_devices[place] = tokens
        tokens = jax.device_put(np.concatenate(of_devices), NamedSharding(sharding.mesh, AT_REST))
        assert len(tokens) < 2 * BATCH + 8 * len(owners) or len(owners) == 8
        batch = last.together({HOOK: DevicePart(tokens, jnp.asarray(own[0].slots))})[HOOK]
        np.testing.assert_array_equal(np.asarray(batch), whole[HOOK])
        assert batch.sharding == sharding
        assert all(np.array_equal(part.slots, own[0].slots) for part in own.values())
    n_sequences = store.n_sequences - 8
    assert sum(count.n_read for count in counts) == n_sequences, "of one block, which is kept for the second epoch"
    if len(counts) < 4:
        assert max(count.n_read for count in counts) <= n_sequences / len(counts) + counts[0].order.chunk_sequences


def test_parts_are_whole_chunks_and_about_equal() -> None:
    exchange = Exchange(sharding_of((1, 3)), [0, 1, 2], 1)
    assert exchange.bounds(32, 4).tolist() == [0, 8, 20, 32]
    assert exchange.bounds(30, 4).tolist() == [0, 8, 20, 30]
    assert exchange.bounds(4, 4).tolist() == [0, 0, 0, 4]
    assert exchange.mine(exchange.bounds(32, 4)) == (8, 20)


def test_alone_there_is_nobody_to_exchange_with(tmp_path: Path) -> None:
    assert exchange_of(None) is None
    assert exchange_of(sharding_of((2, 2))) is None

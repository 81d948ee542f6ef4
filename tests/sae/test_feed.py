"""The feed: the bits of the plain data order, whatever its threads do, and no thread left behind."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sae.feed
from activations.errors import CorruptArtefactError
from activations.store import ActivationStore
from activations.store_schema import Stored, to_float32
from sae.data import N_BLOCKS, TokenOrder, philox, used_tokens
from sae.feed import AHEAD, IN_FLIGHT, InFlight, feed

HOOKS = ("resid_post.1", "mlp_out.1")
STOP, BATCH, SEED = 60, 32, 3
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.float32}
"""dtypes of batches by that of the store"""
MakeStore = Callable[..., ActivationStore]


def order_of(store: ActivationStore, memory_mb: int = 0) -> TokenOrder:
    """Blocks of one chunk, of 8 sequences but for the last, or one block of all of them."""
    return TokenOrder(store, HOOKS, stop=STOP, batch_size=BATCH, seed=SEED, memory_mb=memory_mb)


def plain_batches(store: ActivationStore, order: TokenOrder) -> dict[str, np.ndarray]:
    """Three epochs in float32, batch after batch, from what the documentation of the order says."""
    batches: dict[str, list[np.ndarray]] = {name: [] for name in HOOKS}
    for epoch in range(3):
        for number, block in enumerate(order.epoch(epoch)):
            parts = [(chunk * 8, min(chunk * 8 + 8, STOP)) for chunk in sorted(block.chunks)]
            for name in HOOKS:
                x = np.concatenate([used_tokens(store, name, *part) for part in parts])
                rows = philox(SEED, epoch, number).permutation(len(x))[: block.n_batches * BATCH]
                batches[name].append(x[rows])
    return {name: np.concatenate(blocks).reshape(-1, BATCH, blocks[0].shape[1]) for name, blocks in batches.items()}


@pytest.fixture
def store(make_store: MakeStore) -> ActivationStore:
    return make_store(hook_points=HOOKS, store_dtype="bfloat16")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    before = set(threading.enumerate())
    yield
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not {name for name in left if name.startswith("ThreadPoolExecutor")}, left


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("memory_mb", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_have_the_bits_of_the_plain_order(
    dtype: str, memory_mb: int, on_device: bool, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.data.GATHERED_ROWS", 7)
    store = make_store(hook_points=HOOKS, store_dtype=dtype)
    order = order_of(store, memory_mb)
    first, last = 5, 2 * sum(block.n_batches for block in order.epoch(0)) + 5
    assert order.locate(last - 1).epoch == 2
    with feed(order, first, last, blocks_on_device=on_device) as batches:
        fed = list(batches)
    plain = plain_batches(store, order)
    assert len(fed) == last - first
    for i, batch in zip(range(first, last), fed, strict=True):
        assert set(batch) == set(HOOKS)
        for name, x in batch.items():
            assert isinstance(x, jax.Array)
            assert x.dtype == DTYPES[dtype]
            np.testing.assert_array_equal(np.asarray(x).astype(np.float32), plain[name][i])
    for i in (first, last - 1):
        for name, x in order.batch(i).items():
            np.testing.assert_array_equal(x.astype(np.float32), plain[name][i])


def test_the_device_widens_bfloat16_to_the_bits_of_the_host() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    wide, scale = to_float32(bits), jnp.float32(0.7)
    scaled = jax.jit(jnp.multiply)
    got, expected = scaled(bits.view(ml_dtypes.bfloat16), scale), scaled(wide, scale)
    is_number = ~np.isnan(wide)
    np.testing.assert_array_equal(
        np.asarray(got).view(np.uint32)[is_number], np.asarray(expected).view(np.uint32)[is_number]
    )


def test_no_more_blocks_are_in_memory_than_said(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    room = store.room

    def counted(n: int) -> Stored:
        stored = room(n)
        if n > 1:
            made.append(weakref.ref(stored.values))
        return stored

    monkeypatch.setattr(store, "room", counted)
    with feed(order_of(store), 0, 60) as batches:
        assert len(list(batches)) == 60, "of more than ten blocks"
    assert len(made) == N_BLOCKS * len(HOOKS), "memory is used again"
    assert not any(ref() is not None for ref in made), "and given up in the end"


def test_a_device_holds_no_more_blocks_than_said_and_memory_only_what_is_on_its_way(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activations.store_schema.SHARD_BYTES", 1)
    monkeypatch.setattr("activations.store.PIECE_BYTES", 1)
    store = make_store(hook_points=HOOKS, store_dtype="bfloat16")
    assert store.piece_sequences == 1, "of the 8 that a chunk of a block has"
    rooms: list[weakref.ref[np.ndarray]] = []
    n_rooms = 5
    held: list[weakref.ref[sae.feed.OnDevice]] = []

    def room(n: int) -> Stored:
        stored = ActivationStore.room(store, n)
        rooms.append(weakref.ref(stored.values))
        assert n == 1
        return stored

    class Counted(sae.feed.OnDevice):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            held.append(weakref.ref(self))

    put, order = jax.device_put, order_of(store)
    monkeypatch.setattr(store, "room", room)
    monkeypatch.setattr(sae.feed, "OnDevice", Counted)
    monkeypatch.setattr(sae.feed, "ROOMS", n_rooms)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_put", lambda x, *there: put(jax.tree.map(np.array, x), *there))
    with feed(order, 0, 60, blocks_on_device=True) as batches:
        fed = [{name: np.asarray(x) for name, x in batch.items()} for batch in batches]
    assert len(held) == N_BLOCKS * len(HOOKS), "of more than ten blocks"
    assert len(rooms) == n_rooms
    assert not any(ref() is not None for ref in [*rooms, *held]), "and given up in the end"
    monkeypatch.undo()
    for got, wanted in zip(fed, order.batches(0, 60), strict=True):
        for name in HOOKS:
            np.testing.assert_array_equal(got[name], wanted[name])


@pytest.mark.parametrize(("backend", "limit", "fits"), [("gpu", 2**30, True), ("gpu", 2, False), ("cpu", 2**30, False)])
def test_blocks_are_on_an_accelerator_that_has_room(
    backend: str, limit: int, fits: bool, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": limit}

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert sae.feed.fits_on_device(order_of(store)) is fits


def test_memory_of_batches_is_used_again_where_the_device_has_copied_them(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[np.ndarray] = []

    class Empty(sae.feed.Memory):
        def room(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            made.append(super().room(shape, dtype))
            return made[-1]

    put = jax.device_put
    monkeypatch.setattr(sae.feed, "Memory", Empty)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_put", lambda batch, _: put(jax.tree.map(np.array, batch)))
    order = order_of(store)
    with feed(order, 0, 40) as batches:
        fed = [{name: np.array(x) for name, x in batch.items()} for batch in batches]
    assert len(made) == 40 * len(HOOKS)
    assert len({id(x) for x in made}) <= (AHEAD + 2) * len(HOOKS)
    for got, wanted in zip(fed, order.batches(0, 40), strict=True):
        for name in HOOKS:
            np.testing.assert_array_equal(got[name], wanted[name])


def test_the_next_block_is_read_beside_this_one_and_nothing_behind_the_last(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, read, ended = order_of(store), [], threading.Event()
    first, second = (order.epoch(0)[i].n_batches for i in (0, 1))

    def noted(room: Stored, hook_point: str, start: int) -> None:
        ActivationStore.read_into(store, room, hook_point, start)
        read.append(start)
        if len(read) == 2 * len(HOOKS):
            ended.set()

    monkeypatch.setattr(store, "read_into", noted)
    with feed(order, 0, first + second) as batches:
        next(batches)
        assert ended.wait(60), "though one batch of many was asked for"
        assert len(list(batches)) == first + second - 1
    assert sorted(read) == sorted(8 * order.epoch(0)[i].chunks[0] for i in (0, 1) for _ in HOOKS)


@pytest.mark.parametrize("on_device", [False, True])
def test_what_cannot_be_read_is_told_where_its_batch_is_asked_for(on_device: bool, store: ActivationStore) -> None:
    order = order_of(store)
    good = order.epoch(0)[0].n_batches
    (chunk,) = order.epoch(0)[1].chunks
    shard = Path(store.path) / HOOKS[1] / f"c.{chunk}.0.0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with feed(order, 0, 100, blocks_on_device=on_device) as batches:
        for _ in range(good):
            next(batches)
        with pytest.raises(CorruptArtefactError, match=rf"'{HOOKS[1]}' in sequences {8 * chunk} to"):
            next(batches)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_leaving_in_the_middle_drops_what_is_not_begun(
    error: type[BaseException], store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.data.N_BLOCKS", 32)
    order, read, reading, let_go = order_of(store, memory_mb=1), [], threading.Event(), threading.Event()
    first, second = (block.chunks for block in order.epoch(0))
    assert (len(first), len(second)) == (4, 4)

    def slow(room: Stored, hook_point: str, start: int) -> None:
        if start // 8 in second:
            read.append(start)
            reading.set()
            assert let_go.wait(60)
        ActivationStore.read_into(store, room, hook_point, start)

    def shutdown(self: ThreadPoolExecutor, **settings: bool) -> None:
        if not settings:  # all are told to stop by now
            let_go.set()
        stop(self, **settings)

    stop = ThreadPoolExecutor.shutdown
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    monkeypatch.setattr(store, "read_into", slow)
    monkeypatch.setattr(sae.feed, "READERS", 1)

    def leave() -> None:
        with feed(order, 0, 20) as batches:
            next(batches)
            assert reading.wait(60)
            raise error

    with pytest.raises(error):
        leave()
    assert len(read) == len(HOOKS), "the chunk that was being read, of four"


def test_a_ring_is_read_when_its_batches_are_asked_for() -> None:
    asked = []

    class Ring:
        def batch(self, i: int) -> dict[str, np.ndarray]:
            asked.append((i, threading.current_thread()))
            return {HOOKS[0]: np.full((2, 2), i, np.float32)}

        def is_ready(self, i: int) -> bool: ...
        def release(self, i: int) -> None: ...
        def finish(self) -> None: ...

    with feed(Ring(), 3, 6) as batches:
        assert asked == []
        for i, batch in enumerate(batches, start=3):
            assert asked[-1] == (i, threading.main_thread())
            assert (batch[HOOKS[0]] == i).all()
    assert len(asked) == 3


def test_a_batch_is_split_as_asked_for(store: ActivationStore) -> None:
    mesh = jax.sharding.Mesh(jax.devices()[:1], "tokens")
    by_tokens = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tokens"))
    with feed(order_of(store), 0, 3, by_tokens) as batches:
        assert {x.sharding for batch in batches for x in batch.values()} == {by_tokens}


def test_as_many_are_made_ahead_as_said() -> None:
    begun = []

    class Inline(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            begun.append(fn)
            done: Future[Any] = Future()
            done.set_result(fn())
            return done

    def make() -> Future[Any]:
        made: Future[Any] = Future()
        made.set_result({})
        return made

    for i, _ in enumerate(sae.feed._ahead(Inline(), make, 20)):
        assert len(begun) == min(i + 1 + AHEAD, 20)


def test_the_host_waits_for_the_step_that_is_too_far_behind() -> None:
    waited = []

    class Result:
        def __init__(self, i: int):
            self.i = i

        def block_until_ready(self) -> None:
            waited.append(self.i)

    in_flight = InFlight()
    for i in range(5):
        in_flight.add({"loss": Result(i)})
        assert waited == list(range(max(0, i + 1 - IN_FLIGHT)))

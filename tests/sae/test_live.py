"""Data order of a ring; with real processes in tests/e2e/test_ring.py."""

from pathlib import Path

import numpy as np
import pytest

from activations.errors import ConfigError, MismatchError
from activations.ring import Reader, read_reader
from activations.store import ActivationStore
from activations.store_schema import HookState, ModelRef, Ring, StoreMeta, StoreState
from activations.store_writer import Group, StoreWriter
from sae.data import held_out, statistics, used_tokens
from sae.live import LiveOrder, check_length

HOOK = "resid_post.1"
ROWS, CTX, WIDTH, BATCH = 4, 8, 3, 10
KEEP = 16 * ROWS * CTX
PINNED = 2 * ROWS


def meta() -> StoreMeta:
    return StoreMeta(
        model=ModelRef(id="tiny", fingerprint="f00d", n_layers=2, d_model=WIDTH), tokenizer_fingerprint="t", text="x",
        text_fingerprint="x", hook_points=(HOOK,), ctx=CTX, store_dtype="float32", compute_dtype="float32",
        batch_tokens=64, commit_sequences=ROWS, outlier_norm=10.0, ring=Ring(keep_tokens=KEEP, max_tokens=4000),
    )  # fmt: skip


def append(writer: StoreWriter, groups: int) -> None:
    """Groups whose tokens can be told apart."""
    for _ in range(groups):
        n = writer.state.committed
        x = np.ones((ROWS, CTX, WIDTH), np.float32)
        x[..., 0] = np.arange(ROWS * CTX).reshape(ROWS, CTX) + n * CTX
        mask = np.random.default_rng(n).random((ROWS, CTX)) < 0.8
        used = x[mask]
        hook = writer.state.hooks.get(HOOK, HookState())
        hook = hook.add(np.linalg.norm(used, axis=1), used.sum(axis=0, dtype=np.float64))
        tokens, documents = np.full((ROWS, CTX), n, np.int32), np.arange(n, n + ROWS, dtype=np.int32)
        state = StoreState(hooks={HOOK: hook}, tokens=hook.n_tokens)
        writer.append(Group(tokens, mask, documents, {HOOK: x}), state)


def order(path: Path, **changes: object) -> LiveOrder:
    settings = {"batch_size": BATCH, "seed": 0, "memory_mb": 1, "owner": "me"} | changes
    return LiveOrder(ActivationStore.open(path), (HOOK,), **settings)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ring of 20 groups, of which 2 are pinned; blocks are of 7."""
    with StoreWriter.open(tmp_path / "ring", meta()) as writer:
        append(writer, 20)
    return tmp_path / "ring"


def names(batch: np.ndarray) -> list[int]:
    return batch[:, 0].astype(int).tolist()


def test_each_token_behind_the_pinned_ones_comes_once(path: Path) -> None:
    live, store = order(path), ActivationStore.open(path)
    assert store.meta.pinned_sequences == PINNED
    seen = []
    for i in range(1000):
        if not live.is_ready(i):
            break
        seen += names(live.batch(i)[HOOK])
    assert len(seen) == len(set(seen))
    blocks = 2 * 7 * ROWS
    allowed = names(used_tokens(store, HOOK, PINNED, PINNED + blocks))
    assert set(seen) <= set(allowed)
    assert len(allowed) - len(seen) < 2 * BATCH, "less than a batch is dropped a block"
    assert seen != sorted(seen)


def test_batches_do_not_depend_on_how_far_the_harvest_is(path: Path) -> None:
    early = order(path)
    n = next(i for i in range(1000) if not early.is_ready(i))
    with StoreWriter.open(path, meta()) as writer:
        append(writer, 3)
    late = order(path)
    assert late.is_ready(n), "the third block is whole now"
    assert early.is_ready(n), "and is seen without opening it again"
    for i in reversed(range(n + 1)):
        np.testing.assert_array_equal(late.batch(i)[HOOK], early.batch(i)[HOOK])
    assert not np.array_equal(order(path, seed=1).batch(0)[HOOK], late.batch(0)[HOOK])


def test_only_what_is_behind_a_checkpoint_is_released(path: Path) -> None:
    live = order(path)
    first_of_second = next(i for i in range(1000) if names(live.batch(i)[HOOK])[0] >= (PINNED + 7 * ROWS) * CTX)
    live.release(first_of_second - 1)
    assert read_reader(ActivationStore.open(path).storage) == Reader(PINNED, False, "me")
    live.release(first_of_second)
    assert read_reader(ActivationStore.open(path).storage) == Reader(PINNED + 7 * ROWS, False, "me")
    before = live.batch(first_of_second)[HOOK]
    with StoreWriter.open(path, meta()) as writer:
        writer.release(PINNED + 7 * ROWS)
    again = order(path)
    np.testing.assert_array_equal(again.batch(first_of_second)[HOOK], before)
    again.release(0)
    assert read_reader(ActivationStore.open(path).storage).released == PINNED + 7 * ROWS, "never taken back"
    again.finish()
    assert read_reader(ActivationStore.open(path).storage).done


def test_statistics_come_from_the_pinned_part(path: Path) -> None:
    store = ActivationStore.open(path)
    assert held_out(store, 0.5) == (0, PINNED)
    x = store.activations(HOOK, 0, PINNED)[store.mask(0, PINNED)]
    np.testing.assert_allclose(statistics(store, HOOK).mean, x.mean(axis=0))
    assert statistics(store, HOOK).n_tokens == len(x) < store.stats(HOOK).n_tokens
    with StoreWriter.open(path, meta()) as writer:
        append(writer, 1)
    later = ActivationStore.open(path)
    assert later.fingerprint == store.fingerprint, "a run is not refused because its ring has moved on"
    np.testing.assert_array_equal(statistics(later, HOOK).mean, statistics(store, HOOK).mean)


def test_a_harvest_that_ends_too_early_is_named(path: Path) -> None:
    live = order(path)
    with StoreWriter.open(path, meta()) as writer:
        writer.finish(complete=True)
    with pytest.raises(MismatchError, match="Lower train_tokens"):
        live.is_ready(1000)
    assert live.is_ready(30), "the last block is cut short, and used"


def test_a_second_run_is_refused(path: Path) -> None:
    order(path)
    order(path)
    with pytest.raises(MismatchError, match="no other run trains on"):
        order(path, owner="you")


def test_too_many_tokens_are_refused_at_once(path: Path) -> None:
    store = ActivationStore.open(path)
    check_length(store, 3900)
    with pytest.raises(ConfigError, match="4,000 tokens"):
        check_length(store, 3999)

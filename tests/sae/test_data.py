"""Batch i depends on (store, seed, i) alone, and an epoch visits each unmasked token at most once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activations.errors import ShapeError
from activations.store import ActivationStore
from sae.data import Activations, TokenOrder, holdout, split, used_tokens

HOOK = "resid_post.1"
MakeStore = Callable[..., ActivationStore]
ONE_CHUNK = 0
"""memory in which one chunk fits, since a block has at least one"""


@pytest.fixture
def store(make_store: MakeStore, numbered_tokens: Any) -> ActivationStore:
    return make_store(fill=numbered_tokens, d_model=4)


def order_of(store: ActivationStore, **changes: Any) -> TokenOrder:
    settings: dict[str, Any] = {"stop": 60, "batch_size": 32, "seed": 0, "memory_mb": ONE_CHUNK} | changes
    return TokenOrder(store, (HOOK,), **settings)


def ids(batch: Activations) -> list[int]:
    return batch[HOOK][:, 0].astype(int).tolist()


def epoch_ids(order: TokenOrder, epoch: int) -> list[int]:
    sizes = [sum(block.n_batches for block in order.epoch(e)) for e in range(epoch + 1)]
    return [i for batch in order.batches(sum(sizes[:-1]), sum(sizes)) for i in ids(batch)]


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reads=st.lists(st.integers(0, 80), min_size=1, max_size=6), memory_mb=st.sampled_from([0, 1]))
def test_batch_does_not_depend_on_what_was_read_before(
    store: ActivationStore, reads: list[int], memory_mb: int
) -> None:
    used = order_of(store, memory_mb=memory_mb)
    for i in reads:
        fresh = order_of(store, memory_mb=memory_mb)
        np.testing.assert_array_equal(used.batch(i)[HOOK], fresh.batch(i)[HOOK])


def test_batches_from_a_later_start_are_the_same(store: ActivationStore) -> None:
    whole = [ids(batch) for batch in order_of(store).batches(0, 70)]
    assert [ids(batch) for batch in order_of(store).batches(33, 70)] == whole[33:]


@pytest.mark.parametrize("memory_mb", [0, 1])
def test_epoch_repeats_nothing_and_misses_less_than_a_batch_a_block(store: ActivationStore, memory_mb: int) -> None:
    order = order_of(store, memory_mb=memory_mb)
    for epoch in (0, 1):
        seen = epoch_ids(order, epoch)
        assert len(set(seen)) == len(seen)
        assert order.n_tokens - len(seen) < 32 * len(order.epoch(epoch))


def test_masked_and_held_out_tokens_never_appear(store: ActivationStore) -> None:
    allowed = used_tokens(store, HOOK, 0, 60)[:, 0].astype(int).tolist()
    assert set(epoch_ids(order_of(store), 0)) <= set(allowed)
    assert (~store.mask(0, 60)).sum() > 0


def test_seed_and_epoch_change_the_order(store: ActivationStore) -> None:
    assert epoch_ids(order_of(store), 0) != epoch_ids(order_of(store), 1)
    assert epoch_ids(order_of(store), 0) != epoch_ids(order_of(store, seed=1), 0)


def test_a_block_is_shuffled_across_its_chunks(store: ActivationStore) -> None:
    first = np.array(ids(order_of(store, memory_mb=1).batch(0)))
    assert np.ptp(first) > 2 * 8 * 16, "one batch spans several chunks"
    assert (np.diff(first) < 0).mean() > 0.25, "and is in no order"


def test_a_store_too_small_for_a_batch_says_so(store: ActivationStore) -> None:
    with pytest.raises(ShapeError, match="at least one batch of 5000, got 8"):
        order_of(store, batch_size=5000)


def test_epochs_whose_blocks_are_less_than_a_batch_are_passed_over(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch as large as one block of the first epoch, whose two chunks meet again in few others."""
    chunk_bytes = order_of(store).block_bytes
    monkeypatch.setattr("sae.data.N_BLOCKS", 2**20 // (2 * chunk_bytes))
    tokens = order_of(store, batch_size=1, memory_mb=1).epoch(0)
    order = order_of(store, batch_size=max(block.n_batches for block in tokens), memory_mb=1)
    places = [order.locate(i) for i in range(4)]
    assert len({len(block.chunks) for block in tokens}) == 1
    assert any(not sum(block.n_batches for block in order.epoch(e)) for e in range(places[-1].epoch))
    for i, batch in enumerate(order.batches(0, 4)):
        assert ids(batch) == ids(order.batch(i))


def test_split_is_a_document_boundary(store: ActivationStore) -> None:
    for fraction in (0.05, 0.2, 0.5):
        stop = split(store, fraction)
        documents = store.documents()
        assert documents[stop] != documents[stop - 1]
        assert abs(stop - 64 * (1 - fraction)) <= 2.5, "documents are 5 sequences long"


def test_split_without_boundaries_cuts_at_the_share(make_store: MakeStore) -> None:
    assert split(make_store(document=1000), 0.25) == 48


def test_holdout_is_unmasked_bounded_and_spread(store: ActivationStore) -> None:
    allowed = used_tokens(store, HOOK, 20, 64)
    assert np.array_equal(holdout(store, (HOOK,), 20, store.n_sequences, 10**6)[HOOK], allowed)
    some = holdout(store, (HOOK,), 20, store.n_sequences, 100)[HOOK]
    assert 90 <= len(some) <= 100
    assert set(some[:, 0]) <= set(allowed[:, 0])
    assert np.ptp(some[:, 0]) > 0.7 * np.ptp(allowed[:, 0])


@pytest.mark.parametrize("memory_mb", [0, 1])
def test_hook_points_of_a_batch_are_of_the_same_tokens(
    make_store: MakeStore, numbered_tokens: Any, memory_mb: int
) -> None:
    names = ("resid_post.1", "mlp_out.1", "resid_post.0")
    several = make_store(fill=numbered_tokens, d_model=4, hook_points=names)
    order = TokenOrder(several, names, stop=60, batch_size=32, seed=0, memory_mb=memory_mb)
    for i in (0, 5, 40):
        batch = order.batch(i)
        assert tuple(batch) == names
        for number, name in enumerate(names):
            np.testing.assert_array_equal(batch[name][:, 0], batch[HOOK][:, 0])
            assert (batch[name][:, 1:] == 1 + number).all(), "each hook point has its own values"
    kept = holdout(several, names, 60, 64, 1000)
    assert len({len(x) for x in kept.values()}) == 1


def test_holdout_of_masked_tokens_says_so(make_store: MakeStore) -> None:
    store = make_store(masked=0.0)
    store.mask = lambda start=0, stop=None: np.zeros((len(store.tokens(start, stop)), store.ctx), bool)  # type: ignore[method-assign]
    with pytest.raises(ShapeError, match="held-out tokens"):
        holdout(store, (HOOK,), 60, store.n_sequences, 100)

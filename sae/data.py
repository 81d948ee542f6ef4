"""Data order: batch i is a pure function of (store, seed, i), so that a run resumes anywhere and replays nothing.

1. The last sequences are held out, from the document boundary nearest to the asked share.
2. Each epoch permutes the chunks (shards of the store) of the rest, and groups as many as fit into memory into blocks.
3. The unmasked tokens of a block are permuted and cut into batches; what is left over, less than a batch, is dropped.
4. The number of unmasked tokens of each chunk is known, so batch i maps to (epoch, block, offset) by arithmetic.

All that is kept between calls is a cache of the current block and its order; nothing depends on what was read before.
A store that is still being harvested has an order of its own, in `sae.live`. Left out: anything that depends on a
framework.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from activations.errors import ShapeError
from activations.store import ActivationStore
from activations.store_schema import HookState, HookStats

Activations = dict[str, Float[np.ndarray, "token d_model"]]
"""activations of the same tokens by hook point"""


class Place(NamedTuple):
    """Where a batch is."""

    epoch: int
    block: int
    offset: int
    """batches of the same block before it"""


class Block(NamedTuple):
    """Sequences that are in memory together."""

    chunks: tuple[int, ...]
    n_batches: int


@runtime_checkable
class DataOrder(Protocol):
    """Where training gets its batches from."""

    def is_ready(self, i: int) -> bool:
        """Whether batch i can be read now."""
        ...

    def batch(self, i: int) -> Activations:
        """Activations of batch i."""
        ...

    def release(self, i: int) -> None:
        """Told that batches before i will never be asked for again."""
        ...

    def finish(self) -> None:
        """Told that no batch will be asked for again."""
        ...


def held_out(store: ActivationStore, holdout_fraction: float) -> tuple[int, int]:
    """Bounds of the sequences that are never trained on: the store's end, or a ring's pinned start."""
    if store.meta.ring:
        return 0, min(store.meta.pinned_sequences, store.n_sequences)
    return split(store, holdout_fraction), store.n_sequences


def statistics(store: ActivationStore, hook_point: str) -> HookStats:
    """Statistics to train and evaluate with: the store's own, or those of a ring's pinned start, which never change."""
    if not store.meta.ring:
        return store.stats(hook_point)
    x = used_tokens(store, hook_point, 0, store.meta.pinned_sequences)
    return HookState().add(np.linalg.norm(x, axis=1), x.sum(axis=0, dtype=np.float64)).stats()


def philox(*key: int) -> np.random.Generator:
    """Random numbers that are a pure function of a key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))


def split(store: ActivationStore, holdout_fraction: float) -> int:
    """First held-out sequence: the document boundary nearest to the asked share, or that share if there is none."""
    n = store.n_sequences
    target = min(max(round(n * (1 - holdout_fraction)), 1), max(n - 1, 1))
    boundaries = 1 + np.flatnonzero(np.diff(store.documents(0, n)))
    return int(boundaries[np.abs(boundaries - target).argmin()]) if len(boundaries) else target


class TokenOrder:
    """Shuffled batches of the sequences before `stop`."""

    def __init__(
        self,
        store: ActivationStore,
        hook_points: tuple[str, ...],
        *,
        stop: int,
        batch_size: int,
        seed: int,
        memory_mb: int,
    ):
        """Count the unmasked tokens; raises ShapeError if they do not fill one batch."""
        self._store, self._hook_points, self._stop = store, hook_points, stop
        self._batch_size, self._seed = batch_size, seed
        self._rows = store.meta.commit_sequences
        used = store.mask(0, stop).sum(axis=1)
        self._counts = np.add.reduceat(used, np.arange(0, stop, self._rows))
        chunk_bytes = self._rows * store.ctx * store.d_model * 4 * len(hook_points)
        self._block_chunks = max(1, memory_mb * 2**20 // chunk_bytes)
        self._epochs: dict[int, tuple[Block, ...]] = {}
        self._cached: tuple[tuple[int, ...], Activations] | None = None
        self._shuffled: tuple[tuple[int, int], np.ndarray] | None = None
        if not sum(block.n_batches for block in self.epoch(0)):
            raise ShapeError(
                f"{store.path}: unmasked training tokens",
                expected=f"at least one batch of {batch_size}",
                got=int(used.sum()),
                fix="Harvest more tokens, or lower batch_size.",
            )

    @property
    def n_tokens(self) -> int:
        """Unmasked tokens to train on."""
        return int(self._counts.sum())

    def epoch(self, epoch: int) -> tuple[Block, ...]:
        """Blocks of an epoch, in order."""
        if epoch not in self._epochs:
            order = self._random(epoch).permutation(len(self._counts)).tolist()
            step = self._block_chunks
            groups = [tuple(order[i : i + step]) for i in range(0, len(order), step)]
            self._epochs[epoch] = tuple(Block(g, int(self._counts[list(g)].sum()) // self._batch_size) for g in groups)
        return self._epochs[epoch]

    def locate(self, i: int) -> Place:
        """Where batch i is."""
        for epoch in range(i + 1):
            for number, block in enumerate(self.epoch(epoch)):
                if i < block.n_batches:
                    return Place(epoch, number, i)
                i -= block.n_batches
        raise AssertionError("an epoch has at least one batch")

    def batch(self, i: int) -> Activations:
        """Activations of batch i."""
        place = self.locate(i)
        block = self.epoch(place.epoch)[place.block]
        n = int(self._counts[list(block.chunks)].sum())
        start = place.offset * self._batch_size
        rows = self._order(place, n)[start : start + self._batch_size]
        return {name: x[rows] for name, x in self._tokens(block).items()}

    def is_ready(self, i: int) -> bool:
        """Always: the store is whole."""
        return True

    def release(self, i: int) -> None:
        """Nothing to do: the store keeps everything."""

    def finish(self) -> None:
        """Nothing to do."""

    def batches(self, start: int, stop: int) -> Iterator[Activations]:
        """Batches start..stop."""
        return (self.batch(i) for i in range(start, stop))

    def _tokens(self, block: Block) -> Activations:
        """Tokens of a block in the order of the store, so that a store of one block is read once for all epochs."""
        chunks = tuple(sorted(block.chunks))
        if self._cached is None or self._cached[0] != chunks:
            self._cached = None  # frees the old block before the new one is read
            self._cached = chunks, {name: self._read(name, chunks) for name in self._hook_points}
        return self._cached[1]

    def _read(self, hook_point: str, chunks: tuple[int, ...]) -> Float[np.ndarray, "token d_model"]:
        tokens = np.empty((int(self._counts[list(chunks)].sum()), self._store.d_model), np.float32)
        at = 0
        for chunk in chunks:
            start, stop = chunk * self._rows, min((chunk + 1) * self._rows, self._stop)
            part = used_tokens(self._store, hook_point, start, stop)
            tokens[at : at + len(part)] = part
            at += len(part)
        return tokens

    def _order(self, place: Place, n: int) -> Int[np.ndarray, " token"]:
        key = place.epoch, place.block
        if self._shuffled is None or self._shuffled[0] != key:
            self._shuffled = key, self._random(*key).permutation(n)
        return self._shuffled[1]

    def _random(self, *place: int) -> np.random.Generator:
        return philox(self._seed, *place)


def used_tokens(store: ActivationStore, hook_point: str, start: int, stop: int) -> Float[np.ndarray, "token d_model"]:
    """Unmasked activations of sequences start..stop, in order."""
    return store.activations(hook_point, start, stop)[store.mask(start, stop)]


def holdout(
    store: ActivationStore, hook_points: tuple[str, ...], start: int, stop: int, max_tokens: int
) -> Activations:
    """About `max_tokens` held-out tokens, never more, from sequences spread evenly over start..stop.

    Raises: ShapeError if all of them are masked.
    """
    used = store.mask(start, stop).sum(axis=1)
    needed = min(len(used), int(np.ceil(max_tokens / max(used.mean(), 1))))
    chosen = (start + np.unique(np.linspace(0, len(used) - 1, max(needed, 1)).astype(int))).tolist()
    if not used[np.array(chosen) - start].any():
        raise ShapeError(
            f"{store.path}: held-out tokens", expected="some that are unmasked", got=0, fix="Raise holdout_fraction."
        )
    return {
        name: np.concatenate([used_tokens(store, name, i, i + 1) for i in chosen])[:max_tokens] for name in hook_points
    }

"""Data order: batch i is a pure function of (store, seed, i), so that a run resumes anywhere and replays nothing.

1. The last sequences are held out, from the document boundary nearest to the asked share.
2. Each epoch permutes the chunks (commits of the store) of the rest, and divides them into as few blocks as memory
   allows, all about as large: a small one would end before the next is read.
3. The unmasked tokens of a block are permuted and cut into batches; what is left over, less than a batch, is dropped.
4. The number of unmasked tokens of each chunk is known, so batch i maps to (epoch, block, offset) by arithmetic.

A block is held as the store keeps it, masked tokens and all, and each token is copied once, into its batch: of
bfloat16, which the step widens on the device, to the bits that `ActivationStore.activations` gives. Nothing depends on
what was read before, nor on threads and blocks on a device, which `sae.feed` has. A store that is still being harvested
has an order of its own, in `sae.live`. Left out: anything that depends on a framework.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int

from activations.errors import ShapeError
from activations.store import ActivationStore
from activations.store_schema import HookState, HookStats, Stored, to_float32

Activations = dict[str, Float[np.ndarray, "token d_model"]]
"""activations of the same tokens by hook point"""
Map = Callable[..., Iterator[Any]]
"""`map`, or that of an executor, which begins at once"""
Room = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""`np.empty`, or what gives memory that was used before"""
Rows = Int[np.ndarray, "n_batches batch"]
"""positions, in a block, of the tokens of each batch"""
N_BLOCKS = 2
"""held at a time: one that batches are taken from, and the next, which is read meanwhile"""
GATHERED_ROWS = 1024
"""tokens of a batch that one thread copies at a time"""
BATCH_DTYPES = {"uint16": ml_dtypes.bfloat16, "int8": np.float32}
"""dtypes of batches, where those of the store's arrays are others"""


@runtime_checkable
class Held(Protocol):
    """The activations of one hook point of a block, in main memory or on a device."""

    def fill(self, start: int, stop: int, read: Callable[[Stored, int], None]) -> None:
        """Have sequences start..stop of the block read; from any thread. The first call after `batches` begins anew.

        Args:
          read: fills memory with as many sequences as fit, from the one of this number on, counted from `start`.
        """
        ...

    def batches(self, rows: Rows) -> Iterator[Any]:
        """Activations [batch, d_model] at these positions, batch after batch, once the whole block is filled."""
        ...


class OnHost:
    """In main memory, where threads gather the rows of a batch."""

    def __init__(
        self,
        stored: Stored,
        gather: Map = map,
        room: Room = np.empty,
    ):
        """Use this memory.

        Args:
          gather: as `map`, for the parts of a batch.
          room: memory for a batch.
        """
        self._stored, self._gather, self._room = stored, gather, room

    def fill(self, start: int, stop: int, read: Callable[[Stored, int], None]) -> None:
        """Have sequences start..stop read to their place."""
        read(self._stored.cut(start, stop), 0)

    def batches(self, rows: Rows) -> Iterator[Float[np.ndarray, "batch d_model"]]:
        """Activations at these positions, of the store's own type but for int8, which is widened."""
        return (_gathered(self._stored, batch, self._gather, self._room) for batch in rows)


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


class Loaded(NamedTuple):
    """A block in memory, and what is asked for of it."""

    chunks: tuple[int, ...]
    held: dict[str, Held]
    """what was read, by hook point, in the order of the store"""
    used: Int[np.ndarray, " token"]
    """positions that are not masked"""
    rows: Rows


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
        mask = store.mask(0, stop)
        self._counts = np.add.reduceat(mask.sum(axis=1), np.arange(0, stop, self._rows))
        self._mask = np.packbits(mask, axis=1)  # zarr would keep the loop from running as long as it decodes one
        chunk_bytes = self._rows * sum(x.nbytes for x in store.room(1) if x is not None) * len(hook_points)
        self._block_chunks = max(1, memory_mb * 2**20 // (N_BLOCKS * chunk_bytes))
        self.block_bytes = min(self._block_chunks, len(self._counts)) * chunk_bytes
        """of the activations of a block, of all hook points, at most"""
        self._epochs: dict[int, tuple[Block, ...]] = {}
        if not sum(block.n_batches for block in self.epoch(0)):
            raise ShapeError(
                f"{store.path}: unmasked training tokens",
                expected=f"at least one batch of {batch_size}",
                got=int(mask.sum()),
                fix="Harvest more tokens, or lower batch_size.",
            )

    @property
    def batch_size(self) -> int:
        """Tokens of a batch."""
        return self._batch_size

    @property
    def n_tokens(self) -> int:
        """Unmasked tokens to train on."""
        return int(self._counts.sum())

    def epoch(self, epoch: int) -> tuple[Block, ...]:
        """Blocks of an epoch, in order."""
        if epoch not in self._epochs:
            order = self._random(epoch).permutation(len(self._counts))
            groups = np.array_split(order, -(-len(order) // self._block_chunks))
            self._epochs[epoch] = tuple(
                Block(tuple(group.tolist()), int(self._counts[group].sum()) // self._batch_size) for group in groups
            )
        return self._epochs[epoch]

    def locate(self, i: int) -> Place:
        """Where batch i is."""
        epoch = 0
        while True:  # where blocks are hardly a batch, some epochs have none
            for number, block in enumerate(self.epoch(epoch)):
                if i < block.n_batches:
                    return Place(epoch, number, i)
                i -= block.n_batches
            epoch += 1

    def batch(self, i: int) -> Activations:
        """Activations of batch i; reads its whole block."""
        return next(self.batches(i, i + 1))

    def batches(
        self, start: int, stop: int, read: Map = map, hold: Callable[[int], Held] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Batches start..stop.

        Args:
          read: as `map`, for the parts of a block: one that works at once reads a block ahead.
          hold: makes what holds one hook point of a block of so many sequences at most; none: main memory does.
        """
        hold = hold or (lambda n: OnHost(self.room(n)))
        parts, spare = self._parts(start, stop), None
        loaded, loading = None, self._begin(next(parts, None), None, None, read, hold)
        while loading:
            before, loaded = loaded, loading()
            if before and before.held is not loaded.held:
                spare = before.held
            made = {name: held.batches(loaded.rows) for name, held in loaded.held.items()}
            loading = self._begin(next(parts, None), loaded, spare, read, hold)
            for _ in loaded.rows:
                yield {name: next(batches) for name, batches in made.items()}

    @property
    def piece_sequences(self) -> int:
        """Sequences that are best read at a time; a chunk is a whole number of pieces."""
        return self._store.piece_sequences

    @property
    def ctx(self) -> int:
        """Tokens of a sequence."""
        return self._store.ctx

    @property
    def chunk_sequences(self) -> int:
        """Sequences that are read, and checked, as one; a piece is a whole number of these chunks."""
        return self._store.chunk_sequences

    def room(self, n: int) -> Stored:
        """Memory for `n` sequences of one hook point."""
        return self._store.room(n)

    def is_ready(self, i: int) -> bool:
        """Always: the store is whole."""
        return True

    def release(self, i: int) -> None:
        """Nothing to do: the store keeps everything."""

    def finish(self) -> None:
        """Nothing to do."""

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Place, int]]:
        """Batches start..stop by block: the place of the first, and how many there are."""
        place = self.locate(start)
        while start < stop:
            blocks = self.epoch(place.epoch)
            n = min(blocks[place.block].n_batches - place.offset, stop - start)
            if n:
                yield place, n
            start += n
            is_last = place.block == len(blocks) - 1
            place = Place(place.epoch + 1, 0, 0) if is_last else Place(place.epoch, place.block + 1, 0)

    def _begin(
        self,
        part: tuple[Place, int] | None,
        before: Loaded | None,
        spare: dict[str, Held] | None,
        read: Map,
        hold: Callable[[int], Held],
    ) -> Callable[[], Loaded] | None:
        """Begin to read the block of a part, if there is one; returns what waits for it.

        Tokens are in the order of the store, so that a store of one block is read once for all epochs. Blocks are read
        to memory that was used before: the first touch of new memory costs as much as a read.
        """
        if part is None:
            return None
        place, n = part
        chunks = tuple(sorted(self.epoch(place.epoch)[place.block].chunks))
        same = before if before is not None and before.chunks == chunks else None
        n_sequences = min(self._block_chunks, len(self._counts)) * self._rows
        held = same.held if same else spare or {name: hold(n_sequences) for name in self._hook_points}
        orders = read(self._order, [place])
        masks = iter(()) if same else read(partial(self._read, held), range(len(chunks)), chunks)

        def wait() -> Loaded:
            used = same.used if same else np.flatnonzero(np.concatenate(list(masks)))
            rows = used[next(orders)][place.offset * self._batch_size :][: n * self._batch_size]
            return Loaded(chunks, held, used, rows.reshape(n, self._batch_size))

        return wait

    def _read(self, held: dict[str, Held], number: int, chunk: int) -> Bool[np.ndarray, " position"]:
        """Read a chunk to its place among those of its block; returns which of its tokens may be used."""
        start, stop = chunk * self._rows, min((chunk + 1) * self._rows, self._stop)
        at = number * self._rows

        def read(name: str, room: Stored, offset: int) -> None:
            self._store.read_into(room, name, start + offset)

        for name, whole in held.items():
            whole.fill(at, at + stop - start, partial(read, name))
        return np.unpackbits(self._mask[start:stop], axis=1, count=self._store.ctx).astype(bool).ravel()

    def _order(self, place: Place) -> Int[np.ndarray, " token"]:
        chunks = self.epoch(place.epoch)[place.block].chunks
        return self._random(place.epoch, place.block).permutation(int(self._counts[list(chunks)].sum()))

    def _random(self, *place: int) -> np.random.Generator:
        return philox(self._seed, *place)


def _gathered(
    stored: Stored, rows: Int[np.ndarray, " token"], gather: Map, room: Room
) -> Float[np.ndarray, "token d_model"]:
    """Activations at these positions, of the store's own type but for int8, which is widened."""
    values, scale = rearrange(stored.values, "seq ctx d -> (seq ctx) d"), stored.scale
    out = room((len(rows), values.shape[-1]), np.dtype(BATCH_DTYPES.get(values.dtype.name, values.dtype)))

    def take(start: int) -> None:
        part, into = rows[start : start + GATHERED_ROWS], out[start : start + GATHERED_ROWS]
        if scale is not None:
            into[:] = to_float32(values[part], scale.ravel()[part])
        else:  # "clip", since numpy goes through a buffer where it may have to raise
            np.take(values, part, axis=0, out=into.view(values.dtype), mode="clip")

    list(gather(take, range(0, len(rows), GATHERED_ROWS)))
    return out


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

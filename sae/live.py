"""Data order of a ring: a store that is harvested while it is trained on, and keeps only what is still needed.

1. The pinned sequences at its start are held out, and the statistics of training come from them alone, since they are
   the only ones that every run and every resumption finds.
2. The groups behind them are taken in the order in which they were harvested, as many together as fit into memory and
   into half of the ring, so that the harvest can fill one half while the other is trained on.
3. The unmasked tokens of such a block are permuted and cut into batches; what is left over is dropped.
4. What lies before a checkpoint is released, never more: a run that resumes there needs the rest again.

Batch i is a pure function of (what is harvested, seed, i), as in `sae.data`; a text goes through once. Left out: more
than one trainer on a ring.
"""

from activations.errors import ConfigError, MismatchError
from activations.ring import Reader, read_reader, write_reader
from activations.store import ActivationStore
from sae.data import Activations, Place, philox, used_tokens


class LiveOrder:
    """Shuffled batches of a ring, each token once."""

    def __init__(
        self,
        store: ActivationStore,
        hook_points: tuple[str, ...],
        *,
        batch_size: int,
        seed: int,
        memory_mb: int,
        owner: str,
    ):
        """Take the ring for the run `owner`.

        Raises: MismatchError if another run that has not ended has it.
        """
        ring = store.meta.ring
        assert ring is not None
        self._store, self._hook_points, self._batch_size, self._seed = store, hook_points, batch_size, seed
        rows = store.meta.commit_sequences
        groups = (ring.keep_tokens // store.ctx - store.meta.pinned_sequences) // rows // 2
        in_memory = memory_mb * 2**20 // (rows * store.ctx * store.d_model * 4 * len(hook_points))
        self._block_sequences = rows * max(1, min(groups, in_memory))
        self._n_batches: list[int] = []
        self._cached: tuple[int, Activations] | None = None
        self._reader = _take(store, owner)

    def is_ready(self, i: int) -> bool:
        """Whether batch i is harvested already.

        Raises: MismatchError if it never will be, because the harvest has ended before it.
        """
        if self._locate(i) is not None:
            return True
        self._store = ActivationStore.open(self._store.path)
        if self._locate(i) is None and self._store.is_complete:
            raise MismatchError(
                self._store.path,
                expected=f"{(i + 1) * self._batch_size:,} tokens to train on",
                got=f"a harvest that ended after {sum(self._n_batches) * self._batch_size:,}",
                fix="Lower train_tokens; the checkpoint is kept.",
            )
        return self._locate(i) is not None

    def batch(self, i: int) -> Activations:
        """Activations of batch i, which must be ready."""
        place = self._locate(i)
        assert place is not None
        if self._cached is None or self._cached[0] != place.block:
            self._cached = None  # frees the old block before the new one is read
            start, stop = self._bounds(place.block)
            self._cached = place.block, self._read(place.block, start, stop)
        start = place.offset * self._batch_size
        return {name: x[start : start + self._batch_size] for name, x in self._cached[1].items()}

    def _read(self, block: int, start: int, stop: int) -> Activations:
        order = philox(self._seed, 0, block).permutation(int(self._store.mask(start, stop).sum()))
        return {name: used_tokens(self._store, name, start, stop)[order] for name in self._hook_points}

    def release(self, i: int) -> None:
        """Let the ring drop what only batches before i need."""
        place = self._locate(i)
        released = self._bounds(place.block if place else len(self._n_batches))[0]
        if released > self._reader.released:
            self._reader = self._reader._replace(released=released)
            write_reader(self._store.storage, self._reader)

    def finish(self) -> None:
        """Tell the harvest that nothing more is needed."""
        write_reader(self._store.storage, self._reader._replace(done=True))

    def _locate(self, i: int) -> Place | None:
        """Where batch i is, as far as the store is known."""
        self._count()
        for block, n in enumerate(self._n_batches):
            if i < n:
                return Place(0, block, i)
            i -= n
        return None

    def _count(self) -> None:
        """Count the batches of the blocks that are whole, or that the end of the harvest has cut short."""
        while True:
            start, stop = self._bounds(len(self._n_batches))
            committed = self._store.n_sequences
            if start >= committed or (stop > committed and not self._store.is_complete):
                return
            self._n_batches.append(int(self._store.mask(start, stop).sum()) // self._batch_size)

    def _bounds(self, block: int) -> tuple[int, int]:
        start = self._store.meta.pinned_sequences + block * self._block_sequences
        return start, start + self._block_sequences


def check_length(store: ActivationStore, train_tokens: int) -> None:
    """Raise ConfigError if a ring will never hold as many tokens to train on."""
    ring = store.meta.ring
    if ring and train_tokens > ring.max_tokens - int(store.mask(0, store.meta.pinned_sequences).sum()):
        raise ConfigError(
            "train_tokens",
            expected=f"less than the {ring.max_tokens:,} tokens that are harvested, a ring's held-out part aside",
            got=f"{train_tokens:,}",
            fix="Lower train_tokens, or harvest with a larger max_tokens.",
        )


def _take(store: ActivationStore, owner: str) -> Reader:
    reader = read_reader(store.storage)
    if reader.owner not in ("", owner):
        raise MismatchError(
            store.path,
            expected="a ring that no other run trains on",
            got=f"one of {reader.owner}",
            fix=f"Resume that run with --set out={reader.owner}, or harvest another ring.",
        )
    reader = reader._replace(owner=owner)
    write_reader(store.storage, reader)
    return reader

"""A harvest on the workers of Ray; the store is that of one process.

Flow:
1. a worker says what the model is, which settles the store's settings; this process needs no weights and no GPU;
2. this process opens the store, and reads, packs and numbers the groups: a group and its place go to a worker;
3. a worker runs its group through the model and writes its objects, which no other group has a part of, each whole at
   once; back comes what the group counts by itself, a few kilobytes;
4. this process, which alone holds the store's lock, commits groups in their order, each with the sums up to it.

A group whose worker was killed is done again by another, and what the first has written is replaced by the same. It is
counted when it is committed, once. If this process is killed, the next run goes on behind the last commit. The first
group is waited for, since it sets the largest norm that counts. Groups are handed out only while the token budget
cannot be reached without them. Left out: ring mode; how workers are kept (`activations/ray_pool.py`).
"""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import uuid4

from activations.ahead import ahead
from activations.config import HarvestConfig
from activations.errors import ConfigError, MismatchError, StorageError
from activations.forward import Buffer, GroupRunner
from activations.harvest import (
    CONFIG_KEY,
    PREFETCHED,
    HarvestResult,
    Rows,
    check_finite,
    count_in,
    finish,
    interrupted,
    outlier_limits,
    read_groups,
    store_meta,
)
from activations.models import LoadedModel, Status, load_model
from activations.plan import plan
from activations.progress import Advance, progress
from activations.ray_pool import DEPTH, Pool, connected, here
from activations.storage import ATTEMPTS, open_storage
from activations.store_schema import AHEAD, StoreMeta, StoreState
from activations.store_writer import Group, StoreWriter, write_group
from activations.text import text_fingerprint
from activations.tokens import bos_ids


class HarvestWorker:
    """What runs groups, in a process of Ray's; several threads call `run`."""

    def __init__(self, config: HarvestConfig, folder: str):
        """Args: folder: where the harvest was started, which paths start from."""
        with suppress(OSError):  # where nothing depends on it, machines need not have it
            os.chdir(folder)
        self._config = config
        self._computing = threading.RLock()
        self._loaded: LoadedModel | None = None

    def prepare(self) -> None:
        """Load the model."""
        self._model()

    def describe(self) -> tuple[StoreMeta, Any]:
        """The settings of the store and the tokenizer. Raises: as `harvest` does before it writes anything."""
        loaded = self._model()
        meta = store_meta(self._config, loaded)
        plan(self._config, loaded, meta)
        return meta, loaded.tokenizer

    def begin(self, meta: StoreMeta, mark: str) -> str:
        """Get ready for groups of this store; returns where this worker is.

        Args:
          mark: an object that is in the store, if what this worker takes for it is the one that is committed to.
        Raises: MismatchError if its model is another; StorageError if it reaches another place.
        """
        loaded, storage = self._model(), open_storage(self._config.out)
        made = str(loaded.dtype).removeprefix("torch.")
        for have, want in ((loaded.ref, meta.model), (made, meta.compute_dtype)):
            if have != want:
                fix = "Give all machines the same model and the same kind of device, or set compute_dtype."
                raise MismatchError(f"worker, {here()}", expected=f"{want}", got=f"{have}", fix=fix)
        if storage.read(mark) is None:
            fix = "Set out to a folder on a shared disk, or to s3://BUCKET/PREFIX."
            got = f"another folder for {here()}"
            raise StorageError(storage.where, expected="one place that all machines share", got=got, fix=fix)
        self._storage, self._meta, self._n_bos = storage, meta, len(bos_ids(loaded.tokenizer))
        self._runner = GroupRunner(meta, loaded)
        self._buffers: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        for _ in range(DEPTH):
            self._buffers.put(Buffer(meta, loaded.device))
        return here()

    def run(self, rows: Rows, start: int, limits: Mapping[str, float]) -> StoreState:
        """Compute one group and write its objects, from sequence `start` on; returns what it counts by itself.

        Args:
          limits: largest norm that counts, by hook point; none for the first group, which sets them.
        """
        buffer = self._buffers.get()
        try:
            with self._computing:
                norms = self._runner.run(rows.tokens, rows.attend, buffer).norms()
                check_finite(self._meta, norms, rows)
                limits = limits or outlier_limits(self._config, rows, norms)
                mask, counts = count_in(rows, norms, limits, partial(self._runner.sums, buffer), self._n_bos)
                group = Group(rows.tokens, mask, rows.documents, buffer.arrays(len(mask)))
            write_group(self._storage, self._meta, group, start)
        finally:
            self._buffers.put(buffer)
        return counts

    def _model(self) -> LoadedModel:
        with self._computing:
            config = self._config
            self._loaded = self._loaded or load_model(config.model, device=config.device, dtype=config.compute_dtype)
            return self._loaded


def harvest_on_ray(config: HarvestConfig, *, on_status: Status | None = None) -> HarvestResult:
    """As `activations.harvest.harvest`, on the cluster that `config.ray` says."""
    assert config.ray is not None
    if config.keep_tokens is not None:
        fix = "Leave out ray, or keep_tokens."
        raise ConfigError(
            "ray with keep_tokens", expected="one of the two", got="a ring, which one process fills", fix=fix
        )
    with (
        connected(config.ray),
        Pool(HarvestWorker, (config, os.getcwd()), config.ray_workers, config.device) as pool,
    ):
        if on_status is not None:
            on_status(f"waiting for {pool.size} workers of Ray to load the model")
        meta, tokenizer = pool.ask("describe")
        _check_text(config, meta)
        with StoreWriter.open(config.out, meta) as writer:
            writer.storage.write(CONFIG_KEY, config.to_yaml().encode())
            mark = f"{ATTEMPTS}/{uuid4().hex}"
            writer.storage.write(mark, b"")
            pool.begin(meta, mark)
            start = time.perf_counter()
            try:
                new_tokens = _run(config, tokenizer, writer, pool)
            except KeyboardInterrupt:
                raise interrupted(config, writer) from None
            return finish(config, writer, new_tokens, time.perf_counter() - start, exhausted=True)


def _run(config: HarvestConfig, tokenizer: Any, writer: StoreWriter, pool: Pool) -> int:
    """Hand groups out and commit them, up to the token budget or the end of the text; returns the attended tokens."""
    left = config.max_tokens - min(writer.state.tokens, config.max_tokens)
    with (
        ahead(read_groups(config, tokenizer, writer.state.position), PREFETCHED) as groups,
        progress("harvest", left, "tok") as advance,
    ):
        return _Handing(config, writer, pool, groups).run(advance)


class _Handing:
    """Groups on their way from the text to the store."""

    def __init__(self, config: HarvestConfig, writer: StoreWriter, pool: Pool, groups: Iterator[Rows]):
        self._budget, self._writer, self._pool, self._groups = config.max_tokens, writer, pool, groups
        self._start = writer.state.committed
        self._under_way: deque[Rows] = deque()
        # Tokens there will be once what is under way is committed, if none of them is masked.
        self._at_most = writer.state.tokens
        self._is_at_end = False

    def run(self, advance: Advance) -> int:
        """Until nothing is left to be handed out or committed; returns the attended tokens."""
        new_tokens = 0
        while True:
            while self._may_hand_out():
                self._hand_out()
            for counts in self._pool.results():
                new_tokens += self._commit(counts)
                advance(counts.tokens)
            if not self._may_hand_out():
                if not self._under_way:
                    return new_tokens
                self._pool.wait()

    def _may_hand_out(self) -> bool:
        is_limited = bool(self._writer.state.hooks) or not self._under_way
        is_near = len(self._under_way) < AHEAD and self._pool.has_room
        return is_limited and is_near and self._at_most < self._budget and not self._is_at_end

    def _hand_out(self) -> None:
        rows = next(self._groups, None)
        if rows is None:
            self._is_at_end = True
            return
        self._pool.submit(rows, self._start, self._writer.state.outlier_limits)
        self._under_way.append(rows)
        self._start += len(rows.tokens)
        self._at_most += int(rows.is_text.sum())

    def _commit(self, counts: StoreState) -> int:
        rows = self._under_way.popleft()
        self._at_most -= int(rows.is_text.sum()) - counts.tokens
        self._writer.commit(len(rows.tokens), self._writer.state.plus(counts))
        return int(rows.attend.sum())


def _check_text(config: HarvestConfig, meta: StoreMeta) -> None:
    """The settings come from a worker, the groups from here."""
    if text_fingerprint(config.text) != meta.text_fingerprint:
        fix = "Put the text where all machines see the same."
        raise MismatchError(f"text '{config.text}'", expected="the text that a worker finds", got="another", fix=fix)

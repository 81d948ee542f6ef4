"""Appending to an activation store so that a crash at any instant loses nothing that was committed.

Writing a group of sequences is: 1. its shards, each an object that nobody reads yet; 2. wait until all of them
would survive a power cut; 3. replace the group's metadata, which hold the committed sequence count and the running
statistics. Step 3 replaces one object atomically and is the commit: a store always opens at its last commit, and a
resumed writer writes over what was not committed.

A writer begins with a commit, too, which changes nothing but who wrote it. On object storage, where a lease may be
taken from a writer that only slept, that is what makes the sleeper's next commit fail. Left out: what the activations
are, and when a ring releases them.

Several processes can write for one writer: each the objects of whole groups with `write_group`, in any order and more
than once, while the one writer alone commits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from zarr.core.buffer import default_buffer_prototype

from activations.errors import MismatchError
from activations.shards import encode
from activations.storage import LOCK_KEY, NEW, Storage, open_storage
from activations.store import array_metadata, open_arrays
from activations.store_schema import (
    AHEAD,
    GROUP_KEY,
    ArrayLayout,
    ModelRef,
    StoreMeta,
    StoreState,
    array_key,
    group_json,
    layout,
    object_keys,
    parse_group_json,
)


class Group(NamedTuple):
    """Sequences that are written and committed together."""

    tokens: Int[np.ndarray, "seq ctx"]
    """token ids"""
    mask: Bool[np.ndarray, "seq ctx"]
    """True where a token may be used"""
    documents: Int[np.ndarray, " seq"]
    """document that each sequence begins in"""
    activations: Mapping[str, np.ndarray]
    """by name of the array: hook points in their stored representation, and the scales of int8 ones"""


class StoreWriter:
    """Append access to one store; use `StoreWriter.open` as a context manager."""

    def __init__(self, storage: Storage, meta: StoreMeta, state: StoreState, version: str, owner: str):
        self.storage, self.meta, self.state = storage, meta, state
        self._version, self._owner = version, owner
        self._layout = layout(meta)
        self._failure: BaseException | None = None

    @classmethod
    @contextmanager
    def open(cls, where: str | Path, meta: StoreMeta) -> Iterator["StoreWriter"]:
        """Create the store, or continue the one at `where` if it was made from the same `meta`.

        Raises: MismatchError if it was made from something else, or if another writer has it open; StorageError or
          DiskSpaceError if it cannot be written.
        """
        storage = open_storage(where)
        _look(storage, meta)  # before the lock, which would be one more file in a folder of something else
        with storage.lock() as owner:
            found = _look(storage, meta)
            yield cls._resume(storage, owner, *found) if found else cls._create(storage, meta, owner)

    def append(self, group: Group, state: StoreState) -> None:
        """Write `group` behind the committed sequences and commit it with `state`; its first three fields are set here.

        All groups but the last have `commit_sequences` sequences.

        Raises: DiskSpaceError or StorageError, MismatchError if another writer has taken the store over. This writer
          then commits nothing more, and the group is not committed, unless all that got lost is the answer to that.
        """
        with self._once_failed_done():
            self._check_ours()
            self.storage.write_all(_objects(self._layout, group, self.state.committed))
        self.commit(len(group.tokens), state)

    def commit(self, n: int, state: StoreState) -> None:
        """Commit `n` sequences, behind the committed ones, whose objects are written; else as `append`."""
        start = self.state.committed
        if start % self.meta.commit_sequences:
            raise ValueError("nothing can be appended behind a group that is not full")
        with self._once_failed_done():
            ours = {"committed": start + n, "released": self.state.released, "complete": False}
            self._commit(state.model_copy(update=ours))

    def release(self, released: int) -> None:
        """Delete what a ring gives up: everything before sequence `released` but the pinned ones and the mask."""
        start, rows = max(self.state.released, self.meta.pinned_sequences), self.meta.commit_sequences
        stop = min(released, self.state.committed) // rows * rows
        if stop <= start:
            return
        with self._once_failed_done():
            # Committed first: a reader that opens the store in between is told so, and finds no holes.
            self._commit(self.state.model_copy(update={"released": stop}))
            self.storage.delete(key for name in self._released_arrays() for key in self._keys(name, start, stop))

    def finish(self, complete: bool) -> None:
        """Record whether the harvest ended, and tidy up: other readers of zarr find the arrays as long as they are."""
        with self._once_failed_done():
            self._commit(self.state.model_copy(update={"complete": complete}))
            stop, rows = self.state.committed, self.meta.commit_sequences
            full = -(-stop // rows) * rows
            # What a crash left behind the last commit, if the run after it had a smaller budget.
            behind = full + AHEAD * rows
            self.storage.delete(key for name in self._layout for key in self._keys(name, full, behind))
            self.storage.sweep()
            for name, array in self._layout.items():
                self.storage.write(array_key(name), _array_json(array, stop))

    def _commit(self, state: StoreState) -> None:
        data = group_json(self.meta, state, self._owner)
        self._version = self.storage.write(GROUP_KEY, data, replaces=self._version)
        self.state = state

    def _check_ours(self) -> None:
        """Writers that have lost the store find out before they write over what its new owner has committed."""
        if self.storage.version(GROUP_KEY) != self._version:
            raise _taken_over(self.storage.where)

    @contextmanager
    def _once_failed_done(self) -> Iterator[None]:
        """Refuse to go on after a failure: the next group would take the place of the one that is missing."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except BaseException as error:
            self._failure = error
            raise

    def _keys(self, name: str, start: int, stop: int) -> list[str]:
        return object_keys(name, self._layout[name], start, stop)

    def _released_arrays(self) -> list[str]:
        return [name for name, array in self._layout.items() if array.is_released]

    @classmethod
    def _create(cls, storage: Storage, meta: StoreMeta, owner: str) -> "StoreWriter":
        for name, array in layout(meta).items():
            storage.write(array_key(name), _array_json(array, 0))
        # Last, as the first commit: until then there is no store to open, and a new attempt starts over.
        writer = cls(storage, meta, StoreState(), NEW, owner)
        writer._commit(writer.state)
        return writer

    @classmethod
    def _resume(cls, storage: Storage, owner: str, found: bytes, version: str) -> "StoreWriter":
        meta, state = parse_group_json(storage.where, found)
        open_arrays(storage, meta, state.committed)
        writer = cls(storage, meta, state, version, owner)
        writer._commit(state)
        writer._drop_released()
        return writer

    def _drop_released(self) -> None:
        """Delete what a release that was cut short has left."""
        stop = self.state.released
        there = self.storage.sizes() if stop else {}
        keys = (key for name in self._released_arrays() for key in self._keys(name, self.meta.pinned_sequences, stop))
        self.storage.delete(key for key in keys if key in there)


def write_group(storage: Storage, meta: StoreMeta, group: Group, start: int) -> None:
    """Write the objects of a group, from sequence `start` on, for the writer that has the store open.

    Every object is replaced at once, so that several processes may do it for the same group.

    Raises: MismatchError if the group is committed already: then somebody else has done this process's work.
    """
    found = storage.read(GROUP_KEY)
    if found is not None and parse_group_json(storage.where, found[0])[1].committed > start:
        raise _taken_over(storage.where)
    storage.replace_all(_objects(layout(meta), group, start))


def _objects(
    arrays: Mapping[str, ArrayLayout], group: Group, start: int
) -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    parts = {"tokens": group.tokens, "mask": group.mask, "documents": group.documents, **group.activations}
    for name, array in arrays.items():
        for i, key in enumerate(object_keys(name, array, start, start + len(group.tokens))):
            rows = parts[name][i * array.object_rows : (i + 1) * array.object_rows]
            yield key, partial(encode, rows, array)


def _taken_over(where: str) -> MismatchError:
    return MismatchError(
        where,
        expected="the store as this writer left it",
        got="one that another writer has taken over",
        fix="Let one of the two run.",
    )


def _array_json(array: ArrayLayout, n: int) -> bytes:
    return array_metadata(array, n).to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes()


def _look(storage: Storage, meta: StoreMeta) -> tuple[bytes, str] | None:
    """The group's metadata if there is a store made from `meta`, none if there is nothing; else MismatchError."""
    found = storage.read(GROUP_KEY)
    if found is None:
        _check_empty(storage, meta)
    else:
        _check_same(storage.where, parse_group_json(storage.where, found[0])[0], meta)
    return found


def _check_empty(storage: Storage, meta: StoreMeta) -> None:
    """Refuse to make a store among files of something else; what a cut-short attempt left may stay."""
    ours = {LOCK_KEY, *map(array_key, layout(meta))}
    strange = sorted(key for key in storage.sizes() if key not in ours)
    if strange:
        raise MismatchError(
            storage.where,
            expected="nothing, or an activation store",
            got=f"other files, such as {strange[0]}",
            fix="Use another --set out=..., or empty it.",
        )


def _check_same(where: str, old: StoreMeta, meta: StoreMeta) -> None:
    for field in StoreMeta.model_fields:
        have, want = getattr(old, field), getattr(meta, field)
        if have != want and field != "text":  # a path may be spelt in several ways
            raise MismatchError(
                f"{where}: {field} of the store",
                expected=_brief(want),
                got=_brief(have),
                fix="Use another --set out=..., or the settings that the store was made with.",
            )


def _brief(value: object) -> str:
    text = value.id if isinstance(value, ModelRef) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."

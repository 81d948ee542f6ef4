"""The activation store: residual-stream tensors of one model over one text, on disk or in a bucket.

A store is a zarr v3 group. Its first axis counts sequences, and every array is aligned to the same sequences:

    tokens     [n_seq, ctx]            int32
    mask       [n_seq, ctx]            bool, True where a token may be used (no padding, special token or norm outlier)
    documents  [n_seq]                 int32, the document a sequence begins in
    <site>.<layer>        [n_seq, ctx, d_model]   one array a hook point; bfloat16 is kept as its uint16 bits
    scale.<site>.<layer>  [n_seq, ctx]            float32, only where hook points are int8: value = int8 * scale

This module reads what is committed; `activations/store_writer.py` writes, `activations/store_schema.py` says what the
parts are, and `activations/storage.py` where they lie. Left out: knowing what a model or a text is.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zarr
from jaxtyping import Bool, Float, Int
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer.cpu import NDBuffer
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import MemoryStore, StorePath

from activations import shards
from activations.errors import CorruptArtefactError, HookPointError, MissingArtefactError, SaekitError
from activations.storage import Storage, open_storage
from activations.store_schema import (
    GROUP_KEY,
    ArrayLayout,
    HookState,
    HookStats,
    Stored,
    StoreMeta,
    StoreState,
    array_key,
    damaged,
    largest_divisor,
    layout,
    not_a_store,
    object_keys,
    parse_group_json,
    scale_name,
    to_float32,
)

PIECE_BYTES = 1 << 25


class Damage(NamedTuple):
    """Sequences of one array that cannot be read."""

    array: str
    start: int
    stop: int
    reason: str


class ActivationStore:
    """Read access to the committed part of a store.

    Whatever reads raises CorruptArtefactError, naming the array and the sequences, if a shard is damaged or missing;
    MissingArtefactError if a ring has released the sequences; StorageError if object storage does not answer.
    """

    def __init__(self, storage: Storage, arrays: dict[str, zarr.Array], meta: StoreMeta, state: StoreState):
        self.storage, self.meta, self.state = storage, meta, state
        self._layout, self._arrays = layout(meta), arrays

    @classmethod
    def open(cls, where: str | Path) -> "ActivationStore":
        """Open the store at a path or s3:// address at its last commit.

        Raises: MissingArtefactError if nothing is there, CorruptArtefactError if it is not a whole store, StorageError
          if object storage does not answer.
        """
        storage = open_storage(where)
        found = storage.read(GROUP_KEY)
        if found is None:
            raise MissingArtefactError(
                where, expected="an activation store", got="nothing", fix="Make one with: saekit harvest"
            )
        meta, state = parse_group_json(storage.where, found[0])
        return cls(storage, open_arrays(storage, meta, state.committed), meta, state)

    @property
    def path(self) -> str:
        """Where the store is, as a path or an s3:// address."""
        return self.storage.where

    @property
    def n_sequences(self) -> int:
        """Committed sequences."""
        return self.state.committed

    @property
    def n_arrays(self) -> int:
        """Arrays that `verify` reads."""
        return len(self._layout)

    @property
    def ctx(self) -> int:
        """Tokens a sequence."""
        return self.meta.ctx

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.meta.model.d_model

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Names of the harvested hook points."""
        return self.meta.hook_points

    @property
    def is_complete(self) -> bool:
        """Whether the harvest that made the store has ended."""
        return self.state.complete

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what the store was made from and the sums of what it holds.

        For a ring, which changes while it is trained on, over what it was made from alone.
        """
        state = None if self.meta.ring else self.state.model_dump(mode="json")
        content = {"meta": self.meta.model_dump(mode="json"), "state": state}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def kept(self) -> list[range]:
        """Sequences whose activations are there: all of them, unless a ring has released some."""
        pinned = min(self.meta.pinned_sequences, self.n_sequences)
        parts = range(pinned), range(max(pinned, self.state.released), self.n_sequences)
        if parts[1].start == pinned:
            parts = (range(self.n_sequences),)
        return [part for part in parts if part]

    def tokens(self, start: int = 0, stop: int | None = None) -> Int[np.ndarray, "seq ctx"]:
        """Token ids of sequences start..stop."""
        return self._read("tokens", start, stop)

    def mask(self, start: int = 0, stop: int | None = None) -> Bool[np.ndarray, "seq ctx"]:
        """True where a token may be used."""
        return self._read("mask", start, stop)

    def documents(self, start: int = 0, stop: int | None = None) -> Int[np.ndarray, " seq"]:
        """Document that each sequence begins in; never decreasing."""
        return self._read("documents", start, stop)

    def activations(
        self, hook_point: str, start: int = 0, stop: int | None = None
    ) -> Float[np.ndarray, "seq ctx d_model"]:
        """Activations at one hook point, widened to float32; padding is zero.

        Raises: HookPointError if it was not harvested.
        """
        stored = self._read(self._known(hook_point), start, stop)
        scale = self._read(scale_name(hook_point), start, stop) if self.meta.store_dtype == "int8" else None
        return to_float32(stored, scale)

    @property
    def piece_sequences(self) -> int:
        """Sequences that are best read at a time: whole shards of files, and of objects elsewhere a whole commit.

        A commit is a whole number of pieces.
        """
        array, rows = self._layout[self.hook_points[0]], self.meta.commit_sequences
        if self.storage.file(GROUP_KEY) is None:
            return rows
        most = PIECE_BYTES // (array.object_rows * array.row_bytes)
        return array.object_rows * largest_divisor(rows // array.object_rows, most)

    @property
    def chunk_sequences(self) -> int:
        """Sequences that have a checksum of their own, and so are read as one."""
        return self._layout[self.hook_points[0]].chunk_rows

    def room(self, n: int) -> Stored:
        """Memory for `n` sequences of one hook point, to be read into; zeros until then."""
        values = np.zeros((n, self.ctx, self.d_model), self._layout[self.hook_points[0]].dtype)
        scale = np.zeros((n, self.ctx), np.float32) if self.meta.store_dtype == "int8" else None
        return Stored(values, scale)

    def read_into(self, room: Stored, hook_point: str, start: int) -> None:
        """Read as many sequences from `start` on as there is room for, as they are kept.

        Raises: HookPointError if the hook point was not harvested.
        """
        names = self._known(hook_point), scale_name(hook_point)
        for name, out in zip(names, room, strict=True):
            if out is not None and not self._read_files(name, start, out):
                self._read(name, start, start + len(out), out)

    def stats(self, hook_point: str) -> HookStats:
        """Mean and norm statistics of one hook point over the unmasked tokens."""
        return self.state.hooks.get(self._known(hook_point), HookState()).stats()

    def verify(self) -> Iterator[tuple[int, Damage | None]]:
        """Read every chunk of every array against its checksum.

        Yields: for each shard the sequences it holds, and its damage, if there is any.
        """
        for name, start, stop in self._shards():
            yield stop - start, self._damage(name, start, stop)

    def missing(self) -> list[str]:
        """Keys of the shards that should be there and are not; nothing is read."""
        there = self.storage.sizes()
        keys = (object_keys(name, self._layout[name], start, stop) for name, start, stop in self._shards())
        return [key for (key,) in keys if key not in there]

    def _shards(self) -> Iterator[tuple[str, int, int]]:
        """Array and sequences of each shard that no ring has released."""
        for name, array in self._layout.items():
            for start in range(0, self.n_sequences, array.object_rows):
                stop = min(start + array.object_rows, self.n_sequences)
                if not (array.is_released and self._is_released(start, stop, self.state)):
                    yield name, start, stop

    def _damage(self, name: str, start: int, stop: int) -> Damage | None:
        try:
            self._read(name, start, stop)
        except CorruptArtefactError as error:
            return Damage(name, start, stop, error.got)
        return None

    def _is_released(self, start: int, stop: int, state: StoreState) -> bool:
        return max(start, self.meta.pinned_sequences) < min(stop, state.released)

    def _check_kept(self, start: int, stop: int, state: StoreState) -> None:
        if self._is_released(start, stop, state):
            raise MissingArtefactError(
                f"{self.path}: sequences {start} to {stop - 1}",
                expected="activations",
                got=f"a ring that has released those from {self.meta.pinned_sequences} to {state.released - 1}",
                fix="Read the sequences that are left, or harvest without keep_tokens.",
            )

    def _known(self, hook_point: str) -> str:
        if hook_point not in self.hook_points:
            raise HookPointError(
                f"{self.path}: hook point '{hook_point}'",
                expected=f"one of {', '.join(self.hook_points)}",
                got=f"'{hook_point}'",
                fix="Choose one that was harvested, or harvest again with it.",
            )
        return hook_point

    def _read(self, name: str, start: int, stop: int | None, out: np.ndarray | None = None) -> np.ndarray:
        stop = self.n_sequences if stop is None else min(stop, self.n_sequences)
        if self._layout[name].is_released:
            self._check_kept(start, stop, self.state)
        try:
            with self.storage.explained():
                into = None if out is None else NDBuffer.from_numpy_array(out)
                values = np.asarray(self._arrays[name].get_basic_selection(slice(start, stop), out=into))
        except SaekitError:
            raise
        except Exception as error:  # codecs raise RuntimeError and ValueError for bad checksums and short shards
            raise damaged(self.path, name, start, stop, (str(error) or type(error).__name__).splitlines()[0]) from error
        self._check_whole(name, start, values)
        return values

    def _read_files(self, name: str, start: int, out: np.ndarray) -> bool:
        """Read whole chunks of files without zarr, which is slower; False if it is to do it."""
        array = self._layout[name]
        stop, rows = start + len(out), array.object_rows
        if stop > self.n_sequences or (array.is_released and self._is_released(start, stop, self.state)):
            return False
        for first in range(start // rows * rows, stop, rows):
            part = slice(max(start, first), min(stop, first + rows))
            (key,) = object_keys(name, array, part.start, part.stop)
            file, into = self.storage.file(key), out[part.start - start : part.stop - start]
            if file is None or not shards.read_into(into, file, array, part.start - first):
                return False
        return True

    def _check_whole(self, name: str, start: int, values: np.ndarray) -> None:
        """Raise if a shard is missing, which zarr reads as zeros: where there are only zeros, look for it."""
        array = self._layout[name]
        rows = array.object_rows
        stop = start + len(values)
        for at in range(start // rows * rows, stop, rows):
            first, last = max(start, at), min(stop, at + rows)
            if values[first - start].any() or values[first - start : last - start].any():
                continue
            (key,) = object_keys(name, array, first, last)
            if self.storage.version(key) is None:
                found = self.storage.read(GROUP_KEY)  # by which a ring may have released it since
                if found is not None and array.is_released:
                    self._check_kept(first, last, parse_group_json(self.path, found[0])[1])
                raise damaged(self.path, name, first, last, "a missing shard")


def open_arrays(storage: Storage, meta: StoreMeta, n: int) -> dict[str, zarr.Array]:
    """The arrays of a store to read, cut to their first `n` sequences.

    Their own metadata need not say `n`: a commit leaves them alone.

    Raises: CorruptArtefactError if one is missing or is not what the settings say.
    """
    place, arrays = storage.zarr(), {}
    for name, array in layout(meta).items():
        found, expected = storage.read(array_key(name)), array_metadata(array, n)
        if found is None:
            raise not_a_store(storage.where, f"no array '{name}'")
        try:
            is_right = ArrayV3Metadata.from_dict(json.loads(found[0])).update_shape(expected.shape) == expected
        except Exception as error:  # zarr raises all kinds for metadata that make no sense
            raise not_a_store(storage.where, f"unreadable metadata of array '{name}'") from error
        if not is_right:
            raise not_a_store(storage.where, f"array '{name}' in another layout")
        with zarr.config.set({"codec_pipeline.path": storage.codecs}):
            arrays[name] = zarr.Array(zarr.AsyncArray(expected, StorePath(place, name)))
    return arrays


def array_metadata(array: ArrayLayout, n: int) -> ArrayV3Metadata:
    """What zarr notes of an array of `n` sequences."""
    made = zarr.create_array(
        MemoryStore(),
        shape=(n, *array.tail),
        chunks=(array.chunk_rows, *array.tail),
        shards=(array.object_rows, *array.tail) if array.is_sharded else None,
        dtype=array.dtype,
        compressors=(Crc32cCodec(),) if array.is_sharded else (ZstdCodec(level=shards.ZSTD_LEVEL), Crc32cCodec()),
        # In one folder an array: a commit has then one folder to sync.
        chunk_key_encoding={"name": "default", "separator": "."},
        fill_value=0,
    )
    assert isinstance(made.metadata, ArrayV3Metadata)
    return made.metadata

"""The bytes of an object of the store: chunks, each with its checksum, and in a shard an index of them.

    chunk   its values, compressed or not, and their crc32c
    shard   its chunks, the place and length of each (16 bytes a chunk), and the crc32c of those

This is Zarr v3's sharding codec, version 1.0, which zarr reads and writes too. Encoding is done here because those
codecs leave chunks of zeros out, so that a lost object could not be told from zeros; and reading, because they copy
what they read three times, which is what a fast disk waits for. A shard that is laid out in any other way, or is
damaged, is left to zarr, which says what is wrong. Left out: where objects lie.
"""

import os
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
from numcodecs import Zstd

from activations.store_schema import ArrayLayout

ZSTD_LEVEL = 1
_CHECKSUM = 4
_ENTRY = 16
_NOT_THERE = 2**64 - 1
_AT_ONCE = 256
"""chunks that one call reads; systems allow some hundred"""


def encode(values: np.ndarray, array: ArrayLayout) -> list[Any]:
    """Sequences as they are kept in one object, a shard or a single chunk; the last chunk is filled up with zeros.

    Given as buffers, to be written one behind the other.
    """
    size = array.chunk_rows * array.row_bytes
    data = np.ascontiguousarray(values, dtype=array.dtype).reshape(-1).view(np.uint8)
    parts: list[Any] = []
    for start in range(0, len(data), size):
        chunk: Any = data[start : start + size]
        if len(chunk) < size:
            chunk = np.pad(chunk, (0, size - len(chunk)))
        if not array.is_sharded:
            chunk = Zstd(level=ZSTD_LEVEL).encode(chunk)
        parts += [chunk, _crc32c(chunk)]
    if array.is_sharded:
        index = np.full((array.object_rows // array.chunk_rows, 2), _NOT_THERE, dtype="<u8")
        n = len(parts) // 2
        index[:n] = _entries(n, size)
        parts += [index, _crc32c(index.reshape(-1).view(np.uint8))]
    return parts


def read_into(out: np.ndarray, file: Path, array: ArrayLayout, start: int) -> bool:
    """Read whole chunks of a shard to their place, with one copy, and check them.

    Args:
      out: [n, ...], contiguous memory for `n` sequences of the array's dtype.
      file: the shard.
      start: the first sequence, counted from the shard's first.
    Returns: whether `out` holds them; if not, it holds anything.
    """
    size, rows = array.chunk_rows * array.row_bytes, array.chunk_rows
    if (
        not array.is_sharded
        or start % rows
        or len(out) % rows
        or out.dtype != array.dtype
        or not out.flags.c_contiguous
    ):
        return False
    first, n = start // rows, len(out) // rows
    try:
        with file.open("rb", buffering=0) as handle:
            if not _has_entries(handle.fileno(), array, first, n):
                return False
            chunks = out.reshape(-1).view(np.uint8).reshape(n, size)
            groups = range(0, n, _AT_ONCE)
            return all(_read_chunks(handle.fileno(), chunks[i : i + _AT_ONCE], first + i) for i in groups)
    except OSError:
        return False


def _has_entries(file: int, array: ArrayLayout, first: int, n: int) -> bool:
    """Whether the shard's index has these chunks, one behind the other as `encode` lays them out."""
    n_index = array.object_rows // array.chunk_rows
    length = n_index * _ENTRY + _CHECKSUM
    index = os.pread(file, length, max(os.fstat(file).st_size - length, 0))
    if len(index) != length or index[-_CHECKSUM:] != _crc32c(index[:-_CHECKSUM]):
        return False
    found = np.frombuffer(index[:-_CHECKSUM], "<u8").reshape(n_index, 2)[first : first + n]
    return np.array_equal(found, _entries(n_index, array.chunk_rows * array.row_bytes)[first : first + n])


def _read_chunks(file: int, chunks: np.ndarray, first: int) -> bool:
    """Read chunks [chunk, byte] of which the first has the number `first`; whether all of their checksums are right."""
    checksums = [bytearray(_CHECKSUM) for _ in chunks]
    buffers = [buffer for pair in zip((chunk.data for chunk in chunks), checksums, strict=True) for buffer in pair]
    length = chunks.shape[1] + _CHECKSUM
    is_all = os.preadv(file, buffers, first * length) == length * len(chunks)
    return is_all and all(right == _crc32c(chunk) for right, chunk in zip(checksums, chunks, strict=True))


def _entries(n: int, size: int) -> np.ndarray:
    """Places and lengths of n chunks of `size` bytes, with their checksums, one behind the other."""
    length = size + _CHECKSUM
    return np.stack([np.arange(n) * length, np.full(n, length)], axis=1).astype("<u8")


def _crc32c(data: Any) -> bytes:
    return crc32c.crc32c(data).to_bytes(_CHECKSUM, "little")

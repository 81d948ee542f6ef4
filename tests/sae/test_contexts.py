"""Contexts as blobs: what is packed is unpacked, and nothing that a file may hold does more than raise one error."""

import math
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import CorruptArtefactError
from sae.contexts import Context, pack_contexts, unpack_contexts

MEGABYTE = 2**20


@st.composite
def context(draw: Any) -> Context:
    values = draw(st.lists(st.floats(0, 1e5, width=32), min_size=1, max_size=40))
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(values), max_size=len(values)))
    document, peak = draw(st.integers(0, 2**31 - 1)), draw(st.integers(0, len(values) - 1))
    source = draw(st.integers(0, 255))
    score, effect = draw(st.floats(-1e5, 1e5, width=32)), draw(st.one_of(st.just(math.nan), st.floats(-9, 9, width=32)))
    return Context(document, peak, np.array(tokens, np.int32), np.array(values, np.float32), source, score, effect)


def sample(n: int = 2, window: int = 3) -> list[Context]:
    values = np.arange(window, dtype=np.float32)
    return [Context(i, window - 1, np.arange(window, dtype=np.int32), values + i) for i in range(n)]


def blob(count: int, head: list[list[int]], n_tokens: int, n_values: int, rest: bytes = b"") -> bytes:
    """A blob with any header, however wrong."""
    whole = [[0, *row] for row in head]
    numbers = np.array([count, *np.ravel(whole)], "<i4").tobytes() + bytes(8 * len(head))
    return zlib.compress(numbers + bytes(4 * n_tokens) + bytes(2 * n_values) + rest)


@given(st.lists(context(), max_size=6))
def test_unpacking_gives_back_what_was_packed_with_activations_rounded_to_float16(contexts: list[Context]) -> None:
    again = unpack_contexts(pack_contexts(contexts))
    assert len(again) == len(contexts)
    for one, other in zip(contexts, again, strict=True):
        assert (one.source, one.document, one.peak) == (other.source, other.document, other.peak)
        np.testing.assert_array_equal([one.score, one.effect], [other.score, other.effect])
        np.testing.assert_array_equal(one.tokens, other.tokens)
        rounded = np.minimum(one.activations, 65504).astype(np.float16)
        np.testing.assert_array_equal(rounded.astype(np.float32), other.activations)


def test_no_contexts_and_long_ones() -> None:
    assert unpack_contexts(pack_contexts([])) == []
    (long,) = unpack_contexts(pack_contexts(sample(1, window=50_000)))
    assert (len(long.tokens), len(long.activations)) == (50_000, 50_000)


def test_the_bytes_are_the_documented_layout() -> None:
    expected = np.array([1, 3, 7, 1, 2], "<i4").tobytes() + np.array([2, -1], "<f4").tobytes()
    expected += np.array([5, 6], "<i4").tobytes() + np.array([0.5, 2], "<f2").tobytes()
    packed = pack_contexts([Context(7, 1, np.array([5, 6], np.int32), np.array([0.5, 2], np.float32), 3, 2.0, -1.0)])
    assert zlib.decompress(packed) == expected


@given(st.data())
def test_a_truncated_or_flipped_blob_is_corrupt(data: st.DataObject) -> None:
    whole = pack_contexts(sample())
    with pytest.raises(CorruptArtefactError):
        unpack_contexts(whole[: data.draw(st.integers(0, len(whole) - 1))])
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << bit
    try:  # a flip may hit a bit of the header that means nothing
        again = unpack_contexts(bytes(flipped))
    except CorruptArtefactError:
        return
    np.testing.assert_array_equal(again[1].activations, sample()[1].activations)


@given(st.binary(max_size=64), st.booleans())
def test_random_bytes_raise_nothing_else(content: bytes, compressed: bool) -> None:
    try:
        contexts = unpack_contexts(zlib.compress(content) if compressed else content)
    except CorruptArtefactError:
        return
    assert all(0 <= c.peak < len(c.tokens) == len(c.activations) for c in contexts)


@pytest.mark.parametrize(
    "damaged",
    [
        blob(-1, [], 0, 0),
        blob(-1, [[0, 0, 1]], 1, 1),
        blob(-2, [[0, 0, 1]], 1, 1),
        blob(2**31 - 1, [[0, 0, 1]], 1, 1),
        blob(1, [[0, 0, 2**31 - 1]], 1, 1),
        blob(1, [[0, 0, -1]], 1, 1),
        blob(2, [[0, 0, -1], [0, 0, 2]], 1, 1),
        blob(2, [[0, 0, 3], [0, 0, -1]], 2, 2),
        blob(1, [[0, 5, 2]], 2, 2),
        blob(1, [[0, -1, 2]], 2, 2),
        blob(1, [[0, 0, 0]], 0, 0),
        blob(1, [[0, 0, 2]], 2, 1),
        blob(1, [[0, 0, 1]], 1, 1, b"more"),
        b"",
        zlib.compress(b""),
        zlib.compress(b"\0\0"),
        pack_contexts(sample()) + b"more",
    ],
    ids=[
        "count -1",
        "count -1 with a body",
        "count -2",
        "huge count",
        "huge window",
        "negative window",
        "windows that cancel out",
        "last window negative",
        "peak behind the window",
        "peak before the window",
        "empty window",
        "values cut",
        "bytes left",
        "nothing",
        "no count",
        "half a count",
        "bytes behind the stream",
    ],
)
def test_a_header_that_cannot_be_is_corrupt(damaged: bytes) -> None:
    with pytest.raises(CorruptArtefactError, match="Build the index again"):
        unpack_contexts(damaged)


def test_a_small_blob_cannot_ask_for_much_memory() -> None:
    packer = zlib.compressobj(1)
    bomb = b"".join([*(packer.compress(bytes(MEGABYTE)) for _ in range(256)), packer.flush()])
    assert len(bomb) < 2 * MEGABYTE
    tracemalloc.start()
    try:
        with pytest.raises(CorruptArtefactError):
            unpack_contexts(bomb)
        assert tracemalloc.get_traced_memory()[1] < 128 * MEGABYTE
    finally:
        tracemalloc.stop()

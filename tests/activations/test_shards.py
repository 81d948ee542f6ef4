"""Shards: what one side writes the other reads, zarr reads it too, and what is wrong is left to zarr."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import activations.shards
from activations.shards import encode, read_into
from activations.store import ActivationStore
from activations.store_schema import ArrayLayout

ROWS, CHUNK, CTX, WIDTH = 12, 3, 5, 4
LAYOUT = ArrayLayout((CTX, WIDTH), np.dtype("<u2"), CHUNK, ROWS, True, True)


def values(n: int = ROWS) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**16, (n, CTX, WIDTH), dtype=np.uint16)


def written(folder: Path, x: np.ndarray, layout: ArrayLayout = LAYOUT) -> Path:
    file = folder / "shard"
    file.write_bytes(b"".join(bytes(part) for part in encode(x, layout)))
    return file


def read(file: Path, start: int, n: int, layout: ArrayLayout = LAYOUT) -> np.ndarray | None:
    out = np.full((n, *layout.tail), 7, layout.dtype)
    return out if read_into(out, file, layout, start) else None


@pytest.mark.parametrize("at_once", [1, 2, 256])
def test_whole_chunks_are_read(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations.shards, "_AT_ONCE", at_once)
    x, file = values(), written(tmp_path, values())
    for start in range(0, ROWS, CHUNK):
        for stop in range(start + CHUNK, ROWS + 1, CHUNK):
            np.testing.assert_array_equal(read(file, start, stop - start), x[start:stop])


def test_a_part_of_a_chunk_is_left_to_zarr(tmp_path: Path) -> None:
    file = written(tmp_path, values())
    assert read(file, 1, CHUNK) is None
    assert read(file, 0, CHUNK + 1) is None
    assert read(file, 0, ROWS, LAYOUT._replace(is_sharded=False)) is None
    out = np.zeros((ROWS, CTX, 2 * WIDTH), np.uint16)[:, :, ::2]
    assert not read_into(out, file, LAYOUT, 0), "memory with gaps"
    assert not read_into(np.zeros((ROWS, CTX, WIDTH), np.int16), file, LAYOUT, 0), "of another type"


def test_what_a_short_shard_does_not_hold_is_left_to_zarr(tmp_path: Path) -> None:
    file = written(tmp_path, values(2 * CHUNK))
    np.testing.assert_array_equal(read(file, 0, 2 * CHUNK), values(2 * CHUNK))
    assert read(file, CHUNK, 2 * CHUNK) is None
    assert read(tmp_path / "none", 0, CHUNK) is None


@given(data=st.data())
def test_damage_is_never_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = written(tmp_path_factory.mktemp("shards"), values())
    good = file.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    for content in (bytes(bad), good[:place], good[place + 1 :]):
        file.write_bytes(content)
        found = read(file, 0, ROWS)
        assert found is None, "a flipped bit, a lost end or a lost start"


def test_it_reads_what_zarr_reads(tmp_path: Path, stores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stores.make(tmp_path / "s")
    store = ActivationStore.open(tmp_path / "s")
    found, used = [], []

    def counted(*arguments: Any) -> bool:
        used.append(read_into(*arguments))
        return used[-1]

    monkeypatch.setattr(activations.shards, "read_into", counted)
    for reading in (counted, lambda *_: False):
        monkeypatch.setattr(activations.shards, "read_into", reading)
        for name in store.hook_points:
            room = store.room(store.n_sequences)
            store.read_into(room, name, 0)
            found.append(room)
    half = len(store.hook_points)
    for mine, zarrs in zip(found[:half], found[half:], strict=True):
        np.testing.assert_array_equal(mine.values, zarrs.values)
        np.testing.assert_array_equal(mine.scale, zarrs.scale)
    assert any(used)

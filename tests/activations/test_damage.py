"""Damaged and lost files of an activation store: what is read is what was written, or is named."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.errors import CorruptArtefactError
from activations.store import ActivationStore
from activations.store_schema import array_key, layout, object_keys, scale_name
from activations.store_writer import Group, StoreWriter


@pytest.fixture(scope="module")
def sound(stores: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three int8 groups, to be copied."""
    where = tmp_path_factory.mktemp("sound") / "s"
    stores.make(where)
    return where


ARRAYS = (
    "tokens",
    "mask",
    "documents",
    *(prefix + hook for hook in ("resid_pre.1", "resid_post.2") for prefix in ("", "scale.")),
)
KINDS = ("flip", "truncate", "delete", "empty")


def hurt(stores: Any, where: Path, name: str, number: int, kind: str, place: float) -> None:
    start, stop = number * stores.rows, (number + 1) * stores.rows
    (key,) = object_keys(name, layout(stores.meta())[name], start, stop)
    file = where / key
    data = bytearray(file.read_bytes())
    byte = int(place * len(data))
    if kind == "delete":
        file.unlink()
    elif kind == "flip":
        data[byte] ^= 1 << (byte % 8)
        file.write_bytes(data)
    else:
        file.write_bytes(data[: byte if kind == "truncate" else 0])


places = st.floats(0, 1, exclude_max=True)


@given(st.data())
@settings(max_examples=40)
def test_exactly_the_damaged_shards_are_reported(
    stores: Any, sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    where = tmp_path_factory.mktemp("hurt") / "s"
    shutil.copytree(sound, where)
    pick = st.tuples(st.sampled_from(ARRAYS), st.integers(0, 2))
    wounds = data.draw(st.dictionaries(pick, st.tuples(st.sampled_from(KINDS), places), min_size=1, max_size=4))
    for (name, number), (kind, place) in wounds.items():
        hurt(stores, where, name, number, kind, place)
    store = ActivationStore.open(where)
    found = [damage for _, damage in store.verify() if damage]
    expected = {(name, number * stores.rows, (number + 1) * stores.rows) for name, number in wounds}
    assert {(damage.array, damage.start, damage.stop) for damage in found} == expected
    intact = ActivationStore.open(sound)
    for name in ARRAYS:
        for number in range(3):
            rows, parts = (number * stores.rows, (number + 1) * stores.rows), (name, scale_name(name))
            if any((part, number) in wounds for part in parts):
                with pytest.raises(CorruptArtefactError, match=f"'.*' in sequences {rows[0]} to {rows[1] - 1}"):
                    stores.read(store, name, *rows)
            elif name in stores.hooks or not name.startswith("scale."):
                np.testing.assert_array_equal(stores.read(store, name, *rows), stores.read(intact, name, *rows))
    shutil.rmtree(where)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_lost_shard_is_never_read_as_zeros(stores: Any, sound: Path, tmp_path: Path, name: str) -> None:
    """Whatever range is asked for."""
    shutil.copytree(sound, tmp_path / "s")
    hurt(stores, tmp_path / "s", name, 1, "delete", 0)
    store, array = ActivationStore.open(tmp_path / "s"), name.removeprefix("scale.")
    assert [key.startswith(f"{name}/c.1") for key in store.missing()] == [True]
    for start in range(3 * stores.rows):
        for stop in range(start + 1, 3 * stores.rows + 1):
            if start < 2 * stores.rows and stop > stores.rows:
                with pytest.raises(CorruptArtefactError, match=f"'{name}' in sequences"):
                    stores.read(store, array, start, stop)
            else:
                assert len(stores.read(store, array, start, stop)) == stop - start


def test_zeros_that_were_written_are_no_damage(stores: Any, tmp_path: Path) -> None:
    meta = stores.meta(store_dtype="float32")
    with StoreWriter.open(tmp_path / "s", meta) as writer:
        part, state = stores.group(meta, 0, writer.state)
        zeros = {name: np.zeros_like(values) for name, values in part.activations.items()}
        blank = Group(np.zeros_like(part.tokens), np.zeros_like(part.mask), np.zeros_like(part.documents), zeros)
        writer.append(blank, state)
    assert stores.committed(tmp_path / "s") == stores.rows


def test_resuming_neither_reads_nor_mends_what_is_committed(stores: Any, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "s")
    for name, kind in zip(ARRAYS, ("flip", "truncate", "delete", "empty", "flip", "flip", "flip"), strict=True):
        hurt(stores, tmp_path / "s", name, 1, kind, 0.5)
    before = stores.contents(tmp_path / "s")
    stores.make(tmp_path / "s")
    assert stores.contents(tmp_path / "s") == before
    stores.make(tmp_path / "s", groups=5)
    after = stores.contents(tmp_path / "s")
    assert [key for key in before if "/c." in key and after[key] != before[key]] == []
    found = [damage for _, damage in ActivationStore.open(tmp_path / "s").verify() if damage]
    assert {(damage.array, damage.start) for damage in found} == {(name, stores.rows) for name in ARRAYS}


@given(st.sampled_from(["zarr.json", *map(array_key, ARRAYS)]), places, st.booleans())
@settings(max_examples=100)
def test_damaged_metadata_is_refused_or_changes_nothing(
    stores: Any, sound: Path, tmp_path_factory: pytest.TempPathFactory, key: str, place: float, cut: bool
) -> None:
    where = tmp_path_factory.mktemp("hurt") / "s"
    shutil.copytree(sound, where)
    data = bytearray((where / key).read_bytes())
    byte = int(place * len(data))
    (where / key).write_bytes(data[:byte] if cut else data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :])
    try:
        store = ActivationStore.open(where)
    except CorruptArtefactError:
        pass
    else:
        assert key != "zarr.json"  # those of arrays may change their length, which is not theirs to say
        for name in ("tokens", "mask", "documents", *stores.hooks):
            np.testing.assert_array_equal(stores.read(store, name), stores.read(ActivationStore.open(sound), name))
    shutil.rmtree(where)


def test_other_readers_of_zarr_find_a_finished_store_as_long_as_it_is(stores: Any, tmp_path: Path) -> None:
    """And read it with zarr's own codecs, which had no part in writing it."""
    import zarr

    meta = stores.meta(store_dtype="float32")
    with StoreWriter.open(tmp_path / "s", meta) as writer:
        writer.append(*stores.group(meta, 0, writer.state))
        writer.append(*stores.group(meta, 1, writer.state, rows=3))
        writer.finish(complete=True)
    ours = ActivationStore.open(tmp_path / "s")
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        theirs: Any = zarr.open_group(tmp_path / "s", mode="r")
        for name in layout(meta):
            assert theirs[name].shape[0] == stores.rows + 3
            np.testing.assert_array_equal(np.asarray(theirs[name][:]), stores.read(ours, name, 0, stores.rows + 3))

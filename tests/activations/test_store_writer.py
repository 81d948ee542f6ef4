"""Writing a store: what is refused leaves everything as it was, and a ring gives up what it says."""

import dataclasses
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.config import HarvestConfig
from activations.errors import ArtefactError, DiskSpaceError, MismatchError, MissingArtefactError, StorageError
from activations.harvest import harvest
from activations.models import LoadedModel
from activations.storage import LOCK_KEY
from activations.store import ActivationStore
from activations.store_schema import Ring
from activations.store_writer import StoreWriter, write_group

HOOKS = ("resid_pre.1", "resid_post.2")


class Crash(BaseException):
    """Stands for the end of the process."""


def test_a_disk_that_refuses_any_write_is_a_disk_space_error(stores: Any, tmp_path: Path) -> None:
    """Creating, appending, releasing and finishing alike."""
    meta = stores.meta()

    @contextmanager
    def full() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with full(), pytest.raises(DiskSpaceError, match="room to write"), StoreWriter.open(tmp_path / "s", meta):
        pass
    with StoreWriter.open(tmp_path / "s", meta) as writer:
        with full(), pytest.raises(DiskSpaceError, match="run the same command again"):
            writer.append(*stores.group(meta, 0, writer.state))
        with pytest.raises(DiskSpaceError):
            writer.finish(complete=True)
    with full(), pytest.raises(DiskSpaceError), StoreWriter.open(tmp_path / "s", meta):
        pass
    stores.make(tmp_path / "s")
    assert stores.committed(tmp_path / "s") == 3 * stores.rows


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ctx": 16}, "ctx"),
        ({"store_dtype": "bfloat16"}, "store_dtype"),
        ({"store_dtype": "int8"}, "store_dtype"),
        ({"cross_documents": True}, "cross_documents"),
        ({"batch_tokens": 128}, "batch_tokens"),
        ({"commit_sequences": 4}, "commit_sequences"),
        ({"hook_points": ("resid_post.2",)}, "hook_points"),
        ({"outlier_norm": 9.0}, "outlier_norm"),
        ({"keep_tokens": 1000}, "ring"),
        ("model", "model"),
        ("tokenizer", "tokenizer_fingerprint"),
        ("text", "text_fingerprint"),
    ],
)
def test_a_harvest_of_something_else_leaves_the_store_as_it_is(
    stores: Any, settings: HarvestConfig, tiny: LoadedModel, tmp_path: Path, change: Any, field: str
) -> None:
    settings = settings.model_copy(update={"max_tokens": 100})
    harvest(settings, tiny)
    before, other = stores.contents(Path(settings.out)), tiny
    if change == "model":
        other = dataclasses.replace(tiny, fingerprint="other")
    elif change == "tokenizer":
        other = dataclasses.replace(tiny, tokenizer_fingerprint="other")
    elif change == "text":
        (tmp_path / "other.txt").write_text("Another text, which is short.")
        change = {"text": str(tmp_path / "other.txt")}
    changed = settings.model_copy(update={"max_tokens": 200, **(change if isinstance(change, dict) else {})})
    with pytest.raises(MismatchError, match=f"{field} of the store"):
        harvest(changed, other)
    assert stores.contents(Path(settings.out)) == before


def test_a_folder_of_something_else_is_left_as_it_is(stores: Any, tmp_path: Path) -> None:
    import zarr

    notes, group, bits = tmp_path / "notes", tmp_path / "zarr", tmp_path / "bits"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    zarr.open_group(group, mode="w").create_array("tokens", shape=(3,), dtype="int32")[:] = 7
    stores.make(bits)
    (bits / "zarr.json").unlink()  # shards that belong to no store any more are not ours to delete
    (tmp_path / "file").write_text("mine")
    for where in (notes, group, bits):
        before = stores.contents(where)
        with pytest.raises(ArtefactError, match=r"expected (nothing, or )?an activation store"):
            stores.make(where)
        assert stores.contents(where) == before
        assert not (where / LOCK_KEY).exists() or where == bits
    with pytest.raises(MismatchError, match="a directory for out, got a file"):
        stores.make(tmp_path / "file")


def test_the_place_of_a_store_may_not_be_writable(stores: Any, tmp_path: Path) -> None:
    (tmp_path / "s" / ".zarr.json.new").mkdir(parents=True)  # root may write anything, but not a file over a folder
    with pytest.raises(StorageError, match="a folder to read and write, got Is a directory"):
        stores.make(tmp_path / "s")


def ring(stores: Any) -> dict[str, Ring]:
    return {"ring": Ring(keep_tokens=8 * stores.rows * stores.ctx, max_tokens=10_000)}


def test_a_ring_gives_up_files_and_says_so(stores: Any, tmp_path: Path) -> None:
    meta = stores.make(tmp_path / "s", groups=6, **ring(stores))
    reader = ActivationStore.open(tmp_path / "s")
    pinned = meta.pinned_sequences
    assert pinned == stores.rows
    with StoreWriter.open(tmp_path / "s", meta) as writer:
        writer.release(3 * stores.rows + 1)
    store = ActivationStore.open(tmp_path / "s")
    assert [damage for _, damage in store.verify() if damage] == []
    assert store.missing() == []
    assert store.kept() == [range(pinned), range(3 * stores.rows, 6 * stores.rows)]
    assert reader.kept() == [range(6 * stores.rows)]
    assert len(store.mask()) == 6 * stores.rows
    for name in ("tokens", HOOKS[0], HOOKS[1]):
        left = sorted(int(file.name.split(".")[1]) for file in (tmp_path / "s" / name).glob("c.*"))
        assert left == [0, 3, 4, 5]
        for start, stop in ((0, pinned), (3 * stores.rows, 6 * stores.rows)):
            np.testing.assert_array_equal(stores.read(store, name, start, stop), stores.read(reader, name, start, stop))
        for who in (store, reader):  # one that opened the store before finds out when it reads
            with pytest.raises(MissingArtefactError, match="a ring that has released those from 4 to 11"):
                stores.read(who, name, stores.rows, 2 * stores.rows)
    with pytest.raises(MissingArtefactError):
        store.activations(HOOKS[0])


def test_a_release_that_was_cut_short_is_completed(
    stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cut", "whole"):
        stores.make(tmp_path / name, groups=6, **ring(stores))
    meta = stores.meta(**ring(stores))
    with StoreWriter.open(tmp_path / "whole", meta) as writer:
        writer.release(3 * stores.rows)
    unlink, calls = Path.unlink, []

    def killed_at_third(self: Path, missing_ok: bool = False) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise Crash
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed_at_third)
    with pytest.raises(Crash), StoreWriter.open(tmp_path / "cut", meta) as writer:
        writer.release(3 * stores.rows)
    monkeypatch.undo()
    store = ActivationStore.open(tmp_path / "cut")
    assert store.state.released == 3 * stores.rows
    with pytest.raises(MissingArtefactError):
        store.tokens(stores.rows, 2 * stores.rows)
    assert stores.contents(tmp_path / "cut") != stores.contents(tmp_path / "whole")
    with StoreWriter.open(tmp_path / "cut", meta):
        pass
    assert stores.contents(tmp_path / "cut") == stores.contents(tmp_path / "whole")


def test_a_smaller_budget_after_a_crash_leaves_no_rows_behind(stores: Any, tmp_path: Path) -> None:
    meta = stores.make(tmp_path / "whole", groups=2)
    with StoreWriter.open(tmp_path / "s", meta) as writer:
        for number in range(2):
            writer.append(*stores.group(meta, number, writer.state))
        write_group(writer.storage, meta, stores.group(meta, 2, writer.state)[0], 2 * stores.rows)
    stores.make(tmp_path / "s", groups=2)
    assert stores.contents(tmp_path / "s") == stores.contents(tmp_path / "whole")


def test_a_store_that_grows_again_is_not_complete_until_it_ends_again(stores: Any, tmp_path: Path) -> None:
    meta = stores.make(tmp_path / "s", groups=1)
    assert ActivationStore.open(tmp_path / "s").is_complete
    with StoreWriter.open(tmp_path / "s", meta) as writer:
        writer.append(*stores.group(meta, 1, writer.state))
    assert not ActivationStore.open(tmp_path / "s").is_complete

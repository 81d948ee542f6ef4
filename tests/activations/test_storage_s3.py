"""A store in a bucket: the same store as on disk, over a network that cuts connections, with writers that come back."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest

from activations import storage as storage_module
from activations.config import HarvestConfig
from activations.errors import MismatchError, MissingArtefactError, StorageError
from activations.harvest import CONFIG_KEY, harvest
from activations.models import LoadedModel, load_model
from activations.storage import LOCK_KEY, BucketStorage, open_storage
from activations.store import ActivationStore
from activations.store_schema import GROUP_KEY, Ring
from activations.store_writer import StoreWriter

FEW = {"hook_points": ("resid_pre.1",), "store_dtype": "float32"}
"""settings of a store of few arrays, which takes few requests"""
KEY, SECRET = "AKIAOFATESTER", "very/secret+indeed"


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PATIENCE_S", 0.5)
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.01)


@pytest.fixture
def where(bucket: Callable[[], str]) -> str:
    return f"{bucket()}/runs/store"


# --------------------------------------------------------------------------------------------------------------------
# The same store as on disk
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32")


def settings(out: str, text: Path, **changes: object) -> HarvestConfig:
    values = {
        "model": "unused",
        "text": str(text),
        "hook_points": ("resid_pre.1", "resid_post.2"),
        "out": out,
        "ctx": 32,
        "batch_tokens": 128,
        "commit_sequences": 8,
        "max_tokens": 10_000,
    }
    return HarvestConfig.model_validate(values | changes)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_harvest_into_a_bucket_is_the_one_on_disk(
    stores: Any, tiny: LoadedModel, where: str, tmp_path: Path, dtype: str
) -> None:
    text = tmp_path / "text.jsonl"
    rows = [{"text": f"Document {i} says {'la ' * (5 * i % 37)}and ends here."} for i in range(20)]
    text.write_text("\n".join(json.dumps(row) for row in rows))
    harvest(settings(str(tmp_path / "s"), text, store_dtype=dtype), tiny)
    first = harvest(settings(where, text, store_dtype=dtype, max_tokens=150), tiny)
    assert ActivationStore.open(where).n_sequences == first.n_sequences
    again = harvest(settings(where, text, store_dtype=dtype), tiny)
    assert again.n_sequences > first.n_sequences
    here, there = ActivationStore.open(tmp_path / "s"), ActivationStore.open(where)
    assert there.path == where
    assert here.fingerprint == there.fingerprint
    assert (there.is_complete, there.n_sequences) == (True, here.n_sequences)
    for name in ("tokens", "mask", "documents", *here.hook_points):
        np.testing.assert_array_equal(stores.read(there, name), stores.read(here, name))
        np.testing.assert_array_equal(stores.read(there, name, 5, 11), stores.read(here, name, 5, 11))
    assert [damage for _, damage in there.verify() if damage] == []
    objects, files = stores.contents(where), stores.contents(tmp_path / "s")
    assert objects.keys() == files.keys()
    assert {key for key in files if files[key] != objects[key]} == {GROUP_KEY, CONFIG_KEY}  # who wrote it, and where
    assert LOCK_KEY not in open_storage(where).sizes()


def test_damage_in_a_bucket_is_named(stores: Any, where: str) -> None:
    stores.make(where)
    storage = open_storage(where)
    found = storage.read("tokens/c.1.0")
    assert found is not None
    storage.write("tokens/c.1.0", found[0][:-9])
    storage.delete(["documents/c.0", "resid_post.2/c.2.0.0"])
    damage = [damage for _, damage in ActivationStore.open(where).verify() if damage]
    assert [(d.array, d.start) for d in damage] == [("tokens", 4), ("documents", 0), ("resid_post.2", 8)]


# --------------------------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------------------------

ANYTHING = (
    ("PUT", "", "request"),
    ("PUT", "", "answer"),
    ("GET", "", "response"),
    ("HEAD|GET", "", "answer"),
    ("POST", "", "answer"),
)


@pytest.mark.parametrize(("method", "path", "cut"), ANYTHING)
def test_connections_that_are_cut_now_and_then_change_nothing(
    stores: Any, proxy: Any, where: str, tmp_path: Path, method: str, path: str, cut: str
) -> None:
    """Every second request of a kind is cut once; each is repeated, and what is made and read is the same."""
    stores.make(tmp_path / "s", groups=2, **FEW)
    fault = proxy.cut(method, path, cut, alternate=True)
    for groups in (1, 2):
        stores.make(where, groups=groups, **FEW)
    assert stores.committed(where) == 8
    assert fault.seen
    here, there = ActivationStore.open(tmp_path / "s"), ActivationStore.open(where)
    assert here.fingerprint == there.fingerprint
    for name in ("tokens", "mask", "documents", *here.hook_points):
        np.testing.assert_array_equal(stores.read(there, name), stores.read(here, name))


def test_a_part_of_a_large_shard_is_repeated(stores: Any, proxy: Any, where: str, tmp_path: Path) -> None:
    changes = {"store_dtype": "float32", "hook_points": ("resid_post.2",)}
    meta = stores.meta(**changes)
    changes["model"] = meta.model.model_copy(update={"d_model": 1 << 16})
    fault = proxy.cut("PUT", "partNumber=2", "request", times=2)
    down = proxy.cut("GET", "resid_post.2/c.", "response", times=2)
    for place in (str(tmp_path / "s"), where):
        stores.make(place, groups=1, **changes)
    expected = ActivationStore.open(tmp_path / "s").activations("resid_post.2")
    np.testing.assert_array_equal(ActivationStore.open(where).activations("resid_post.2"), expected)
    assert len(fault.seen) == len(down.seen) == 2


CUTS = ("PUT", "resid_pre.1/c.1", "request"), ("PUT", "store/zarr.json", "request"), ("PUT", "tokens/c.1", "answer")


@pytest.mark.parametrize(("method", "path", "cut"), CUTS)
def test_a_connection_that_stays_cut_ends_in_one_line_and_resumes(
    stores: Any, proxy: Any, where: str, tmp_path: Path, method: str, path: str, cut: str
) -> None:
    stores.make(tmp_path / "s", groups=3, **FEW)
    meta = stores.meta(**FEW)
    began = time.monotonic()
    with StoreWriter.open(where, meta) as writer:
        writer.append(*stores.group(meta, 0, writer.state))
        proxy.cut(method, path, cut, times=float("inf"))
        with pytest.raises(StorageError) as caught:
            writer.append(*stores.group(meta, 1, writer.state))
    assert time.monotonic() - began < 20
    one_line(caught.value)
    assert stores.committed(where) == 4
    proxy.faults.clear()
    stores.make(where, groups=3, **FEW)
    assert stores.committed(where) == 12
    assert ActivationStore.open(where).fingerprint == ActivationStore.open(tmp_path / "s").fingerprint


def test_reading_over_a_connection_that_stays_cut_is_no_damage(stores: Any, proxy: Any, where: str) -> None:
    stores.make(where, **FEW)
    store = ActivationStore.open(where)
    for method, path in (("GET", "/c."), ("HEAD", "/c.")):
        proxy.faults.clear()
        proxy.cut(method, path, "answer", times=float("inf"))
        if method == "HEAD":
            open_storage(where).delete(["tokens/c.0.0"])
        for read in (lambda: store.tokens(0, 4), lambda: list(store.verify())):
            with pytest.raises(StorageError) as caught:
                read()
            one_line(caught.value)


def one_line(error: StorageError) -> None:
    assert "\n" not in str(error)
    assert "object storage that answers" in str(error)
    assert KEY not in str(error)
    assert SECRET not in str(error)


def test_a_commit_whose_answer_is_lost_is_done(stores: Any, proxy: Any, where: str) -> None:
    meta = stores.meta(**FEW)
    with StoreWriter.open(where, meta) as writer:
        writer.append(*stores.group(meta, 0, writer.state))
        lost = proxy.cut("PUT", "store/zarr.json", "answer")
        writer.append(*stores.group(meta, 1, writer.state))
        assert len(lost.seen) == 1
        writer.append(*stores.group(meta, 2, writer.state))
    assert stores.committed(where) == 12


def test_a_crash_at_every_single_request(
    stores: Any, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.make(tmp_path / "whole", groups=1, **FEW)
    expected, files = ActivationStore.open(tmp_path / "whole"), stores.contents(tmp_path / "whole")
    committed: list[int] = []
    for step in range(100):
        place, steps = f"{where}/{step}", [0]
        with monkeypatch.context() as patch, suppress(Crash):
            crash_at(step, steps, patch)
            stores.make(place, groups=1, **FEW)
        if steps[0] <= step:
            break
        committed.append(stores.committed(place))
        open_storage(place).delete([LOCK_KEY])  # which otherwise would have to be waited for
        stores.make(place, groups=1, **FEW)
        assert ActivationStore.open(place).fingerprint == expected.fingerprint
        assert {key for key, data in stores.contents(place).items() if files[key] != data} == {GROUP_KEY}
    assert 15 < len(committed) < 99
    assert set(committed) == {-1, 0, 4}
    assert committed == sorted(committed)


class Crash(BaseException):
    """Stands for the end of the process."""


def crash_at(step: int, steps: list[int], patch: pytest.MonkeyPatch) -> None:
    """Make the `step`-th change of the bucket, and each after it, fail; `steps` counts those that were asked for."""

    def crashing(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            steps[0] += 1
            if steps[0] > step:
                raise Crash
            return call(*args, **kwargs)

        return run

    for name in ("put", "delete"):
        patch.setattr(obstore, name, crashing(getattr(obstore, name)))


# --------------------------------------------------------------------------------------------------------------------
# Leases and fences
# --------------------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_told_how_long_to_wait(stores: Any, where: str) -> None:
    meta = stores.make(where, groups=1, **FEW)
    before = stores.contents(where)
    with StoreWriter.open(where, meta) as writer:
        claimed = stores.contents(where)
        with pytest.raises(MismatchError, match=r"if it was killed, try again in (5\d|60) s"):
            stores.make(where, **FEW)
        assert stores.contents(where) == claimed
        writer.append(*stores.group(meta, 1, writer.state))
    assert before.keys() < stores.contents(where).keys()
    stores.make(where, **FEW)


def test_a_lease_is_renewed_while_its_writer_lives(stores: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "LEASE_S", 2.0)
    meta = stores.make(where, groups=1, **FEW)
    with StoreWriter.open(where, meta) as writer:
        for _ in range(8):
            time.sleep(0.4)
            with pytest.raises(MismatchError, match="no other writer"), open_storage(where).lock():
                pass
        writer.append(*stores.group(meta, 1, writer.state))


@contextmanager
def asleep(where: str, stores: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreWriter]:
    """A writer that has committed a group and then does not renew its lease any more."""
    with monkeypatch.context() as patch:
        patch.setattr(BucketStorage, "_renew", lambda *_: None)
        opened = StoreWriter.open(where, stores.meta(**FEW))
        sleeper = opened.__enter__()
    sleeper.append(*stores.group(sleeper.meta, 0, sleeper.state))
    monkeypatch.setattr(storage_module, "LEASE_S", 0.5)
    time.sleep(0.6)
    yield sleeper
    opened.__exit__(None, None, None)


@pytest.mark.parametrize("looks_first", [True, False])
def test_a_writer_that_overslept_can_do_no_harm(
    stores: Any, where: str, monkeypatch: pytest.MonkeyPatch, looks_first: bool
) -> None:
    """Whether it wakes before it writes its shards, or after it has seen that the store is its own."""
    with asleep(where, stores, monkeypatch) as sleeper, StoreWriter.open(where, sleeper.meta) as other:
        for number in (1, 2):
            other.append(*stores.group(other.meta, number, other.state))
        before = stores.contents(where)
        if not looks_first:
            monkeypatch.setattr(StoreWriter, "_check_ours", lambda self: None)
        for action in (
            lambda: sleeper.append(*stores.group(sleeper.meta, 1, sleeper.state)),
            lambda: sleeper.finish(complete=True),
        ):
            with pytest.raises(MismatchError, match="Let one of the two run"):
                action()
        assert stores.contents(where) == before
        other.append(*stores.group(other.meta, 3, other.state))
        other.finish(complete=True)
    assert stores.committed(where) == 16


def test_a_writer_that_overslept_leaves_the_lease_of_the_next(
    stores: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with asleep(where, stores, monkeypatch) as sleeper:
        monkeypatch.setattr(storage_module, "LEASE_S", 0.5)
        opened = StoreWriter.open(where, sleeper.meta)
        opened.__enter__()
    monkeypatch.setattr(storage_module, "LEASE_S", 60.0)
    assert LOCK_KEY in open_storage(where).sizes()
    with pytest.raises(MismatchError):
        stores.make(where, **FEW)
    opened.__exit__(None, None, None)
    assert LOCK_KEY not in open_storage(where).sizes()


def test_taking_a_store_over_is_enough_to_stop_the_other(
    stores: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is committed; both are about to write the same group."""
    with asleep(where, stores, monkeypatch) as sleeper, StoreWriter.open(where, sleeper.meta) as other:
        part, state = stores.group(sleeper.meta, 1, sleeper.state)
        with pytest.raises(MismatchError):
            sleeper.append(part, state)
        other.append(part, state)
        assert stores.committed(where) == 8


def test_two_that_create_at_once_do_not_both_succeed(stores: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if both believe that they have the lease."""
    create = StoreWriter._create.__func__  # type: ignore[attr-defined]

    def overtaken(cls: type, *args: Any) -> Any:
        monkeypatch.setattr(StoreWriter, "_create", classmethod(create))
        open_storage(where).delete([LOCK_KEY])
        stores.make(where, groups=2, **FEW)
        return create(cls, *args)

    monkeypatch.setattr(StoreWriter, "_create", classmethod(overtaken))
    with pytest.raises(MismatchError):
        stores.make(where, groups=3, **FEW)
    assert stores.committed(where) == 8


# --------------------------------------------------------------------------------------------------------------------
# Where nothing answers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["bucket", "endpoint", "credentials", "refused"])
def test_what_a_bucket_refuses_is_one_quick_line(
    stores: Any, proxy: Any, where: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "bucket":
        where = "s3://no-such-bucket/store"
    elif fault == "endpoint":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    elif fault == "credentials":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        # Where obstore looks for them last, which is on another machine.
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:9")
    for action in (
        lambda: ActivationStore.open(where),
        lambda: stores.make(where),
        lambda: open_storage(where).sizes(),
    ):
        began = time.monotonic()
        with pytest.raises(StorageError) as caught:
            action()
        assert time.monotonic() - began < 15
        one_line(caught.value)
        assert "Check the bucket, AWS_ENDPOINT_URL, AWS_REGION and the credentials" in str(caught.value)


def test_the_command_line_says_so_in_one_line(
    bucket: Callable[[], str],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from steer import cli

    (tmp_path / "text.txt").write_text("Some text.")
    config = settings(f"{bucket()}/store", tmp_path / "text.txt", model=str(tiny_llama))
    config.save(tmp_path / "harvest.yaml")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    impatient(monkeypatch)
    monkeypatch.setattr("sys.argv", ["saekit", "harvest", str(tmp_path / "harvest.yaml")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("saekit:")]
    assert stopped.value.code == 1
    assert said.startswith(f"saekit: {config.out}: expected object storage that answers")
    assert KEY not in said
    assert SECRET not in said


# --------------------------------------------------------------------------------------------------------------------
# Rings
# --------------------------------------------------------------------------------------------------------------------


def test_a_ring_in_a_bucket(stores: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = {"ring": Ring(keep_tokens=8 * stores.rows * stores.ctx, max_tokens=10_000)}
    meta = stores.make(where, groups=6, **ring)
    whole = stores.contents(where)
    reader = ActivationStore.open(where)
    delete = BucketStorage.delete
    with StoreWriter.open(where, meta) as writer:
        writer.release(2 * stores.rows)
        monkeypatch.setattr(BucketStorage, "delete", lambda *_: None)  # as if killed behind the commit
        writer.release(3 * stores.rows)
        monkeypatch.setattr(BucketStorage, "delete", delete)
    assert ActivationStore.open(where).state.released == 3 * stores.rows
    assert "tokens/c.1.0" not in stores.contents(where)
    assert "tokens/c.2.0" in stores.contents(where)
    with StoreWriter.open(where, meta):
        pass
    gone = whole.keys() - stores.contents(where).keys()
    names = ("tokens", *stores.hooks, *(f"scale.{hook}" for hook in stores.hooks))
    assert {key.rpartition("/c.")[0] for key in gone} == set(names)
    assert {key.rpartition("/c.")[2].split(".")[0] for key in gone} == {"1", "2"}
    store = ActivationStore.open(where)
    assert [damage for _, damage in store.verify() if damage] == []
    for who in (store, reader):
        for name in ("tokens", *stores.hooks):
            with pytest.raises(MissingArtefactError, match="a ring that has released those from 4 to 11"):
                stores.read(who, name, 4, 8)
            assert len(stores.read(who, name, 12, 24)) == 12

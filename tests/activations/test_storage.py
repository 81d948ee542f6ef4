"""Folders and buckets offer the same: whole objects, conditional replacement, listing, deletion and a lock."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activations.errors import DiskSpaceError, MismatchError, StorageError
from activations.storage import LOCK_KEY, NEW, FolderStorage, Storage, open_storage

PLACES = ("store", "a folder/mit Umlauten äöü/数据 100%", "deep/down/below")


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Addresses below an empty place, of each kind."""
    if request.param == "folder":
        return lambda name: str(tmp_path / name)
    root = request.getfixturevalue("bucket")()
    return lambda name: f"{root}/{name}"


@pytest.fixture(params=PLACES)
def storage(request: pytest.FixtureRequest, place: Callable[[str], str]) -> Storage:
    return open_storage(place(request.param))


def test_what_is_written_is_read(storage: Storage) -> None:
    assert storage.read("a") is None
    assert storage.version("a") is None
    assert storage.sizes() == {}
    first = storage.write("a", b"one")
    assert storage.read("a") == (b"one", first)
    assert storage.version("a") == first
    second = storage.write("a", b"three")
    assert storage.read("a") == (b"three", second)
    storage.write("x/y/z", b"")
    assert storage.sizes() == {"a": 5, "x/y/z": 0}
    assert isinstance(storage, Storage)


def made(objects: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    """Objects as `write_all` takes them, each in two parts."""
    return ((key, lambda data=data: [data[: len(data) // 3], data[len(data) // 3 :]]) for key, data in objects)


def test_many_are_written_listed_and_deleted(storage: Storage) -> None:
    objects = {f"{name}/c.{i}.0": bytes([i]) * i for name in ("tokens", "tokens2") for i in range(20)}
    storage.write_all(made(objects.items()))
    assert storage.sizes() == {key: len(data) for key, data in objects.items()}
    assert storage.sizes("tokens") == {key: len(data) for key, data in objects.items() if key.startswith("tokens/")}
    assert {key: (storage.read(key) or (b"",))[0] for key in objects} == objects
    storage.delete(iter(["tokens/c.3.0", "tokens/c.99.0", "none"]))
    storage.delete([])
    assert storage.sizes().keys() == objects.keys() - {"tokens/c.3.0"}
    storage.delete(key for key in objects if key.startswith("tokens/"))
    assert storage.sizes("tokens") == {}
    assert len(storage.sizes("tokens2")) == 20


def test_a_lock_keeps_others_out_and_is_given_back(storage: Storage) -> None:
    other = open_storage(storage.where)
    with storage.lock() as first:
        with pytest.raises(MismatchError, match="expected no other writer") as caught, other.lock():
            pass
        assert caught.value.where == storage.where
    with other.lock() as second, pytest.raises(MismatchError), storage.lock():
        pass
    assert isinstance(storage, FolderStorage) or "" != first != second
    with pytest.raises(ZeroDivisionError), storage.lock():
        raise ZeroDivisionError
    with storage.lock():
        pass


def test_a_bucket_replaces_only_the_version_that_was_seen(bucket: Callable[[], str]) -> None:
    storage = open_storage(f"{bucket()}/store")
    first = storage.write("a", b"one", replaces=NEW)
    with pytest.raises(MismatchError, match="no other writer"):
        storage.write("a", b"two", replaces=NEW)
    second = storage.write("a", b"two", replaces=first)
    with pytest.raises(MismatchError, match="no other writer"):
        storage.write("a", b"three", replaces=first)
    assert storage.read("a") == (b"two", second)
    # What is there already was written by the lost first attempt of the same request.
    assert storage.write("a", b"two", replaces=first) == second
    assert storage.write("a", b"two", replaces=NEW) == second


names = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=8)


@pytest.fixture(params=["folder", "bucket"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    where = str(tmp_path / "s") if request.param == "folder" else f"{request.getfixturevalue('bucket')()}/s"
    return open_storage(where)


@given(st.dictionaries(st.tuples(names, names), st.binary(max_size=3000), min_size=1, max_size=5))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_come_back(shared: Storage, objects: dict[tuple[str, str], bytes]) -> None:
    named = {f"{folder}/{key}": data for (folder, key), data in objects.items()}
    *many, (key, data) = named.items()
    shared.write_all(made(many))
    shared.write(key, data)
    assert {key: (shared.read(key) or (b"",))[0] for key in named} == named
    assert shared.sizes() == {key: len(data) for key, data in named.items()}
    shared.delete(named)
    assert shared.sizes() == {}


def test_objects_that_need_several_parts(bucket: Callable[[], str]) -> None:
    storage, data = open_storage(f"{bucket()}/store"), os.urandom(12_000_000)
    storage.write_all(made([("big", data)]))
    found = storage.read("big")
    assert found is not None
    assert found[0] == data


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    storage = open_storage("~/runs/store")
    storage.write("a", b"one")
    assert (tmp_path / "runs" / "store" / "a").read_bytes() == b"one"
    assert storage.where == "~/runs/store"
    with storage.lock():
        assert (tmp_path / "runs" / "store" / LOCK_KEY).exists()


def test_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    free = open_storage(tmp_path / "not" / "there").free_bytes()
    assert free is not None
    assert free > 0
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("gs://bucket/x", "s3://BUCKET/PREFIX, got gs"),
        ("s3://", "s3://BUCKET/PREFIX, got no bucket"),
        ("s3:///x", "got no bucket"),
    ],
)
def test_addresses_that_are_none(where: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        open_storage(where)


def test_a_file_that_is_being_replaced_is_no_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path)
    storage.write("x/a", b"one")
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(ZeroDivisionError):
        storage.write("x/a", b"two")
    assert storage.sizes() == {"x/a": 3}
    assert storage.read("x/a") == (b"one", NEW)
    monkeypatch.undo()
    storage.write("x/a", b"three")
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["a"]


def stop(*_: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (28, DiskSpaceError, "room to write, got No space left on device. Make room"),
        (122, DiskSpaceError, "room to write, got Disk quota exceeded. Make room"),
        (13, StorageError, "got Permission denied. Check the disk and its permissions"),
        (5, StorageError, "got Input/output error. Check the disk"),
    ],
)
def test_what_a_disk_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StorageError], message: str
) -> None:
    storage = open_storage(tmp_path / "s")
    storage.write("a", b"one")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("open", "unlink", "rglob", "read_bytes"):
        monkeypatch.setattr(Path, name, refuse)
    for action in (
        lambda: storage.write("a", b"two"),
        lambda: storage.write_all(made([("b", b"two")])),
        lambda: storage.read("a"),
        lambda: storage.sizes(),
        lambda: storage.delete(["a"]),
        lambda: storage.lock().__enter__(),
    ):
        with pytest.raises(kind, match=message):
            action()

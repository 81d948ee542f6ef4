"""Where an activation store lies: a folder on this machine, or a prefix of an S3 bucket.

Both offer the same few things: objects that are there whole or not at all once their write has returned, one object
that is replaced only by whoever saw its last version, and a lock that keeps a second writer out.

    runs/store              a folder
    s3://BUCKET/PREFIX      object storage that speaks S3; credentials, region and endpoint come from the usual
                            environment variables (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ...)

A folder is locked by the operating system, which frees the lock when the process dies. A bucket is locked by a lease:
an object that its writer renews, and that anybody may take over once it is LEASE_S old, by the clock of this machine
against that of the bucket. The lease keeps writers apart in time; what makes a commit safe, whatever the clocks say, is
that it replaces the very version that the writer last saw, or fails.

Left out: what is in a store; other clouds, which obstore also speaks.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain, count, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar, runtime_checkable
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import S3Store
from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore as ZarrLocalStore
from zarr.storage import ObjectStore as ZarrObjectStore

from activations.disk import sync
from activations.errors import DiskSpaceError, MismatchError, SaekitError, StorageError

LEASE_S = 60.0
"""seconds without a sign of life after which a lease on a bucket may be taken over"""
LOCK_KEY = ".writer.lock"
ATTEMPTS = ".attempts"
"""folder of a store where objects are made that are replaced at once, and what is only there meanwhile"""
PATIENCE_S = 20.0
"""seconds for which a request to a bucket is repeated before a run gives up"""
PAUSE_S = 0.1
"""seconds before a request is repeated for the first time; twice as many each time after that"""
TIMEOUTS: Any = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=20),
    "timeout": timedelta(minutes=10),
}
"""of one request: to connect, without a byte, and in all"""
NEW = ""
"""version of an object that is not there yet"""
_NEW_SUFFIX = ".new"
_RENEWALS = 4
_WRITERS = 4
_UPLOADS = 8
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = "status code: 4"
_METADATA_SERVICE = "169.254.169.254"
_T = TypeVar("_T")


@runtime_checkable
class Storage(Protocol):
    """One place that holds one store. Every method raises DiskSpaceError or StorageError where it is refused."""

    @property
    def where(self) -> str:
        """The place, as the user writes it."""
        ...

    @property
    def codecs(self) -> str:
        """The zarr codec pipeline that suits the place."""
        ...

    def zarr(self) -> ZarrStore:
        """What zarr reads arrays through."""
        ...

    def file(self, key: str) -> Path | None:
        """The file that an object is; None where objects are none."""
        ...

    def read(self, key: str) -> tuple[bytes, str] | None:
        """An object and its version; None if it is not there."""
        ...

    def version(self, key: str) -> str | None:
        """The version of an object; None if it is not there. Folders know of one version only."""
        ...

    def write(self, key: str, data: bytes, replaces: str | None = None) -> str:
        """Replace an object atomically, so that it survives a power cut, and return its new version.

        Args:
          replaces: on object storage, fail with MismatchError unless this is the current version; NEW for none.
        """
        ...

    def write_all(self, objects: Iterable[tuple[str, Callable[[], list[Any]]]]) -> None:
        """Make and write objects that nobody reads yet, several at a time; each is the buffers that its function gives.

        Returns when all of them would survive a power cut.
        """
        ...

    def replace_all(self, objects: Iterable[tuple[str, Callable[[], list[Any]]]]) -> None:
        """As `write_all`, for objects that other processes may be writing, too: each is replaced at once, and whole."""
        ...

    def sweep(self) -> None:
        """Delete what is in the folder ATTEMPTS: processes that were killed in `replace_all` leave something there."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of each object in the folder `prefix`, by key."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there are skipped."""
        ...

    def free_bytes(self) -> int | None:
        """Room for more; None if there is no limit to ask for."""
        ...

    def lock(self) -> AbstractContextManager[str]:
        """Keep other writers out; MismatchError if one is in. Gives a name that no other writer has, or had.

        It is empty for folders, where the operating system answers for it that there is one writer.
        """
        ...

    def explained(self) -> AbstractContextManager[None]:
        """Turn what the place itself refuses into a project error."""
        ...


def open_storage(where: str | Path) -> Storage:
    """The storage at a path or s3:// address; nothing is created or contacted yet."""
    text = str(where)
    if text.startswith("s3://"):
        return BucketStorage(text)
    if "://" in text:
        raise StorageError(text, expected="a path or s3://BUCKET/PREFIX", got=text.split("://")[0], fix="Write either.")
    return FolderStorage(text)


class FolderStorage:
    """A folder on this machine."""

    codecs = "zarrs.ZarrsCodecPipeline"

    def __init__(self, where: str):
        self.where, self._path = where, Path(where).expanduser()

    def zarr(self) -> ZarrStore:
        return ZarrLocalStore(self._path, read_only=True)

    def file(self, key: str) -> Path:
        return self._path / key

    def read(self, key: str) -> tuple[bytes, str] | None:
        with self.explained():
            try:
                return (self._path / key).read_bytes(), NEW
            except (FileNotFoundError, NotADirectoryError):
                return None

    def version(self, key: str) -> str | None:
        return NEW if (self._path / key).is_file() else None

    def write(self, key: str, data: bytes, replaces: str | None = None) -> str:
        path = self._path / key
        with self.explained():
            _make_folder(path.parent)
            new = path.with_name(f".{path.name}{_NEW_SUFFIX}")
            _write_file(new, [data])
            new.replace(path)
            sync(path.parent)
        return NEW

    def write_all(self, objects: Iterable[tuple[str, Callable[[], list[Any]]]]) -> None:
        # While one file is synced, the next ones are made and copied into the kernel's memory.
        with self.explained():
            with ThreadPoolExecutor(_WRITERS) as pool:
                written = list(pool.map(self._write_new, objects))
            self._sync_folders(written)

    def replace_all(self, objects: Iterable[tuple[str, Callable[[], list[Any]]]]) -> None:
        attempts = self._path / ATTEMPTS
        with self.explained():
            attempts.mkdir(exist_ok=True)
            with TemporaryDirectory(dir=attempts) as folder, ThreadPoolExecutor(_WRITERS) as pool:
                replaced = list(pool.map(partial(self._replace, Path(folder)), count(), objects))
            self._sync_folders(replaced)

    def _replace(self, folder: Path, number: int, item: tuple[str, Callable[[], list[Any]]]) -> Path:
        path, new = self._path / item[0], folder / str(number)
        _write_file(new, item[1]())
        path.parent.mkdir(parents=True, exist_ok=True)
        return new.replace(path)

    def _sync_folders(self, written: Iterable[Path]) -> None:
        # The name of a file is in its folder, and that of the folder in the one above it.
        folders = {folder for path in written for folder in path.parents if folder.is_relative_to(self._path)}
        for folder in sorted(folders, reverse=True):
            sync(folder)

    def sweep(self) -> None:
        shutil.rmtree(self._path / ATTEMPTS, ignore_errors=True)

    def _write_new(self, item: tuple[str, Callable[[], list[Any]]]) -> Path:
        path = self._path / item[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(path, item[1]())
        return path

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        with self.explained():
            for file in (self._path / prefix).rglob("*"):
                with suppress(FileNotFoundError):  # a writer may be at work
                    if file.is_file() and file.suffix != _NEW_SUFFIX:
                        found[file.relative_to(self._path).as_posix()] = file.stat().st_size
        return found

    def delete(self, keys: Iterable[str]) -> None:
        with self.explained():
            for path in (self._path / key for key in keys):
                with suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
                    for folder in takewhile(lambda folder: folder != self._path, path.parents):
                        if any(folder.iterdir()):
                            break
                        folder.rmdir()

    def free_bytes(self) -> int | None:
        folder = self._path.absolute()
        return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free

    @contextmanager
    def lock(self) -> Iterator[str]:
        with self.explained():
            try:
                _make_folder(self._path)
            except (FileExistsError, NotADirectoryError) as error:
                fix = "Choose another --set out=..."
                raise MismatchError(self.where, expected="a directory for out", got="a file", fix=fix) from error
            handle = (self._path / LOCK_KEY).open("w")
        with handle:
            with self.explained():
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise _locked(self.where, "Wait for it, or stop it.") from error
            yield ""

    @contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except SaekitError:
            raise
        except OSError as error:
            kind, expected, first = StorageError, "a folder to read and write", "Check the disk and its permissions"
            if error.errno in _NO_SPACE:
                kind, expected, first = DiskSpaceError, "room to write", "Make room"
            fix = f"{first}, then run the same command again; it goes on from its last commit."
            raise kind(self.where, expected=expected, got=error.strerror or str(error), fix=fix) from error


class BucketStorage:
    """A prefix of a bucket that speaks S3, through obstore; what the network drops is repeated."""

    # Not zarrs, which would open the bucket a second time, and which hides what went wrong.
    codecs = "zarr.core.codec_pipeline.BatchedCodecPipeline"

    def __init__(self, where: str):
        self.where = where
        bucket, _, prefix = where.removeprefix("s3://").partition("/")
        if not bucket:
            raise StorageError(where, expected="s3://BUCKET/PREFIX", got="no bucket", fix="Name one.")
        plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        backoff = {"init_backoff": timedelta(seconds=PAUSE_S), "max_backoff": timedelta(seconds=5), "base": 2}
        retries: Any = {"max_retries": 6, "backoff": backoff, "retry_timeout": timedelta(seconds=PATIENCE_S)}
        options: Any = {**TIMEOUTS, **({"allow_http": True} if plain else {})}
        with self.explained():
            self._objects = S3Store(bucket, prefix=prefix or None, client_options=options, retry_config=retries)

    def zarr(self) -> ZarrStore:
        return ZarrObjectStore(self._objects, read_only=True)

    def file(self, key: str) -> None:
        return None

    def read(self, key: str) -> tuple[bytes, str] | None:
        def get() -> tuple[bytes, str]:
            got = obstore.get(self._objects, key)
            return bytes(got.bytes()), str(got.meta["e_tag"])

        return self._unless_missing(get)

    def version(self, key: str) -> str | None:
        return self._unless_missing(lambda: str(obstore.head(self._objects, key)["e_tag"]))

    def write(self, key: str, data: bytes, replaces: str | None = None) -> str:
        mode: Any = "overwrite" if replaces is None else "create" if replaces == NEW else {"e_tag": replaces}
        with self.explained():
            try:
                put = self._ask(lambda: obstore.put(self._objects, key, data, mode=mode, use_multipart=False))
                return str(put["e_tag"])
            except (PreconditionError, AlreadyExistsError) as error:
                # A put that was repeated after a lost answer finds its own work in place.
                current = self.read(key)
                if current is not None and current[0] == data:
                    return current[1]
                raise _locked(self.where, "Let one of the two run.") from error

    def write_all(self, objects: Iterable[tuple[str, Callable[[], list[Any]]]]) -> None:
        # An object is durable once its put has returned. Large ones go in parts, which are repeated one by one.
        with self.explained(), ThreadPoolExecutor(_UPLOADS) as pool:
            list(pool.map(self._put, objects))

    def replace_all(self, objects: Iterable[tuple[str, Callable[[], list[Any]]]]) -> None:
        self.write_all(objects)  # a put is there whole or not at all

    def sweep(self) -> None:
        self.delete(self.sizes(ATTEMPTS))  # the bucket itself drops uploads that were cut short

    def _put(self, item: tuple[str, Callable[[], list[Any]]]) -> None:
        key, data = item[0], b"".join(item[1]())
        self._ask(lambda: obstore.put(self._objects, key, data))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        with self.explained():
            batches = self._ask(lambda: list(obstore.list(self._objects, prefix or None)))
        return {item["path"]: item["size"] for item in chain.from_iterable(batches)}

    def delete(self, keys: Iterable[str]) -> None:
        if doomed := list(keys):
            with self.explained():
                self._ask(lambda: obstore.delete(self._objects, doomed))

    def free_bytes(self) -> int | None:
        return None

    @contextmanager
    def lock(self) -> Iterator[str]:
        owner = uuid4().hex
        version, ended = self._take_lease(owner), threading.Event()
        keeper = threading.Thread(target=self._renew, args=(owner, version, ended), daemon=True)
        keeper.start()
        try:
            yield owner
        finally:
            ended.set()
            keeper.join()
            with suppress(StorageError):  # it then ends by itself, and what went wrong before is worth more
                self._free_lease(owner)

    @contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except SaekitError:
            raise
        except (BaseError, OSError) as error:
            raise _unreachable(self.where, error) from error

    def _ask(self, request: Callable[[], _T]) -> _T:
        """Make a request, and repeat it: obstore repeats neither conditional puts nor answers that are cut short."""
        began, pause = time.monotonic(), PAUSE_S
        while True:
            try:
                return request()
            except GenericError as error:
                if _REFUSED in str(error) or time.monotonic() + pause - began > PATIENCE_S:
                    raise
                time.sleep(pause)
                pause *= 2

    def _unless_missing(self, request: Callable[[], _T]) -> _T | None:
        with self.explained():
            try:
                return self._ask(request)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def _take_lease(self, owner: str) -> str:
        with suppress(MismatchError):
            return self.write(LOCK_KEY, _lease(owner), replaces=NEW)
        found = self._unless_missing(lambda: obstore.head(self._objects, LOCK_KEY))
        if found is None:
            return self.write(LOCK_KEY, _lease(owner), replaces=NEW)
        left = LEASE_S - (datetime.now(UTC) - found["last_modified"]).total_seconds()
        if left > 0:
            raise _locked(self.where, f"Wait for it, or stop it; if it was killed, try again in {left:.0f} s.")
        return self.write(LOCK_KEY, _lease(owner), replaces=str(found["e_tag"]))

    def _renew(self, owner: str, version: str, ended: threading.Event) -> None:
        """Renew the lease until the writer ends, or until another has it: then the next commit fails."""
        while not ended.wait(LEASE_S / _RENEWALS):
            try:
                version = self.write(LOCK_KEY, _lease(owner), replaces=version)
            except MismatchError:
                return
            except StorageError:
                continue

    def _free_lease(self, owner: str) -> None:
        found = self.read(LOCK_KEY)
        if found is not None and json.loads(found[0])["owner"] == owner:
            self.delete([LOCK_KEY])


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, and keep their names through a power cut."""
    made = list(takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync(folder.parent)


def _write_file(path: Path, parts: list[Any]) -> None:
    """Write buffers one behind the other, without joining them first, and sync."""
    with path.open("wb", buffering=0) as file:
        for part in parts:
            left = memoryview(part).cast("B")
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())


def _lease(owner: str) -> bytes:
    """Differs each time, so that each renewal is a version of its own."""
    return json.dumps({"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "at": uuid4().hex}).encode()


def _locked(where: str, fix: str) -> MismatchError:
    return MismatchError(where, expected="no other writer", got="a harvest that is writing it", fix=fix)


def _unreachable(where: str, error: BaseException) -> StorageError:
    # The first line says what failed; those after it repeat the request.
    reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
    if _METADATA_SERVICE in reason:  # where credentials are looked for last
        reason = "no credentials"
    fix = "Check the bucket, AWS_ENDPOINT_URL, AWS_REGION and the credentials, then run the same command again."
    return StorageError(where, expected="object storage that answers", got=reason, fix=fix)

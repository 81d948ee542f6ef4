"""Writing to disk so that nobody ever reads a half: staged, flushed, and renamed.

Flow of whatever puts a pack somewhere: 1. `staging` makes a hidden folder beside the place, which its process holds a
lock on, and removes those whose process has died; 2. files are written into it and flushed; 3. a rename, which is the
only step that others can see. A process that is killed leaves at most a hidden folder, which the next one removes.

Left out: disks of Windows, which have no flock.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from activations.disk import sync
from activations.errors import DiskSpaceError, SaekitError, StorageError

STAGED = ".partial-"
LOCK = ".lock"


@contextmanager
def explained(where: object) -> Iterator[None]:
    """Errors of the disk as those of this project."""
    try:
        yield
    except SaekitError:
        raise
    except OSError as error:
        got = error.strerror or type(error).__name__
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "Make room, then run the same command again."
            raise DiskSpaceError(where, expected="room to write", got=got, fix=fix) from error
        fix = "Check the path, and who may read and write it."
        raise StorageError(where, expected="a disk to read and write", got=got, fix=fix) from error


def sync_tree(path: Path) -> None:
    """Flush a folder with all that is in it."""
    for folder, _, files in os.walk(path):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def write_whole(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Put a file in place at once, in one piece and flushed."""
    with written_whole(path, mode) as file:
        file.write(content)


@contextmanager
def written_whole(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """The same of a file that is written in the context; after an error nothing is there that was not before."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_hashed(path: Path, parts: Iterable[bytes]) -> str:
    """Write a new file and return its SHA-256, in hex."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = hashlib.sha256()
    with path.open("xb") as file:
        for part in parts:
            state.update(part)
            file.write(part)
    return state.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block with the folder; make it if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder` to make something in; it is gone afterwards."""
    path = folder / f"{STAGED}{uuid.uuid4().hex}"
    with locked(folder):
        for other in folder.glob(f"{STAGED}*"):
            _remove_if_dead(other)
        path.mkdir()
        handle = _hold(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def place(staged: Path, target: Path) -> None:
    """Rename a flushed folder to where it is read; what was there before is gone first.

    Raises: OSError if another process has put a folder there meanwhile.
    """
    sync_tree(staged)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(staged.with_name(f"old-{uuid.uuid4().hex}"))
    staged.rename(target)
    sync(target.parent)


def check_room(folder: Path, n_bytes: int) -> None:
    """Raise DiskSpaceError if the disk of `folder` has fewer bytes free."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        fix = "Make room, then run the same command again."
        raise DiskSpaceError(folder, expected=f"{n_bytes} bytes free", got=free, fix=fix)


def _hold(path: Path) -> int:
    """A handle that keeps a folder locked for as long as this process lives and does not close it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_if_dead(path: Path) -> None:
    with suppress(OSError):  # held by a process that lives, or removed by one just now
        os.close(_hold(path))
        shutil.rmtree(path)

"""What a pack consists of, checked before it is moved: its manifest, the files that are listed there, a signature.

A pack is a library directory with a name and a version. Flow: 1. the manifest is read and its hash compared;
2. `declared_files` compares names, sizes and number of the files that it lists with what is allowed, before any of
them is opened; 3. `copy_pack` takes these files alone, each with the size and the hash that were listed, into a new
folder. Left out: what the files mean, which `steer.library` knows when it loads them.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from activations.errors import ArtefactError, CorruptArtefactError, MissingArtefactError
from sae.checked_files import JSON_BYTES
from steer.packs.contract import read_manifest
from steer.packs.disk import explained, write_hashed
from steer.packs.names import MANIFEST, SIGNATURE, clash, file_name_problem, printable

PACK_BYTES = 32 << 30
"""of all files of a pack together"""
FILE_BYTES = 8 << 30
"""of one file; more than a tar header can say"""
N_FILES = 10_000
"""files of a pack"""
SIGNATURE_BYTES = 4096
BLOCK = 1 << 20

_SHA256 = re.compile(r"[0-9a-f]{64}")


def damaged(where: object, expected: str, got: str) -> CorruptArtefactError:
    """The error for a pack that is not what it should be; `got` may quote what somebody else wrote."""
    fix = "Get it again from where it came."
    return CorruptArtefactError(where, expected=expected, got=printable(got), fix=fix)


def manifest_of(where: object, directory: Path) -> dict[str, Any]:
    """The manifest in a hidden folder, with errors that name `where` it came from instead."""
    try:
        return read_manifest(directory)
    except ArtefactError as error:
        raise type(error)(where, expected=error.expected, got=error.got, fix=error.fix) from error


def declared_files(where: object, manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Name -> size in bytes and SHA-256 of the files that a manifest lists, by name.

    Raises: CorruptArtefactError if one must not be written, or if they are too many or too large.
    """
    listed = manifest.get("files")
    if not isinstance(listed, dict) or len(listed) > N_FILES:
        got = f"{len(listed)}" if isinstance(listed, dict) else type(listed).__name__
        raise damaged(where, f"at most {N_FILES} files by name", got)
    found = {}
    for name, entry in sorted(listed.items()):
        problem = "a name that is taken" if name.lower() in (MANIFEST, SIGNATURE) else file_name_problem(name)
        if problem is not None:
            raise damaged(where, "names of files that are safe on any disk", f"{name[:200]!r} ({problem})")
        found[name] = _declared(f"{where}: {name}", entry)
    if (twice := clash(found)) is not None:
        raise damaged(where, "names that differ in more than case, and no file that is a folder", repr(twice))
    if sum(size for size, _ in found.values()) > PACK_BYTES:
        raise damaged(where, f"at most {PACK_BYTES >> 30} GiB of files", "more")
    return found


def read_small(path: Path, limit: int) -> bytes | None:
    """The content of a file of at most `limit` bytes, or None if there is none."""
    with explained(path):
        try:
            with path.open("rb") as file:
                content = file.read(limit + 1)
        except FileNotFoundError:
            return None
    if len(content) > limit:
        raise damaged(path, f"at most {limit} bytes", "more")
    return content


def copy_pack(source: Path, target: Path, *, follow_links: bool = False) -> dict[str, Any]:
    """Copy a pack's own files out of a directory into a new folder, checked, and return its manifest.

    Args:
      follow_links: read through symbolic links, of which a cache of downloads consists; else they are refused.
    Raises: MissingArtefactError, CorruptArtefactError.
    """
    manifest = read_manifest(source)
    target.mkdir()
    for name, limit in ((MANIFEST, JSON_BYTES), (SIGNATURE, SIGNATURE_BYTES)):
        content = read_small(source / name, limit)
        if content is not None:
            (target / name).write_bytes(content)
    if manifest_of(source, target) != manifest:
        raise damaged(source, "a manifest that stays as it is", "one that changed just now")
    for name, (size, sha256) in declared_files(source, manifest).items():
        parts = file_parts(source / name, size, follow_links=follow_links)
        if write_hashed(target / name, parts) != sha256:
            raise damaged(source / name, "the content that the manifest has the hash of", "other content")
    return manifest


def file_parts(path: Path, size: int, *, follow_links: bool = False) -> Iterator[bytes]:
    """The content of a regular file of exactly `size` bytes, in blocks.

    Raises: MissingArtefactError if there is none; CorruptArtefactError for a link, or another size.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    with explained(path):
        try:
            handle = os.open(path, flags)
        except FileNotFoundError as error:
            fix = "Get it again from where it came."
            raise MissingArtefactError(path, expected="a file of the pack", got="nothing", fix=fix) from error
        with open(handle, "rb") as file:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode) or about.st_size != size:
                got = f"{about.st_size} bytes" if stat.S_ISREG(about.st_mode) else "something else"
                raise damaged(path, f"a regular file of {size} bytes", got)
            left = size
            while left:
                part = file.read(min(left, BLOCK))
                if not part:
                    raise damaged(path, f"{size} bytes", f"{left} fewer")
                left -= len(part)
                yield part


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex; read now, and not remembered."""
    with explained(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _declared(where: str, entry: Any) -> tuple[int, str]:
    size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or not 0 <= size < FILE_BYTES:
        raise damaged(where, f"a size below {FILE_BYTES >> 30} GiB", repr(size)[:40])
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise damaged(where, "a SHA-256 in hex", repr(sha256)[:80])
    return size, sha256

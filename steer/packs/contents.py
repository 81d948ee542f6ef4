"""What a pack consists of, checked before it is moved: its manifest, the files that are listed there, a signature.

A pack is a library with a name and a version. Flow: 1. the manifest is read, and its hash and the names in it are
compared with what is allowed, by `steer.manifest`; 2. `declared_files` does so with sizes and number of the files that
it lists, before any of them is opened; 3. `copy_pack` takes these files alone, each with the size and the hash that
were listed, into a new folder. Left out: what the files mean, which `steer.library` knows when it loads them.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from activations.errors import CorruptArtefactError, MissingArtefactError
from sae.artefact import file_sha256
from sae.checked_files import JSON_BYTES
from steer.manifest import MANIFEST, SIGNATURE, parse_manifest
from steer.packs.disk import explained, write_hashed
from steer.packs.names import clash, is_device, printable

PACK_BYTES = 32 << 30
"""of all files of a pack together"""
FILE_BYTES = 8 << 30
"""of one file; a tar header cannot say more"""
N_FILES = 10_000
"""files of a pack"""
SIGNATURE_BYTES = 4096
BLOCK = 1 << 20


def damaged(where: object, expected: str, got: str) -> CorruptArtefactError:
    """The error for a pack that is not what it should be; `got` may quote what somebody else wrote."""
    fix = "Get it again from where it came."
    return CorruptArtefactError(where, expected=expected, got=printable(got), fix=fix)


def declared_files(where: object, manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Name -> size in bytes and SHA-256 of the files that a manifest lists, by name.

    Raises: CorruptArtefactError if one must not be written, or if they are too many or too large.
    """
    found = {name: (ref["bytes"], ref["sha256"]) for name, ref in sorted(manifest["files"].items())}
    if len(found) > N_FILES:
        raise damaged(where, f"at most {N_FILES} files", f"{len(found)}")
    odd = next(filter(is_device, found), None) or clash([MANIFEST, SIGNATURE, *found])
    if odd is not None:
        raise damaged(where, "names of files that can be beside each other on any disk", repr(odd))
    large = next((name for name, (size, _) in found.items() if size >= FILE_BYTES), None)
    if large is not None:
        raise damaged(f"{where}: {large}", f"a size below {FILE_BYTES >> 30} GiB", f"{found[large][0]} bytes")
    if sum(size for size, _ in found.values()) > PACK_BYTES:
        raise damaged(where, f"at most {PACK_BYTES >> 30} GiB of files", "more")
    return found


def models_of(where: object, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprint -> id of the models that a pack has vectors for, or an SAE of.

    Raises: CorruptArtefactError if it does not say.
    """
    try:
        sae = manifest["sae"]
        found = {} if sae is None else {str(sae["model_fingerprint"]): str(sae["model_id"])}
        return found | {str(each["model"]["fingerprint"]): str(each["model"]["id"]) for each in manifest["vectors"]}
    except (KeyError, TypeError) as error:
        raise damaged(where, "vectors with their models", "others") from error


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
    target.mkdir()
    content = read_small(source / MANIFEST, JSON_BYTES)
    if content is None:
        fix = "Check the path, and what was copied."
        raise MissingArtefactError(source, expected="a library", got=f"no {MANIFEST}", fix=fix)
    manifest = parse_manifest(source, content)
    (target / MANIFEST).write_bytes(content)
    signature = read_small(source / SIGNATURE, SIGNATURE_BYTES)
    if signature is not None:
        (target / SIGNATURE).write_bytes(signature)
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
    with explained(path):
        return file_sha256(path)

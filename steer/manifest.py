"""The files of a library and the manifest that names them, without what they mean: no vectors, no torch.

Flow of reading: 1. size, format and hash of the manifest are checked, and the names of files; 2. what was stopped
while it was saved is finished. Flow of writing: 1. each file is written beside its place and synced, the manifest last;
2. all are renamed into place.

The content hash is that of the manifest without it; since the manifest has the hashes of all files, it covers
everything. Left out: vectors, features and kits (`steer.library`).
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from activations.errors import CorruptArtefactError, MissingArtefactError, SaekitError, StorageError
from sae.artefact import file_sha256
from sae.checked_files import JSON_BYTES
from steer.pack import FileRef

FORMAT = "saekit-library-4"
MANIFEST, VECTORS, CARD, SIGNATURE = "manifest.json", "vectors.safetensors", "README.md", "signature.json"
SAE = "sae"
"""directory of the SAE in a library"""
PARTIAL = ".partial"
TENSOR_BYTES = 1 << 30
"""the largest file of vectors that is read"""
FILE_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]{0,63}/){0,2}[A-Za-z0-9_][A-Za-z0-9_-]{0,63}\.[a-z0-9]{1,16}")
"""what files of a library may be called: at most two directories deep, and nothing that a system takes specially"""


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the library at `path`, as `read_library` reads it."""
    return read_library(path)[0]


def read_library(path: Path) -> tuple[dict[str, Any], bytes]:
    """The manifest of the library at `path` and the bytes of its vectors; format, hashes and names of files are right.

    Raises: MissingArtefactError if there is none, StorageError if it cannot be read, CorruptArtefactError if it is
      damaged or was changed by hand.
    """
    try:
        return _checked(path, read_file(path / MANIFEST, JSON_BYTES))
    except CorruptArtefactError:
        if not _finish(path):
            raise
        return _checked(path, read_file(path / MANIFEST, JSON_BYTES))


def parse_manifest(where: str | Path, content: bytes) -> dict[str, Any]:
    """The same from the bytes of one. Raises: CorruptArtefactError."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(where, "a manifest that is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise damaged(where, "another format")
    if manifest.get("content_sha256") != content_hash(manifest):
        raise damaged(where, "content that does not match its hash")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_may_be_called, files)):
        raise damaged(where, "files with names that files may not have")
    try:
        for each in files.values():
            FileRef.model_validate(each)
    except ValidationError as error:
        raise damaged(where, first_problem(error)) from error
    return manifest


def content_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without it, as JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in manifest.items() if key != "content_sha256"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def verify_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file that a manifest names with its size and hash.

    Raises: CorruptArtefactError for the first that is missing, no regular file, or another.
    """
    for name, ref in manifest["files"].items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise damaged(path, f"no file {name}")
        if file.stat().st_size != ref["bytes"] or file_sha256(file) != ref["sha256"]:
            raise damaged(path, f"a file {name} that does not match its hash")


def damaged(path: str | Path, got: str) -> CorruptArtefactError:
    """The error for a library that is not what it should be."""
    return CorruptArtefactError(path, expected="an intact library", got=got, fix="Get it again from where it came.")


def _may_be_called(name: str) -> bool:
    """Whether it is a path of plain words that means the same on every system, and stays in its directory."""
    return bool(FILE_NAME.fullmatch(name)) and name not in (MANIFEST, SIGNATURE)


def _checked(path: Path, content: bytes) -> tuple[dict[str, Any], bytes]:
    manifest = parse_manifest(path, content)
    ref = manifest["files"].get(VECTORS)
    if ref is None or ref["bytes"] > TENSOR_BYTES:
        raise damaged(path, f"no {VECTORS} of {TENSOR_BYTES >> 20} MiB at most")
    data = read_file(path / VECTORS, ref["bytes"])
    if len(data) != ref["bytes"] or sha256(data) != ref["sha256"]:
        raise damaged(path, f"a file {VECTORS} that does not match its hash")
    return manifest, data


def read_file(file: Path, most: int) -> bytes:
    """A file of `most` bytes at most. Raises: as `read_manifest` does."""
    try:
        if file.stat().st_size > most:
            raise damaged(file.parent, f"a {file.name} of more than {most} bytes")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise MissingArtefactError(
            file.parent, expected="a library", got=f"no {file.name}", fix="Make one with: saekit vector make"
        ) from error
    except OSError as error:
        fix = "See who may read it."
        raise StorageError(
            file.parent, expected="a library that can be read", got=str(error.strerror), fix=fix
        ) from error


def write_files(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files beside their places, the last of them last, and rename them in that order."""
    try:
        for name, data in files.items():
            target = path / (name + PARTIAL)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            (path / (name + PARTIAL)).replace(path / name)
    except OSError as error:
        fix = "Check the place and its free space."
        raise StorageError(path, expected="a library that can be written", got=str(error.strerror), fix=fix) from error


def remove_signature(path: Path) -> None:
    """Before a library changes: a signature of what it was would say of what it is that somebody tampered with it."""
    try:
        (path / SIGNATURE).unlink(missing_ok=True)
    except OSError as error:
        fix = "Check the place."
        raise StorageError(path, expected="a library that can be written", got=str(error.strerror), fix=fix) from error


def _finish(path: Path) -> bool:
    """Finish a saving that was stopped while it renamed; whether there was one, and it was whole."""
    partial = path / (MANIFEST + PARTIAL)
    try:
        manifest = parse_manifest(path, read_file(partial, JSON_BYTES))
        waiting = [name for name in manifest["files"] if (path / (name + PARTIAL)).is_file()]
        for name, ref in manifest["files"].items():
            file = path / (name + PARTIAL if name in waiting else name)
            if not file.is_file() or file_sha256(file) != ref["sha256"]:
                return False
        for name in [*waiting, MANIFEST]:
            (path / (name + PARTIAL)).replace(path / name)
    except (SaekitError, OSError):
        return False
    return True


def by_lines(manifest: Mapping[str, Any]) -> str:
    """As JSON with a line for each vector, feature, kit and file, so that versions can be compared line by line."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def block(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(map(line, value)) + "\n]"
        if isinstance(value, dict) and value:
            return "{\n" + ",\n".join(f"{line(key)}: {line(each)}" for key, each in value.items()) + "\n}"
        return line(value)

    return "{\n" + ",\n".join(f"{line(key)}: {block(value)}" for key, value in manifest.items()) + "\n}\n"


def sha256(data: bytes) -> str:
    """In hex."""
    return hashlib.sha256(data).hexdigest()


def first_problem(error: Exception) -> str:
    """What is wrong with it, in a few words."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}"

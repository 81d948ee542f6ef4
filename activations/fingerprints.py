"""SHA-256 of files and tensors, kept so that a large file is read once.

Flow: 1. a digest is looked up under the file's path, size and modification time; 2. if absent it is computed and kept
in the cache folder, one small JSON file a path, written atomically, so that processes never disturb each other.

Left out: proof against somebody who changes a file and sets its times back; `saekit inspect` is no security tool.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from activations.errors import ModelError

T = TypeVar("T")

_HEADER_LIMIT_BYTES = 100_000_000


def cache_dir() -> Path:
    """Folder for what can be made again: `SAEKIT_CACHE`, else `saekit` in `XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("SAEKIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "saekit"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return _remembered(path, "bytes", _sha256_of_bytes)


def tensor_digests(path: Path) -> dict[str, str]:
    """Name -> "dtype shape sha256" of each tensor in a safetensors file.

    Taken a tensor at a time, so that the same weights have the same digests however they are split into files.

    Raises: ModelError if the file is not safetensors or is cut short.
    """
    return _remembered(path, "tensors", _digest_tensors)


def digest(*parts: str) -> str:
    """SHA-256 of several strings, in hex; the parts' lengths count, so ("a", "b") differs from ("ab",)."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode()
        state.update(f"{len(data)}:".encode())
        state.update(data)
    return state.hexdigest()


def digest_of(data: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return digest(json.dumps(data, sort_keys=True, separators=(",", ":")))


def _sha256_of_bytes(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_tensors(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = _safetensors_header(path, file.read(min(header_bytes, _HEADER_LIMIT_BYTES)))
        digests = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            file.seek(8 + header_bytes + start)
            sha256 = _hash_range(path, file, end - start)
            digests[name] = f"{entry['dtype']} {entry['shape']} {sha256}"
    return digests


def _safetensors_header(path: Path, data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data)
        header.pop("__metadata__", None)
        return header
    except (ValueError, AttributeError) as error:
        raise _not_safetensors(path, "a header that cannot be read") from error


def _hash_range(path: Path, file: Any, n_bytes: int) -> str:
    state = hashlib.sha256()
    left = n_bytes
    while left:
        block = file.read(min(left, 1 << 22))
        if not block:
            raise _not_safetensors(path, f"{left} bytes too few")
        state.update(block)
        left -= len(block)
    return state.hexdigest()


def _not_safetensors(path: Path, got: str) -> ModelError:
    return ModelError(path, expected="a whole safetensors file", got=got, fix="Copy or download the file again.")


def _remembered(path: Path, kind: str, compute: Callable[[Path], T]) -> T:
    path = path.resolve()
    stat = path.stat()
    key = {"path": str(path), "kind": kind, "size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = cache_dir() / "digests" / f"{digest(kind, str(path))}.json"
    known = _read_note(note)
    if known is not None and all(known.get(name) == value for name, value in key.items()):
        return known["digest"]
    value = compute(path)
    _write_note(note, {**key, "digest": value})
    return value


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and "digest" in data else None


def _write_note(note: Path, data: dict[str, Any]) -> None:
    part = note.with_name(f".{uuid.uuid4().hex}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(data))
        part.replace(note)
    except OSError:  # A cache that cannot be written costs time, not correctness.
        with suppress(OSError):
            part.unlink()

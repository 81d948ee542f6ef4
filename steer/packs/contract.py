"""What steer.packs needs of a manifest, until steer.library has its next format."""

import hashlib
import json
from pathlib import Path
from typing import Any

from activations.errors import CorruptArtefactError
from sae.checked_files import read_json


def content_hash(manifest):
    rest = {k: v for k, v in manifest.items() if k != "content_sha256"}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    m = read_json(Path(path) / "manifest.json")
    if m.get("format") != "saekit-library-4":
        raise CorruptArtefactError(path, expected="an intact library", got="another format", fix="Get it again.")
    if m.get("content_sha256") != content_hash(m):
        raise CorruptArtefactError(
            path, expected="an intact library", got="content that does not match its hash", fix="Get it again."
        )
    return m


def verify_files(path: Path, manifest) -> None:
    for name, e in manifest["files"].items():
        b = (Path(path) / name).read_bytes()
        if len(b) != e["bytes"] or hashlib.sha256(b).hexdigest() != e["sha256"]:
            raise CorruptArtefactError(
                Path(path) / name,
                expected="an intact library",
                got="content that does not match its hash",
                fix="Get it again.",
            )

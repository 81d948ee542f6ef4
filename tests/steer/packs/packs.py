"""Packs to move around."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer.manifest import content_hash

FILES = {
    "vectors.safetensors": bytes(range(256)) * 12,
    "README.md": b"# A pack\n",
    "plots/effects.svg": b"<svg/>",
    "sae/cfg.json": b"{}",
}
ABOUT = {"name", "version", "summary", "licence", "authors"}
"""what a manifest has under `about`"""
FINGERPRINT = "ab" * 32


def manifest_of(contents: Mapping[str, bytes], /, **changes: Any) -> dict[str, Any]:
    """A manifest with its hash; `changes` may put any key wrong, also one of `about`."""
    about = {key: changes[key] for key in ABOUT & changes.keys()}
    rest = {key: value for key, value in changes.items() if key not in ABOUT}
    model = {"id": "tiny", "fingerprint": FINGERPRINT, "n_layers": 4, "d_model": 32}
    manifest = {
        "format": "saekit-library-4",
        "about": {
            "name": "demo",
            "version": "1.0.0",
            "summary": "moods and places",
            "licence": "Apache-2.0",
            "authors": ["Ada"],
        }
        | about,
        "vectors": [{"name": "joyful_vs_gloomy", "model": model, "hook_point": "resid_post.1"}],
        "features": [{"latent": 7, "label": "names of rivers", "author": "Ada"}],
        "kits": [{"name": "cheer", "vectors": []}],
        "sae": None,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    } | rest
    return manifest | {"content_sha256": content_hash(manifest)}


def write_pack(folder: Path, files: Mapping[str, bytes] = FILES, **changes: Any) -> Path:
    """A pack in a folder, with a file that is none of its own."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest_of(files, **changes), indent=2) + "\n")
    (folder / "judge.jsonl").write_text("{}\n")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Path -> content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

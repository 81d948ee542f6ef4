"""What is installed, as it is shown: each pack with what its manifest and its signature say.

Left out: comparing files with their hashes, which `steer.packs.install.verify` does.
"""

from typing import Any

from activations.errors import SaekitError
from steer.manifest import read_manifest
from steer.packs.installed import installed, store
from steer.packs.keys import trusted_keys
from steer.packs.names import about_of, printable
from steer.packs.signature import check_signature


def describe_installed() -> dict[str, Any]:
    """All that is installed, as it is shown: under `packs`, NAME@VERSION to what its manifest says; or what ails it."""
    rows = {}
    for name, found in installed().items():
        for version, path in found.items():
            try:
                manifest = read_manifest(path)
                summary, n_vectors = about_of(path, manifest).summary, len(manifest["vectors"])
                signed = str(check_signature(path, path, manifest, trusted_keys()))
            except (SaekitError, KeyError, TypeError) as error:
                summary, n_vectors, signed = "", 0, f"damaged: {error}"
            rows[f"{name}@{version}"] = {"summary": printable(summary), "vectors": n_vectors, "signed": signed}
    return {"store": store(), "packs": rows}

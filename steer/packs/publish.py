"""A pack to where others can get it: a catalogue, an archive, or the Hugging Face hub.

Flow: 1. the key signs the content hash, and later the index of a catalogue, or the signature that is there is checked;
2. the pack is written, checked file by file on the way. The library itself stays as it is. Left out: how each place
takes it (`steer.packs.catalogue`, `archive` and `hub`).
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from activations.errors import ConfigError
from steer.manifest import read_manifest
from steer.packs.archive import write_archive
from steer.packs.catalogue import publish_to_catalogue
from steer.packs.config import PublishConfig
from steer.packs.hub import HUB, parse_hub, push
from steer.packs.installed import resolve
from steer.packs.keys import load_key, trusted_keys
from steer.packs.names import ARCHIVE_SUFFIX, name_of
from steer.packs.signature import check_signature, sign
from steer.packs.web import is_web, local_path, shown


def publish(settings: PublishConfig) -> dict[str, Any]:
    """Publish a pack and say what was published and where.

    Raises: ConfigError for a library without name or version, and for a key that cannot be used; CorruptArtefactError
      for a damaged library or a signature of other content; MismatchError if a catalogue has this version with other
      content; EndpointError if the hub refuses.
    """
    directory = resolve(settings.library)
    manifest = read_manifest(directory)
    name, version = name_of(directory, manifest)
    key = None if settings.key is None else load_key(settings.key)
    signature = None if key is None else sign(manifest["content_sha256"], key)
    if signature is None:
        check_signature(directory, directory, manifest, trusted_keys())
    about = {"name": name, "version": version, "content_sha256": manifest["content_sha256"]}
    return about | _put(directory, settings.to, signature, key)


def _put(directory: Path, to: str, signature: bytes | None, key: Ed25519PrivateKey | None) -> dict[str, Any]:
    if to.startswith(HUB):
        with TemporaryDirectory(prefix="saekit-") as folder:
            return {"to": f"{HUB}{parse_hub(to).repo}", "commit": push(directory, to, Path(folder), signature)}
    if is_web(to):
        fix = "Publish into a folder, and copy that to the server."
        raise ConfigError(shown(to), expected=f"a folder, an archive or {HUB}ORG/NAME", got="an address", fix=fix)
    path = local_path(to)
    if to.endswith(ARCHIVE_SUFFIX):
        write_archive(directory, path, signature)
        return {"to": str(path), "bytes": path.stat().st_size}
    pack, is_new = publish_to_catalogue(directory, path, signature, key)
    return {"to": str(path / pack.file), "bytes": pack.bytes, "signer": pack.signer, "new": is_new}

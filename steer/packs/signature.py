"""Who vouches for a pack: an Ed25519 signature of its content hash, and what is to be thought of one.

    signature.json   algorithm "ed25519", public_key and signature in base64, signed: the manifest's content_sha256

What is signed is b"saekit-library\\n" and the 32 bytes of the content hash, so that a signature of something else never
passes as one of a pack. The content hash covers the manifest, and the manifest the hash of every file. A signature says
that the owner of a key has seen exactly this; whose key it is says the file of trusted keys (`steer.packs.keys`).

A pack is in one of four states: unsigned; signed by NAME; signed by an unknown key; tampered, where the signature is
not one of this content, which is worse than none. Left out: who may sign what.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from activations.errors import ConfigError, CorruptArtefactError
from steer.manifest import SIGNATURE
from steer.packs.contents import SIGNATURE_BYTES, read_small
from steer.packs.keys import fingerprint, parse_public, public_text

DOMAIN = b"saekit-library\n"
ALGORITHM = "ed25519"


class Signed(NamedTuple):
    """What is to be thought of a pack's signature."""

    state: Literal["unsigned", "signed", "unknown key"]
    """signed: by a key that is trusted"""
    by: str | None
    """the name of the trusted key"""
    fingerprint: str | None
    """of the key, whoever's it is"""

    def __str__(self) -> str:
        if self.state == "signed":
            return f"signed by {self.by}"
        return "unsigned" if self.fingerprint is None else f"signed by an unknown key {self.fingerprint}"


def sign(content_sha256: str, key: Ed25519PrivateKey) -> bytes:
    """The content of a signature.json for a pack of that content hash."""
    about = {
        "algorithm": ALGORITHM,
        "public_key": public_text(key.public_key()),
        "signature": base64.b64encode(key.sign(_message(content_sha256))).decode(),
        "signed": content_sha256,
    }
    return (json.dumps(about, indent=2) + "\n").encode()


def check_signature(
    where: object, directory: Path, manifest: Mapping[str, Any], trusted: Mapping[str, Ed25519PublicKey]
) -> Signed:
    """What is to be thought of the signature in a pack's directory, whose manifest's hash has been compared.

    Raises: CorruptArtefactError if it is not a signature of this content.
    """
    try:
        content = read_small(directory / SIGNATURE, SIGNATURE_BYTES)
    except CorruptArtefactError as error:
        raise tampered(where, "a signature that is too long") from error
    if content is None:
        return Signed("unsigned", None, None)
    key = _checked_key(where, content, str(manifest["content_sha256"]))
    by = next((name for name, known in trusted.items() if known == key), None)
    return Signed("unknown key" if by is None else "signed", by, fingerprint(key))


def require_trusted(where: object, signed: Signed) -> None:
    """Raise ConfigError unless a trusted key has signed it."""
    if signed.state != "signed":
        fix = "Trust its key with saekit library trust, if you know whose it is, or leave require_signature out."
        raise ConfigError(where, expected="a pack signed by a trusted key", got=f"one {signed}", fix=fix)


def tampered(where: object, got: str) -> CorruptArtefactError:
    """The error for a pack whose signature is not one of its content."""
    fix = "Do not use it; get it again from who made it."
    return CorruptArtefactError(where, expected="a signature of this content", got=f"tampered: {got}", fix=fix)


def _checked_key(where: object, content: bytes, content_sha256: str) -> Ed25519PublicKey:
    try:
        about = json.loads(content)
        if about["algorithm"] != ALGORITHM or set(about) != {"algorithm", "public_key", "signature", "signed"}:
            raise tampered(where, "a signature of another kind")
        if about["signed"] != content_sha256:
            raise tampered(where, "a signature of other content")
        key = parse_public(where, about["public_key"])
        key.verify(base64.b64decode(about["signature"], validate=True), _message(content_sha256))
        return key
    except InvalidSignature as error:
        raise tampered(where, "a signature that its key has not made") from error
    except CorruptArtefactError:
        raise
    except (ConfigError, ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise tampered(where, "a signature that cannot be read") from error


def _message(content_sha256: str) -> bytes:
    return DOMAIN + bytes.fromhex(content_sha256)

"""Who vouches for a pack, or for a catalogue: an Ed25519 signature of a hash, and what is to be thought of one.

    signature.json   algorithm "ed25519", public_key and signature in base64, signed: the manifest's content_sha256

What is signed is b"saekit-library\\n" and the 32 bytes of the content hash, so that a signature of something else never
passes as one of a pack; the index has words of its own. The content hash covers the manifest, and the manifest the hash
of every file. A signature says that the owner of a key has seen exactly this; whose key it is says the file of trusted
keys (`steer.packs.keys`).

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
    return (json.dumps(signature_of(content_sha256, key, DOMAIN), indent=2) + "\n").encode()


def signature_of(sha256: str, key: Ed25519PrivateKey, domain: bytes) -> dict[str, str]:
    """The signature of a hash, as JSON has it. `domain`: what kind of thing it is the hash of."""
    return {
        "algorithm": ALGORITHM,
        "public_key": public_text(key.public_key()),
        "signature": base64.b64encode(key.sign(domain + bytes.fromhex(sha256))).decode(),
        "signed": sha256,
    }


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
    try:
        about = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise tampered(where, "a signature that cannot be read") from error
    return judged(where, about, str(manifest["content_sha256"]), DOMAIN, trusted)


def judged(
    where: object, signature: Any, sha256: str, domain: bytes, trusted: Mapping[str, Ed25519PublicKey]
) -> Signed:
    """What is to be thought of a signature, as JSON has it, of what has this hash.

    Raises: CorruptArtefactError if it is not one of this.
    """
    key = _checked_key(where, signature, sha256, domain)
    by = next((name for name, known in trusted.items() if known == key), None)
    return Signed("unknown key" if by is None else "signed", by, fingerprint(key))


def require_trusted(where: object, signed: Signed) -> None:
    """Raise ConfigError unless a trusted key has signed it."""
    if signed.state != "signed":
        fix = "Trust its key with saekit library trust, if you know whose it is, or leave require_signature out."
        raise ConfigError(where, expected="a pack signed by a trusted key", got=f"one {signed}", fix=fix)


def tampered(where: object, got: str) -> CorruptArtefactError:
    """The error for a pack, or an index, whose signature is not one of its content."""
    fix = "Do not use it; get it again from who made it."
    return CorruptArtefactError(where, expected="a signature of this content", got=f"tampered: {got}", fix=fix)


def _checked_key(where: object, about: Any, sha256: str, domain: bytes) -> Ed25519PublicKey:
    try:
        if about["algorithm"] != ALGORITHM or set(about) != {"algorithm", "public_key", "signature", "signed"}:
            raise tampered(where, "a signature of another kind")
        if about["signed"] != sha256:
            raise tampered(where, "a signature of other content")
        key = parse_public(where, about["public_key"])
        key.verify(base64.b64decode(about["signature"], validate=True), domain + bytes.fromhex(sha256))
        return key
    except InvalidSignature as error:
        raise tampered(where, "a signature that its key has not made") from error
    except CorruptArtefactError:
        raise
    except (ConfigError, ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise tampered(where, "a signature that cannot be read") from error

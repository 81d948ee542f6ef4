"""Keys that packs are signed with, and whose signatures are believed.

A private key is a PEM file (PKCS 8) that nobody but its owner may read, with a passphrase or without. A public key is
its 32 bytes in base64; its fingerprint, the first 32 hex digits of their SHA-256, is for people to compare. Whom to
believe is written in a text file, `trusted_keys` in `$XDG_CONFIG_HOME/saekit` or `~/.config/saekit`, one a line:

    NAME BASE64

The passphrase comes from the environment (`SAEKIT_KEY_PASSPHRASE`) or is asked for on a terminal. It is never shown,
logged or kept, and no error repeats what is in a key file. Left out: expiry, revocation lists, chains of trust.
"""

import base64
import binascii
import getpass
import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from activations.errors import ConfigError, CorruptArtefactError, MissingArtefactError
from steer.packs.config import TrustConfig
from steer.packs.contents import read_small
from steer.packs.disk import explained, locked, write_whole

PASSPHRASE = "SAEKIT_KEY_PASSPHRASE"
"""environment variable that holds the passphrase of a private key"""
KEY_FILE_BYTES = 16 << 10
TRUSTED_FILE_BYTES = 1 << 20
PUBLIC_BYTES = 32
_SIGNER = re.compile(r"[^\W_][\w.@+-]{0,63}")


def public_text(key: Ed25519PublicKey) -> str:
    """A public key in base64."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def parse_public(where: object, text: str) -> Ed25519PublicKey:
    """The public key that base64 stands for. Raises: ConfigError."""
    try:
        raw = base64.b64decode(text, validate=True)
        if len(raw) == PUBLIC_BYTES and base64.b64encode(raw).decode() == text:
            return Ed25519PublicKey.from_public_bytes(raw)
    except (binascii.Error, ValueError):
        pass
    fix = "Copy what saekit library key printed."
    raise ConfigError(
        where, expected=f"an Ed25519 public key, {PUBLIC_BYTES} bytes in base64", got="another text", fix=fix
    )


def fingerprint(key: Ed25519PublicKey) -> str:
    """What people compare a public key by: 32 hex digits."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:32]


def make_key(file: Path, *, ask: bool = False) -> Ed25519PublicKey:
    """Make a private key, write it into a new file that only its owner may read, and return its public part.

    Args:
      ask: ask for a passphrase, if the environment has none.
    Raises: ConfigError if something is there already, or if a passphrase is asked for and none is given.
    """
    if file.exists():
        fix = "Choose another --set out=..., or use the one that is there."
        raise ConfigError(file, expected="nothing there yet", got="a file", fix=fix)
    secret = _passphrase(file, again=True) if ask else os.environ.get(PASSPHRASE, "").encode()
    key = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(secret) if secret else NoEncryption()
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), mode=0o600)
    return key.public_key()


def load_key(file: Path) -> Ed25519PrivateKey:
    """Read a private key; a passphrase is asked for only if it has one.

    Raises: MissingArtefactError; ConfigError if others may read the file, and for a wrong passphrase or another kind of
      key.
    """
    content = read_small(file, KEY_FILE_BYTES)
    if content is None:
        fix = "Make one with: saekit library key"
        raise MissingArtefactError(file, expected="a private key", got="nothing there", fix=fix)
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        got, fix = f"mode {mode:o}", f"chmod 600 {file}, and make another key if others could read it."
        raise ConfigError(file, expected="a key that only its owner may read", got=got, fix=fix)
    secret = _passphrase(file) if b"ENCRYPTED" in content else None
    try:
        key = load_pem_private_key(content, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        fix = f"Check the file and {PASSPHRASE}."
        raise ConfigError(file, expected="a private key in PEM, and its passphrase", got="neither", fix=fix) from error
    if not isinstance(key, Ed25519PrivateKey):
        fix = "Make one with: saekit library key"
        raise ConfigError(file, expected="an Ed25519 key", got=type(key).__name__, fix=fix)
    return key


def trusted_file() -> Path:
    """Where trusted keys are written."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "saekit" / "trusted_keys"


def trusted_keys() -> dict[str, Ed25519PublicKey]:
    """Name -> public key of everybody whose signatures are believed. Raises: CorruptArtefactError naming the line."""
    file = trusted_file()
    content = read_small(file, TRUSTED_FILE_BYTES) or b""
    found: dict[str, Ed25519PublicKey] = {}
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not _SIGNER.fullmatch(words[0]) or words[0] in found:
            fix = "Correct the line."
            raise CorruptArtefactError(
                f"{file}: line {number}", expected="NAME BASE64, a name once", got="else", fix=fix
            )
        found[words[0]] = parse_public(f"{file}: line {number}", words[1])
    return found


def trust(name: str, key: Ed25519PublicKey) -> None:
    """Believe a key from now on, under a name. Raises: ConfigError if the name or the key is there already."""
    if not _SIGNER.fullmatch(name):
        fix = "Choose another."
        raise ConfigError(f"name '{name}'", expected="letters, digits and . _ - @ +", got=f"'{name}'", fix=fix)
    with _changing():
        for other, known in trusted_keys().items():
            if (other == name) != (known == key):
                fix = f"Remove it first: saekit library trust --set name={other} --set remove=true"
                got = f"{fingerprint(known)} as '{other}'"
                raise ConfigError(trusted_file(), expected="one name a key, one key a name", got=got, fix=fix)
            if other == name:
                return
        before = read_small(trusted_file(), TRUSTED_FILE_BYTES) or b""
        ended = before if before.endswith(b"\n") or not before else before + b"\n"
        write_whole(trusted_file(), ended + f"{name} {public_text(key)}\n".encode())


def distrust(name: str) -> Ed25519PublicKey:
    """Believe the key of that name no longer, and return it. Raises: ConfigError if there is none."""
    with _changing():
        known = trusted_keys()
        if name not in known:
            got, fix = ", ".join(known) or "no keys", "See saekit library trust."
            raise ConfigError(f"name '{name}'", expected="the name of a trusted key", got=got, fix=fix)
        lines = (read_small(trusted_file(), TRUSTED_FILE_BYTES) or b"").decode().splitlines(keepends=True)
        kept = [line for line in lines if line.split("#")[0].split()[:1] != [name]]
        write_whole(trusted_file(), "".join(kept).encode())
        return known[name]


@contextmanager
def _changing() -> Iterator[None]:
    """One change of the trusted keys at a time."""
    with explained(trusted_file()), locked(trusted_file().parent):
        yield


def change_trust(settings: TrustConfig) -> dict[str, Ed25519PublicKey]:
    """Trust or distrust a key as the config says, and return all that are trusted, by name."""
    if settings.name is not None and settings.remove:
        distrust(settings.name)
    elif settings.name is not None:
        trust(settings.name, parse_public("key", settings.key or ""))
    elif settings.key is not None or settings.remove:
        fix = "Say whose it is: --set name=NAME"
        raise ConfigError("TrustConfig", expected="a name with a key", got="none", fix=fix)
    return trusted_keys()


def _passphrase(file: Path, again: bool = False) -> bytes:
    if secret := os.environ.get(PASSPHRASE):
        return secret.encode()
    if not sys.stdin.isatty():
        fix = f"Set {PASSPHRASE}, or run this on a terminal."
        raise ConfigError(file, expected="a passphrase", got="none", fix=fix)
    secret = getpass.getpass(f"passphrase of {file}: ")
    if not secret or (again and getpass.getpass("once more: ") != secret):
        raise ConfigError(file, expected="the same passphrase twice", got="none, or two", fix="Run it again.")
    return secret.encode()

"""Keys and signatures: the four states, and that none passes for another."""

import base64
import io
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError, CorruptArtefactError, MissingArtefactError, SaekitError
from steer.packs.config import TrustConfig
from steer.packs.keys import (
    change_trust,
    distrust,
    fingerprint,
    load_key,
    make_key,
    parse_public,
    public_text,
    trust,
    trusted_file,
    trusted_keys,
)
from steer.packs.signature import DOMAIN, Signed, check_signature, require_trusted, sign
from tests.steer.packs.packs import FILES, manifest_of

KEY, OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(32))), Ed25519PrivateKey.from_private_bytes(bytes(32))
MANIFEST = manifest_of(FILES)
CONTENT = MANIFEST["content_sha256"]


def state(folder: Path, content: bytes, manifest: dict[str, Any] = MANIFEST) -> Signed:
    """What is thought of a signature.json of that content."""
    (folder / "signature.json").write_bytes(content)
    return check_signature("the pack", folder, manifest, trusted_keys())


def test_the_states(tmp_path: Path) -> None:
    assert str(check_signature("the pack", tmp_path, MANIFEST, {})) == "unsigned"
    signed = sign(CONTENT, KEY)
    print_of = fingerprint(KEY.public_key())
    assert str(state(tmp_path, signed)) == f"signed by an unknown key {print_of}"
    trust("grace", OTHER.public_key())
    assert state(tmp_path, signed) == Signed("unknown key", None, print_of)
    trust("ada", KEY.public_key())
    assert str(state(tmp_path, signed)) == "signed by ada"
    assert str(state(tmp_path, sign(CONTENT, OTHER))) == "signed by grace"
    distrust("ada")
    assert state(tmp_path, signed).state == "unknown key"


def test_a_signature_says_what_it_is(tmp_path: Path) -> None:
    about = json.loads(sign(CONTENT, KEY))
    assert about.keys() == {"algorithm", "public_key", "signature", "signed"}
    assert about["signed"] == CONTENT
    assert sign(CONTENT, KEY) == sign(CONTENT, KEY)
    key = parse_public("here", about["public_key"])
    key.verify(base64.b64decode(about["signature"]), b"saekit-library\n" + bytes.fromhex(CONTENT))


def changed(**changes: Any) -> bytes:
    return json.dumps(json.loads(sign(CONTENT, KEY)) | changes).encode()


OTHERS: dict[str, Any] = json.loads(sign(CONTENT, OTHER))
SAME_KEY_OTHER_CONTENT: dict[str, Any] = json.loads(sign("0" * 64, KEY))


@pytest.mark.parametrize(
    "content",
    [
        changed(public_key=OTHERS["public_key"]),
        changed(signature=OTHERS["signature"]),
        changed(signed="0" * 64),
        changed(signature=SAME_KEY_OTHER_CONTENT["signature"]),
        sign("0" * 64, KEY),
        changed(signature=base64.b64encode(KEY.sign(bytes.fromhex(CONTENT))).decode()),
        changed(signature=base64.b64encode(KEY.sign(DOMAIN + CONTENT.encode())).decode()),
        changed(signature=base64.b64encode(bytes(64)).decode()),
        changed(public_key=base64.b64encode(bytes(31)).decode()),
        changed(algorithm="none"),
        changed(signature=None),
        changed(signature=7),
        changed(public_key=[]),
        changed(note="hello"),
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"[" * 4000,
        b"\xff\xfe",
        b" " * 5000,
    ],
)
def test_what_is_not_a_signature_of_this_content_is_tampered_with(tmp_path: Path, content: bytes) -> None:
    trust("ada", KEY.public_key())
    with pytest.raises(CorruptArtefactError, match="the pack: expected a signature of this content, got tampered: "):
        state(tmp_path, content)


@given(st.data())
def test_any_other_byte_in_a_signature_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """It is tampered with, or, where the byte means nothing to JSON or base64, the same key has still signed it."""
    content = bytearray(sign(CONTENT, KEY))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = state(tmp_path_factory.mktemp("signed"), bytes(content))
    except CorruptArtefactError:
        return
    assert found.fingerprint == fingerprint(KEY.public_key())


def test_a_signature_that_is_wanted() -> None:
    require_trusted("the pack", Signed("signed", "ada", "f"))
    for signed in (Signed("unsigned", None, None), Signed("unknown key", None, "f")):
        with pytest.raises(ConfigError, match=f"signed by a trusted key, got one {signed}"):
            require_trusted("the pack", signed)


def test_a_key_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    public = make_key(tmp_path / "keys" / "my.key")
    assert stat.S_IMODE((tmp_path / "keys" / "my.key").stat().st_mode) == 0o600
    assert load_key(tmp_path / "keys" / "my.key").public_key() == public
    with pytest.raises(ConfigError, match="nothing there yet"):
        make_key(tmp_path / "keys" / "my.key")
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["my.key"]
    for mode in (0o640, 0o604, 0o666):
        (tmp_path / "keys" / "my.key").chmod(mode)
        with pytest.raises(ConfigError, match=f"only its owner may read, got mode {mode:o}"):
            load_key(tmp_path / "keys" / "my.key")


def test_passphrases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_KEY_PASSPHRASE", "hush-hush")
    public = make_key(tmp_path / "my.key")
    assert b"ENCRYPTED" in (tmp_path / "my.key").read_bytes()
    assert load_key(tmp_path / "my.key").public_key() == public
    monkeypatch.setenv("SAEKIT_KEY_PASSPHRASE", "another-one")
    with pytest.raises(ConfigError, match="and its passphrase") as caught:
        load_key(tmp_path / "my.key")
    assert "another-one" not in str(caught.value)
    monkeypatch.delenv("SAEKIT_KEY_PASSPHRASE")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for use in (lambda: load_key(tmp_path / "my.key"), lambda: make_key(tmp_path / "new.key", ask=True)):
        with pytest.raises(ConfigError, match="a passphrase, got none"):
            use()
    typed = iter(["hush-hush", "new", "new", "new", "old", ""])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(typed))
    assert load_key(tmp_path / "my.key").public_key() == public
    make_key(tmp_path / "new.key", ask=True)
    for name in ("two.key", "none.key"):
        with pytest.raises(ConfigError, match="twice"):
            make_key(tmp_path / name, ask=True)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
        b"\xff" * 100,
        bytes(20_000),
        X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    ],
)
def test_what_is_no_key(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEKIT_KEY_PASSPHRASE", "hush")
    (tmp_path / "my.key").touch(mode=0o600)
    (tmp_path / "my.key").write_bytes(content)
    with pytest.raises(SaekitError, match=r"my\.key"):
        load_key(tmp_path / "my.key")
    with pytest.raises(MissingArtefactError, match="a private key"):
        load_key(tmp_path / "none.key")


def test_trust_is_one_name_a_key() -> None:
    ada, grace = KEY.public_key(), OTHER.public_key()
    assert trusted_keys() == {}
    trust("ada", ada)
    trust("ada", ada)
    trust("grace@here", grace)
    assert trusted_keys() == {"ada": ada, "grace@here": grace}
    for name, key in (("ada", grace), ("eve", ada)):
        with pytest.raises(ConfigError, match="Remove it first"):
            trust(name, key)
    for name in ("", "a b", "#a", "-a", "a\nb", "x" * 65):
        with pytest.raises(ConfigError, match="letters, digits"):
            trust(name, Ed25519PrivateKey.generate().public_key())
    assert distrust("ada") == ada
    with pytest.raises(ConfigError, match="grace@here"):
        distrust("ada")
    assert trusted_keys() == {"grace@here": grace}


def test_the_file_of_trusted_keys_is_for_people() -> None:
    trusted_file().parent.mkdir(parents=True)
    trusted_file().write_text(f"# friends\n\n  ada  {public_text(KEY.public_key())} # met in person")
    assert trusted_keys() == {"ada": KEY.public_key()}
    trust("grace", OTHER.public_key())
    distrust("ada")
    assert trusted_file().read_text() == f"# friends\n\ngrace {public_text(OTHER.public_key())}\n"
    for line in (
        "ada",
        "ada AAAA",
        f"ada {public_text(KEY.public_key())} more",
        f"grace {public_text(KEY.public_key())}",
    ):
        trusted_file().write_text(f"grace {public_text(OTHER.public_key())}\n{line}\n")
        with pytest.raises(SaekitError, match="trusted_keys: line 2"):
            trusted_keys()


def test_trust_as_the_verb_has_it(make_pack: Callable[..., Path]) -> None:
    text = public_text(KEY.public_key())
    assert change_trust(TrustConfig(name="ada", key=text)) == {"ada": KEY.public_key()}
    assert change_trust(TrustConfig()) == {"ada": KEY.public_key()}
    assert change_trust(TrustConfig(name="ada", remove=True)) == {}
    for wrong in (
        TrustConfig(key=text),
        TrustConfig(remove=True),
        TrustConfig(name="ada"),
        TrustConfig(name="a", key="x"),
    ):
        with pytest.raises(ConfigError):
            change_trust(wrong)

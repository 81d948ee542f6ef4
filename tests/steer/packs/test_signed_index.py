"""Catalogues that are signed: who vouches for the list is said, and a list that was changed is not believed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activations.errors import ConfigError, CorruptArtefactError
from steer.packs.catalogue import publish_to_catalogue, read_catalogue
from steer.packs.index_file import DOMAIN, index_bytes, parse_index
from steer.packs.install import install
from steer.packs.keys import fingerprint, public_text, trust
from steer.packs.signature import signature_of
from tests.steer.packs.packs import FINGERPRINT, tree

ADA, BOB = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))


@pytest.fixture
def where(make_pack: Callable[..., Path], tmp_path: Path) -> Path:
    publish_to_catalogue(make_pack(), tmp_path / "catalogue", key=ADA)
    return tmp_path / "catalogue"


def change(where: Path, what: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((where / "index.json").read_text())
    what(index)
    (where / "index.json").write_text(json.dumps(index))


def test_the_states(where: Path, make_pack: Callable[..., Path], tmp_path: Path) -> None:
    publish_to_catalogue(make_pack(), tmp_path / "plain")
    assert str(read_catalogue(str(tmp_path / "plain")).signed) == "unsigned"
    assert str(read_catalogue(str(where)).signed) == f"signed by an unknown key {fingerprint(ADA.public_key())}"
    trust("ada", ADA.public_key())
    assert str(read_catalogue(str(where)).signed) == "signed by ada"
    done = install("demo", catalogue=str(where))
    assert (str(done.index_signed), str(done.signed)) == ("signed by ada", "unsigned")
    assert install(str(make_pack())).index_signed is None
    assert read_catalogue(str(where)).packs[0].signer is None, "the pack itself is not"


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a pack left out": lambda index: index["packs"].clear(),
    "a pack put in": lambda index: index["packs"].append(index["packs"][0] | {"version": "9.0.0"}),
    "another file": lambda index: index["packs"][0].update(sha256="0" * 64),
    "another model": lambda index: index["packs"][0]["models"].clear(),
    "another key": lambda index: index["signature"].update(public_key=public_text(BOB.public_key())),
    "one of a pack": lambda index: index["signature"].update(
        signature=signature_of(index["signature"]["signed"], ADA, b"saekit-library\n")["signature"]
    ),
    "one of another index": lambda index: index.update(signature=signature_of("0" * 64, ADA, DOMAIN)),
    "half of one": lambda index: index["signature"].pop("signed"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_tampered_with_and_refused(name: str, where: Path, make_pack: Callable[..., Path]) -> None:
    trust("ada", ADA.public_key())
    change(where, CHANGES[name])
    before = tree(where)
    with pytest.raises(CorruptArtefactError, match=r"index\.json: .* tampered"):
        read_catalogue(str(where))
    with pytest.raises(CorruptArtefactError, match="tampered"):
        install("demo", catalogue=str(where))
    with pytest.raises(CorruptArtefactError, match="tampered"):
        publish_to_catalogue(make_pack("next", version="1.1.0"), where, key=ADA)
    assert tree(where) == before


def test_a_signed_index_is_not_written_without_a_key(where: Path, make_pack: Callable[..., Path]) -> None:
    before = tree(where)
    pack = make_pack("next", version="1.1.0")
    with pytest.raises(ConfigError, match="a key to sign it again with"):
        publish_to_catalogue(pack, where)
    assert not publish_to_catalogue(make_pack(), where).is_new, "nothing would be written"
    assert tree(where) == before
    assert publish_to_catalogue(pack, where, key=BOB).is_new
    packs, signed = read_catalogue(str(where))
    assert ([each.version for each in packs], signed.fingerprint) == (["1.0.0", "1.1.0"], fingerprint(BOB.public_key()))
    assert not publish_to_catalogue(pack, where, key=ADA).is_new
    assert read_catalogue(str(where)).signed.fingerprint == fingerprint(ADA.public_key()), "the same, signed by another"


def test_one_that_was_unsigned_may_be_signed(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    publish_to_catalogue(make_pack(), tmp_path)
    assert not publish_to_catalogue(make_pack(), tmp_path, key=ADA).is_new
    assert read_catalogue(str(tmp_path)).signed.fingerprint == fingerprint(ADA.public_key())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_other_byte_is_noticed_or_says_the_same(data: st.DataObject, where: Path) -> None:
    content = bytearray((where / "index.json").read_bytes())
    packs, _ = parse_index("there", bytes(content), {})
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found, signed = parse_index("there", bytes(content), {})
    except CorruptArtefactError:
        return
    assert found == packs
    assert signed.fingerprint == fingerprint(ADA.public_key())


def test_the_same_index_has_the_same_bytes(where: Path) -> None:
    packs, _ = read_catalogue(str(where))
    assert (where / "index.json").read_bytes() == index_bytes(packs, ADA) != index_bytes(packs, BOB)


def test_a_pack_with_an_sae_alone_says_the_name_of_its_model(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    sae = {"model_id": "org/model", "model_fingerprint": FINGERPRINT}
    publish_to_catalogue(make_pack(sae=sae, vectors=[]), tmp_path)
    (pack,) = read_catalogue(str(tmp_path)).packs
    assert [(model.id, model.fingerprint) for model in pack.models] == [("org/model", FINGERPRINT)]
    with pytest.raises(CorruptArtefactError, match="vectors with their models"):
        publish_to_catalogue(make_pack("old", sae={"model_fingerprint": FINGERPRINT}, vectors=[]), tmp_path)

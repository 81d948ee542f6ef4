"""Catalogues: what is published is found again, nothing is lost, and nothing of an index is believed."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from activations.errors import ConfigError, CorruptArtefactError, MismatchError, MissingArtefactError, UnknownNameError
from steer.packs import catalogue as catalogue_module
from steer.packs.catalogue import find_pack, publish_to_catalogue, read_catalogue, search
from steer.packs.config import PublishConfig
from steer.packs.index_file import IndexedPack, parse_index
from steer.packs.keys import fingerprint, make_key
from steer.packs.names import PackName
from steer.packs.publish import publish
from steer.packs.signature import sign
from tests.steer.packs.packs import FILES, FINGERPRINT, tree, write_pack

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


def test_what_is_published_is_in_the_index(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    where = tmp_path / "catalogue"
    for version in ("1.10.0", "1.9.0", "2.0.0"):
        assert publish_to_catalogue(make_pack(version, version=version), where).is_new
    publish_to_catalogue(make_pack("other", name="another"), where)
    packs, _ = read_catalogue(str(where))
    assert [(pack.name, pack.version) for pack in packs] == [
        ("another", "1.0.0"), ("demo", "1.9.0"), ("demo", "1.10.0"), ("demo", "2.0.0"),
    ]  # fmt: skip
    entry = packs[1]
    assert (entry.file, entry.summary, entry.licence) == ("demo-1.9.0.tar.zst", "moods and places", "Apache-2.0")
    assert (entry.vectors, entry.features, entry.kits) == (["joyful_vs_gloomy"], ["names of rivers"], ["cheer"])
    assert [(model.id, model.fingerprint) for model in entry.models] == [("tiny", FINGERPRINT)]
    assert entry.bytes == (where / entry.file).stat().st_size
    assert find_pack(str(where), packs, PackName("demo", None)).version == "2.0.0"
    assert find_pack(str(where), packs, PackName("demo", "1.9.0")).version == "1.9.0"
    with pytest.raises(UnknownNameError, match=r"version of demo: expected one of 1\.9\.0, 1\.10\.0"):
        find_pack(str(where), packs, PackName("demo", "3.0.0"))
    with pytest.raises(UnknownNameError, match="one of another, demo"):
        find_pack(str(where), packs, PackName("none", None))
    assert {path.name for path in where.iterdir()} == {"index.json", ".lock", *(pack.file for pack in packs)}


def test_two_catalogues_of_the_same_packs_are_the_same(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    packs = [make_pack(version, version=version) for version in ("1.0.0", "1.1.0")]
    for name, order in (("a", packs), ("b", packs[::-1])):
        for pack in order:
            publish_to_catalogue(pack, tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_version_stays_what_it_is(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    where = tmp_path / "catalogue"
    publish_to_catalogue(make_pack(), where)
    before = tree(where)
    assert not publish_to_catalogue(make_pack(), where).is_new
    with pytest.raises(MismatchError, match=r"demo 1\.0\.0: .* other content\. Give the library a higher version"):
        publish_to_catalogue(make_pack("changed", summary="another"), where)
    (tmp_path / "broken").mkdir()
    broken = make_pack("broken", version="2.0.0")
    (broken / "README.md").write_text("other")
    with pytest.raises(CorruptArtefactError):
        publish_to_catalogue(broken, where)
    assert tree(where) == before


def test_a_signature_is_taken_over(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    where, pack = tmp_path / "catalogue", make_pack()
    publish_to_catalogue(pack, where)
    content = json.loads((pack / "manifest.json").read_text())["content_sha256"]
    signed = publish_to_catalogue(pack, where, sign(content, KEY))
    assert not signed.is_new
    assert signed.pack.signer == fingerprint(KEY.public_key())
    assert read_catalogue(str(where)).packs == [signed.pack]
    assert sorted(path.name for path in where.glob("*.zst")) == [signed.pack.file]
    assert publish_to_catalogue(pack, where).pack == signed.pack  # unsigned: the signature stays
    with pytest.raises(CorruptArtefactError, match="tampered"):
        publish_to_catalogue(pack, where, sign("0" * 64, KEY))


def test_an_archive_that_was_lost_is_published_again(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    where, pack = tmp_path / "catalogue", make_pack()
    first = publish_to_catalogue(pack, where).pack
    (where / first.file).write_bytes(b"damaged")
    again = publish_to_catalogue(pack, where).pack
    assert (where / again.file).stat().st_size == again.bytes
    assert again.sha256 == first.sha256


def _publish(pack: Path, where: Path) -> None:
    publish_to_catalogue(pack, where)


def test_publishers_at_once_lose_nothing(
    make_pack: Callable[..., Path], tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    packs = [make_pack(f"p{number}", version=f"1.{number}.0") for number in range(8)]
    processes = [start_process(_publish, pack, tmp_path / "catalogue") for pack in packs]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = read_catalogue(str(tmp_path / "catalogue")).packs
    assert [pack.version for pack in found] == [f"1.{number}.0" for number in range(8)]
    assert list((tmp_path / "catalogue").glob(".partial-*")) == []


def _publish_slowly(pack: Path, where: Path, signs: Path) -> None:
    """Between reading the index and writing it, wait until somebody says go."""
    sync = catalogue_module.sync

    def wait(path: Path) -> None:
        (signs / "inside").touch()
        while not (signs / "go").exists():
            time.sleep(0.01)
        sync(path)

    catalogue_module.sync = wait
    publish_to_catalogue(pack, where)


def test_a_publisher_waits_for_another(
    make_pack: Callable[..., Path], tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    first = start_process(_publish_slowly, make_pack("a"), tmp_path / "catalogue", tmp_path)
    while not (tmp_path / "inside").exists():
        assert first.is_alive()
        time.sleep(0.01)
    second = start_process(_publish, make_pack("b", version="1.1.0"), tmp_path / "catalogue")
    second.join(2)  # without a lock it is done by then, and the first one overwrites its entry
    (tmp_path / "go").touch()
    for process in (first, second):
        process.join(120)
        assert process.exitcode == 0
    assert [pack.version for pack in read_catalogue(str(tmp_path / "catalogue")).packs] == ["1.0.0", "1.1.0"]


STEPS = ("write_archive", "unpack_archive", "_enter", "sync", "write_whole")


def _die_at(step: str, pack: Path, where: Path) -> None:
    setattr(catalogue_module, step, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    publish_to_catalogue(pack, where)


@pytest.mark.parametrize("step", STEPS)
def test_a_publisher_that_is_killed_leaves_the_old_state(
    make_pack: Callable[..., Path], tmp_path: Path, start_process: Callable[..., Any], step: str
) -> None:
    where = tmp_path / "catalogue"
    old = publish_to_catalogue(make_pack(), where).pack
    pack = make_pack("new", version="1.1.0")
    process = start_process(_die_at, step, pack, where)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert read_catalogue(str(where)).packs == [old]
    assert (where / old.file).stat().st_size == old.bytes
    assert publish_to_catalogue(pack, where).is_new
    assert list(where.glob(".partial-*")) == []
    assert [found.version for found in read_catalogue(str(where)).packs] == ["1.0.0", "1.1.0"]


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "name": "demo", "version": "1.0.0", "file": "demo-1.0.0.tar.zst", "bytes": 100, "sha256": "0" * 64,
        "content_sha256": "1" * 64, "summary": "", "licence": "MIT", "models": [{"id": "m", "fingerprint": "ab12"}],
        "vectors": [], "features": [], "kits": [], "signer": None,
    } | changes  # fmt: skip


def test_search() -> None:
    def pack(name: str, **changes: Any) -> IndexedPack:
        return IndexedPack.model_validate(entry(name=name, **changes))

    packs = [
        pack("moods", summary="joy and gloom"),
        pack("moods", version="1.1.0", summary="joy and gloom"),
        pack("moods", version="1.2.0", summary="gloom"),
        pack("joy"),
        pack("rivers", features=["names of Rivers", "JOY"], models=[{"id": "n", "fingerprint": "cd34"}]),
        pack("styles", vectors=["joy@resid_post.3"], kits=["gloom"]),
    ]

    def names(*words: str, model: str | None = None) -> list[str]:
        return [match.pack.name for match in search(packs, words, model)]

    assert names("joy") == ["joy", "styles", "rivers", "moods"]
    assert names("Joy", "gloom") == ["styles", "moods"]
    assert names("rivers") == ["rivers"]
    assert names("nothing") == []
    assert names() == ["joy", "moods", "rivers", "styles"]
    assert names("joy", model="cd") == ["rivers"]
    (moods,) = search(packs, ["moods", "joy"])
    assert (moods.pack.version, moods.versions) == ("1.1.0", ["1.1.0", "1.0.0"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"file": "../evil.tar.zst"}, "packs.0.file"),
        ({"file": "a/b.tar.zst"}, "packs.0.file"),
        ({"file": "http://evil/a.tar.zst"}, "packs.0.file"),
        ({"file": "evil.sh"}, "packs.0.file"),
        ({"name": "../x"}, "packs.0.name"),
        ({"version": "1"}, "packs.0.version"),
        ({"bytes": 2**60}, "packs.0.bytes"),
        ({"bytes": -1}, "packs.0.bytes"),
        ({"bytes": True}, "packs.0.bytes"),
        ({"bytes": "100"}, "packs.0.bytes"),
        ({"sha256": "x"}, "packs.0.sha256"),
        ({"summary": "\x1b[2J"}, "packs.0.summary"),
        ({"summary": "x" * 1001}, "packs.0.summary"),
        ({"features": ["a\nb"]}, "packs.0.features.0"),
        ({"models": [{"id": "m"}]}, "packs.0.models.0.fingerprint"),
        ({"run": "rm -rf /"}, "packs.0.run"),
    ],
)
def test_an_index_that_is_wrong(changes: dict[str, Any], match: str) -> None:
    content = json.dumps({"format": "saekit-catalogue-1", "packs": [entry(**changes)]}).encode()
    with pytest.raises(CorruptArtefactError, match=f"there: expected key '{match}'") as caught:
        parse_index("there", content, {})
    assert "\x1b" not in str(caught.value)


def test_what_is_no_index(tmp_path: Path) -> None:
    twice = {"format": "saekit-catalogue-1", "packs": [entry(), entry(file="b.tar.zst")]}
    others = (b'{"format": "saekit-catalogue-2"}', b'{"format": "saekit-catalogue-1", "packs": {}}')
    for content in (b"", b"[]", b"{", b"[" * 100_000, b"\xff", *others, json.dumps(twice).encode()):
        with pytest.raises(CorruptArtefactError, match=r"^there: "):
            parse_index("there", content, {})
    with pytest.raises(MissingArtefactError, match=r"index\.json"):
        read_catalogue(str(tmp_path))
    with pytest.raises(ConfigError, match="http:// or https://, got ftp"):
        read_catalogue("ftp://somewhere")


def test_publishing_as_the_verb_has_it(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    pack = make_pack()
    make_key(tmp_path / "my.key")
    before = tree(pack)
    done = publish(PublishConfig(library=str(pack), to=str(tmp_path / "c"), key=tmp_path / "my.key"))
    assert done["new"]
    assert done["signer"] is not None
    assert publish(PublishConfig(library=str(pack), to=str(tmp_path / "a.tar.zst")))["bytes"] > 0
    assert tree(pack) == before
    (pack / "signature.json").write_bytes(sign("0" * 64, KEY))
    for place in ("c", "b.tar.zst"):
        with pytest.raises(CorruptArtefactError, match="tampered"):
            publish(PublishConfig(library=str(pack), to=str(tmp_path / place)))
    for to, match in (("http://localhost/", "an address"), ("hub:nobody", "hub:ORG/NAME"), ("ftp://x/y", "ftp")):
        with pytest.raises(ConfigError, match=match):
            publish(PublishConfig(library=str(make_pack("p")), to=to))
    with pytest.raises(ConfigError, match="init"):
        publish(PublishConfig(library=str(write_pack(tmp_path / "u", FILES, version=None)), to=str(tmp_path / "c")))

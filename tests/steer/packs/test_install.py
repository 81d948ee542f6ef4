"""Installing: from everywhere, whole or not at all, and never for another model."""

import functools
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from activations.errors import (
    ConfigError,
    CorruptArtefactError,
    MismatchError,
    MissingArtefactError,
    SaekitError,
    UnknownNameError,
)
from steer.config import AddConfig, InitConfig, MergeConfig
from steer.library import Library, find_vectors, load_library, save_library
from steer.library_edit import add, merge
from steer.library_edit import init as init_library
from steer.making.make import add_to_library
from steer.pack import About
from steer.packs import install as install_module
from steer.packs.archive import write_archive
from steer.packs.catalogue import publish_to_catalogue
from steer.packs.install import install, verify
from steer.packs.installed import installed, resolve, store
from steer.packs.keys import trust
from steer.packs.signature import sign
from steer.receipts.calibrate import calibrate_vector
from steer.receipts.config import CalibrateConfig, KitConfig, ScoreConfig
from steer.receipts.kit import measure_kit
from steer.receipts.score import read_material
from steer.vectors import SteeringVector
from tests.steer.packs.packs import FINGERPRINT, manifest_of, tree, write_pack
from tests.steer.packs.servers import Answer, serving

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OWN = ("judge.jsonl",)
"""files of the test's pack that belong to nobody"""


def pack_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if name not in OWN}


@pytest.fixture
def catalogue(make_pack: Callable[..., Path], tmp_path: Path) -> Path:
    for version in ("1.0.0", "1.1.0"):
        publish_to_catalogue(make_pack(version, version=version), tmp_path / "catalogue")
    return tmp_path / "catalogue"


@pytest.mark.parametrize("way", ["catalogue", "file", "http", "archive", "web archive", "directory"])
def test_every_way_leads_to_the_same(catalogue: Path, tmp_path: Path, way: str, make_pack: Callable[..., Path]) -> None:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(catalogue))
    handler.func.log_message = lambda *arguments: None  # type: ignore[method-assign]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    archive = "demo-1.1.0.tar.zst"
    done = {
        "catalogue": lambda: install("demo", catalogue=str(catalogue)),
        "file": lambda: install("demo@1.1.0", catalogue=f"file://{catalogue}"),
        "http": lambda: install("demo", catalogue=url),
        "archive": lambda: install(str(catalogue / archive)),
        "web archive": lambda: install(f"{url}/{archive}"),
        "directory": lambda: install(str(tmp_path / "1.1.0")),
    }[way]()
    server.shutdown()
    server.server_close()
    assert (done.name, done.version, done.is_new, str(done.signed)) == ("demo", "1.1.0", True, "unsigned")
    assert done.path == store() / "demo" / "1.1.0"
    assert tree(done.path) == pack_of(tmp_path / "1.1.0")
    assert {path.name for path in store().iterdir()} == {".lock", "demo"}
    assert verify("demo").manifest["content_sha256"] == done.content_sha256


def test_what_is_installed_is_found_by_name(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("demo") == Path("demo")
    for version in ("1.1.0", "1.0.0"):
        install(f"demo@{version}", catalogue=str(catalogue))
    assert installed() == {"demo": {version: store() / "demo" / version for version in ("1.0.0", "1.1.0")}}
    assert resolve("demo") == store() / "demo" / "1.1.0"
    assert resolve(Path("demo@1.0.0")) == store() / "demo" / "1.0.0"
    assert resolve("runs/library") == Path("runs/library")
    with pytest.raises(MissingArtefactError, match=r"one of 1\.0\.0, 1\.1\.0, got '3\.0\.0'"):
        resolve("demo@3.0.0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert resolve("demo") == Path("demo")  # a path that is there comes first
    monkeypatch.delenv("SAEKIT_LIBRARIES")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert store() == tmp_path / "data" / "saekit" / "libraries"


def test_a_version_stays_what_it_is(catalogue: Path, make_pack: Callable[..., Path]) -> None:
    first = install("demo", catalogue=str(catalogue))
    before = tree(store())
    assert not install("demo", catalogue=str(catalogue)).is_new
    with pytest.raises(MismatchError, match=r"demo 1\.1\.0: .* other content"):
        install(str(make_pack("changed", version="1.1.0", summary="another")))
    assert tree(store()) == before
    (first.path / "README.md").write_text("damaged")
    assert install("demo", catalogue=str(catalogue)).is_new
    assert tree(store()) == before


def test_a_signature_comes_after(make_pack: Callable[..., Path]) -> None:
    pack = make_pack()
    done = install(str(pack))
    (pack / "signature.json").write_bytes(sign(done.content_sha256, KEY))
    assert str(install(str(pack)).signed).startswith("signed by an unknown key")
    with pytest.raises(ConfigError, match="signed by a trusted key"):
        install(str(pack), require_signature=True)
    trust("ada", KEY.public_key())
    assert str(install(str(pack), require_signature=True).signed) == "signed by ada"
    assert str(verify("demo", require_signature=True).signed) == "signed by ada"
    (pack / "signature.json").write_bytes(sign("0" * 64, KEY))
    with pytest.raises(CorruptArtefactError, match="tampered"):
        install(str(pack))
    with pytest.raises(ConfigError, match="unsigned"):
        install(str(make_pack("two", version="2.0.0")), require_signature=True)
    assert list(installed()["demo"]) == ["1.0.0"]


def test_another_model_is_refused_before_anything_is_downloaded_or_loaded(
    catalogue: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, make_pack: Callable[..., Path]
) -> None:
    read: list[str] = []

    def noted(where: str, limit: int) -> Any:
        read.append(where)
        return iter(())

    monkeypatch.setattr(install_module, "parts_of", noted)
    with pytest.raises(MismatchError, match=f"a pack for the weights [0-9a-f]{{12}}, got tiny {FINGERPRINT[:12]}"):
        install("demo", catalogue=str(catalogue), model=str(tiny_llama))
    assert read == []
    monkeypatch.setattr("steer.library.load_tensors", lambda content: pytest.fail("tensors were read"))
    for pack in (str(catalogue / "demo-1.1.0.tar.zst"), str(make_pack("p")), str(make_pack("none", vectors=[]))):
        for use in (install, verify):
            with pytest.raises(MismatchError, match="a pack for the weights"):
                use(pack, model=str(tiny_llama))
    assert installed() == {}


def test_an_index_that_lies_about_the_model_is_found_out(
    catalogue: Path, tiny_llama: Path, make_pack: Callable[..., Path]
) -> None:
    from activations.models import load_model, weight_fingerprint

    fingerprint = weight_fingerprint(str(tiny_llama))
    assert fingerprint == load_model(str(tiny_llama)).fingerprint
    index = catalogue / "index.json"
    index.write_text(index.read_text().replace(FINGERPRINT, fingerprint))
    with pytest.raises(MismatchError, match="a pack for the weights"):
        install("demo", catalogue=str(catalogue), model=str(tiny_llama))
    model = {"id": "tiny", "fingerprint": fingerprint, "n_layers": 4, "d_model": 32}
    right = make_pack("right", version="3.0.0", vectors=[{"name": "v", "model": model}])
    assert install(str(right), model=str(tiny_llama)).is_new
    assert verify("demo@3.0.0", model=str(tiny_llama)).signed.state == "unsigned"


def test_an_archive_that_the_index_does_not_mean(
    catalogue: Path, make_pack: Callable[..., Path], tmp_path: Path
) -> None:
    archive = catalogue / "demo-1.1.0.tar.zst"
    intact, index = archive.read_bytes(), (catalogue / "index.json").read_text()
    for content, match in [
        (intact[:-1] + bytes([intact[-1] ^ 1]), "the archive that the index names"),
        (intact[:-1], "the archive that the index names"),
        (intact + b"1", "at most"),
        (b"", "the archive that the index names"),
    ]:
        archive.write_bytes(content)
        with pytest.raises(CorruptArtefactError, match=match):
            install("demo", catalogue=str(catalogue))
    archive.unlink()
    with pytest.raises(MissingArtefactError):
        install("demo", catalogue=str(catalogue))
    archive.write_bytes(intact)
    (catalogue / "index.json").write_text(index.replace('"version": "1.1.0"', '"version": "1.2.0"'))
    with pytest.raises(CorruptArtefactError, match="the pack that the index names"):
        install("demo", catalogue=str(catalogue))
    (catalogue / "index.json").write_text(index.replace('"name": "demo"', '"name": "other"'))
    with pytest.raises(CorruptArtefactError, match="the pack that the index names"):
        install("other", catalogue=str(catalogue))
    assert tree(store()) == {".lock": b""}


def test_a_server_that_sends_something_else(catalogue: Path) -> None:
    def handled(answer: Answer, path: str) -> None:
        if path.endswith("index.json"):
            answer.send(200, (catalogue / "index.json").read_bytes())
        else:
            answer.send(200, b"1" * 100_000, Content_Length="")

    with serving(handled) as server:
        with pytest.raises(CorruptArtefactError, match="at most"):
            install("demo", catalogue=server.url)
        with pytest.raises(CorruptArtefactError, match="no zstd"):
            install(f"{server.url}/x")
    assert tree(store()) == {".lock": b""}


def test_what_cannot_be_installed(catalogue: Path, make_pack: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for pack, kind, match in [
        ("none", ConfigError, "NAME"),
        ("demo", ConfigError, "catalogue="),
        ("../x", ConfigError, "nothing there"),
        (str(tmp_path / "none.tar.zst"), MissingArtefactError, "an archive"),
        (str(tmp_path / "empty"), MissingArtefactError, "manifest"),
        ("ftp://h/x", ConfigError, "ftp"),
        ("hub:x", ConfigError, "hub:ORG/NAME"),
        (str(make_pack("u", version=None)), ConfigError, "init"),
        (str(make_pack("v", name="../../evil")), CorruptArtefactError, "says what it is, got name: "),
        (str(make_pack("w", version="../evil")), CorruptArtefactError, "says what it is, got version: "),
    ]:
        with pytest.raises(kind, match=match) as caught:
            install(pack)
        assert "\n" not in str(caught.value)
    with pytest.raises(UnknownNameError):
        install("none", catalogue=str(catalogue))
    linked = make_pack("linked")
    shutil.move(linked / "README.md", tmp_path / "secret")
    (linked / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(SaekitError, match="README"):
        install(str(linked))
    assert tree(store()) == {".lock": b""}


def test_verify_compares_every_file(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    pack = make_pack()
    write_archive(pack, tmp_path / "a.tar.zst")
    assert verify(str(tmp_path / "a.tar.zst")) == verify(str(pack))
    for name in manifest_of({"x": b""})["files"].keys() | pack_of(pack).keys() - {"manifest.json", "x"}:
        if name == "x":
            continue
        broken = write_pack(tmp_path / "broken")
        (broken / name).write_bytes((broken / name).read_bytes()[:-1] + b"?")
        with pytest.raises(CorruptArtefactError, match="broken"):
            verify(str(broken))
    with pytest.raises(MissingArtefactError):
        verify("nothing")


STEPS = ("write_hashed", "unpack_archive", "check_signature", "_put", "place")


def _die_at(step: str, catalogue: Path) -> None:
    kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    if step == "unpack_archive":  # in the middle of it
        import steer.packs.archive as module

        module.check_room = lambda *arguments: kill()
    else:
        setattr(install_module, step, lambda *arguments, **more: kill())
    install("demo", catalogue=str(catalogue))


@pytest.mark.parametrize("step", STEPS)
def test_an_installation_that_is_killed_leaves_the_old_state(
    catalogue: Path, start_process: Callable[..., Any], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = install("demo@1.0.0", catalogue=str(catalogue))
    before = tree(old.path)
    process = start_process(_in_store, store(), _die_at, step, catalogue)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(store().glob(".partial-*"))) == 1
    assert installed() == {"demo": {"1.0.0": old.path}}
    assert tree(old.path) == before
    assert install("demo", catalogue=str(catalogue)).is_new
    assert list(store().glob(".partial-*")) == []


def _in_store(path: Path, function: Callable[..., None], *arguments: Any) -> None:
    os.environ["SAEKIT_LIBRARIES"] = str(path)
    function(*arguments)


def _install(catalogue: Path, version: str) -> None:
    install(f"demo@{version}", catalogue=str(catalogue))


def test_installations_at_once(catalogue: Path, start_process: Callable[..., Any]) -> None:
    processes = [start_process(_in_store, store(), _install, catalogue, version) for version in ("1.0.0", "1.1.0") * 3]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert list(installed()["demo"]) == ["1.0.0", "1.1.0"]
    assert {path.name for path in store().iterdir()} == {".lock", "demo"}


@pytest.fixture
def installed_vectors(tiny_llama: Path, tmp_path: Path, vector: SteeringVector) -> Path:
    """A library with one vector that is installed as `moods`, version 1.0.0, and is nowhere else."""
    library = Library({"up": vector}, About(name="moods", version="1.0.0"))
    library.save(tmp_path / "moods-source")
    done = install(str(tmp_path / "moods-source"), model=str(tiny_llama))
    shutil.rmtree(tmp_path / "moods-source")
    return done.path


def test_a_library_is_read_by_its_name(installed_vectors: Path, vector: SteeringVector) -> None:
    for name in ("moods", "moods@1.0.0", Path("moods"), installed_vectors):
        np.testing.assert_array_equal(load_library(name)["up"].direction, vector.direction)
        assert find_vectors(name, "up")[0].name == "up"


def test_what_is_installed_is_not_written(installed_vectors: Path, vector: SteeringVector, tmp_path: Path) -> None:
    before = tree(store())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for path in (Path("moods"), Path("moods@1.0.0"), installed_vectors, store() / "new" / "1.0.0"):
            for write in (save_library, lambda path, vectors: add_to_library(path, *vectors)):
                with pytest.raises(ConfigError, match=r"a library of your own .*Copy .*moods|new"):
                    write(path, [vector])
        moods = Path("moods")
        writers: list[Callable[[], Any]] = [  # refused before anything is loaded or measured
            lambda: calibrate_vector(CalibrateConfig(library=moods)),
            lambda: read_material(ScoreConfig(library=moods)),
            lambda: measure_kit(KitConfig(library=moods, kit="cheer")),
            lambda: init_library(InitConfig(library=moods, version="1.0.1")),
            lambda: add(AddConfig(library=moods, sae=Path("none"))),
            lambda: merge(MergeConfig(libraries=(moods, moods), out=moods)),
        ]
        for run in writers:
            with pytest.raises(ConfigError, match="a library of your own"):
                run()
        assert not (tmp_path / "moods").exists()
    assert tree(store()) == before


def test_a_library_that_changes_loses_its_signature(vector: SteeringVector, tmp_path: Path) -> None:
    library = Library({"up": vector}, About(name="moods", version="1.0.0"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "signature.json").write_bytes(sign(library.save(tmp_path / "own"), KEY))
    assert verify(str(tmp_path / "own")).signed.state == "unknown key"
    save_library(tmp_path / "own", [replace(vector, name="down")])
    assert verify(str(tmp_path / "own")).signed.state == "unsigned"

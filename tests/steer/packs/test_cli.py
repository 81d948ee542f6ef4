"""The verbs of `saekit library` that move packs, as they are typed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steer.cli import main
from steer.packs.installed import store
from tests.steer.packs.packs import FINGERPRINT, tree

Saekit = Callable[..., Any]


@pytest.fixture
def saekit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Saekit:
    """Run `saekit library ...`: what it printed as JSON, or, of an error, its one line."""

    def run(*arguments: str, code: int = 0, as_json: bool = True) -> Any:
        monkeypatch.setattr(sys, "argv", ["saekit", "library", *arguments, *(["--json"] if as_json else [])])
        try:
            main()
            left = 0
        except SystemExit as stop:
            left = stop.code or 0
        out, err = capsys.readouterr()
        assert left == code, err
        if code:
            assert out == ""
            assert err.count("\n") == 1
            return err
        return json.loads(out) if as_json else out

    return run


def test_from_a_key_to_an_installed_pack(saekit: Saekit, make_pack: Callable[..., Path], tmp_path: Path) -> None:
    key, where = saekit("key", "--set", f"out={tmp_path}/ada.key"), str(tmp_path / "catalogue")
    to = ("--set", f"to={where}")
    done = saekit("publish", "--set", f"library={make_pack()}", *to, "--set", f"key={tmp_path}/ada.key")
    assert done["signer"] == key["fingerprint"]
    found = saekit("search", "joyful", "rivers", "--set", f"catalogue={where}", "--set", f"model={FINGERPRINT[:12]}")
    assert found["found"]["demo"]["signer"] == key["fingerprint"]
    assert saekit("search", "nothing", "--set", f"catalogue={where}")["found"] == {}
    listed = saekit("list", "--set", f"catalogue={where}")
    assert list(listed["packs"]) == ["demo@1.0.0"]
    assert listed["index"] == found["index"] == f"signed by an unknown key {key['fingerprint']}"
    got = ("install", "demo", "--set", f"catalogue={where}", "--set", "require_signature=true")
    assert key["fingerprint"] in saekit(*got, code=1)
    trusted = saekit("trust", "--set", "name=ada", "--set", f"key={key['public_key']}")
    assert trusted["trusted"] == {"ada": {"fingerprint": key["fingerprint"], "public_key": key["public_key"]}}
    done = saekit(*got)
    assert done["signed"] == done["index_signed"] == "signed by ada"
    assert saekit("list")["packs"]["demo@1.0.0"]["signed"] == "signed by ada"
    assert saekit("verify", "demo")["signed"] == "signed by ada"
    assert "signed by ada" in saekit("list", as_json=False)
    assert "moods and places" in saekit("list", "--set", f"catalogue={where}", as_json=False)
    (store() / "demo" / "1.0.0" / "README.md").write_text("# A pacK\n")
    assert "demo/1.0.0" in saekit("verify", "demo", code=1)


def test_what_is_tampered_with_is_an_error(saekit: Saekit, make_pack: Callable[..., Path], tmp_path: Path) -> None:
    pack = make_pack()
    saekit("key", "--set", f"out={tmp_path}/ada.key")
    archive = tmp_path / "demo.tar.zst"
    saekit("publish", "--set", f"library={pack}", "--set", f"to={archive}", "--set", f"key={tmp_path}/ada.key")
    other = saekit("install", str(archive))["path"]
    (pack / "signature.json").write_bytes((Path(other) / "signature.json").read_bytes())
    assert saekit("verify", str(pack))["signed"].startswith("signed by an unknown key")
    changed = make_pack("changed", summary="another")
    (changed / "signature.json").write_bytes((pack / "signature.json").read_bytes())
    for verb in ("verify", "install"):
        assert "tampered" in saekit(verb, str(changed), code=1)
    archive.write_bytes(archive.read_bytes()[:-1])
    assert "expected a file of" in saekit("verify", str(archive), code=1)


@pytest.mark.parametrize("verb", ["publish", "install", "search", "verify", "key", "trust", "list"])
def test_a_dry_run_leaves_everything_as_it_is(saekit: Saekit, tmp_path: Path, verb: str) -> None:
    assert saekit(verb, "--dry-run")["config"]
    assert tree(tmp_path) == {}


def test_a_pack_is_removed(saekit: Saekit, make_pack: Callable[..., Path]) -> None:
    saekit("install", str(make_pack()))
    path = str(store() / "demo" / "1.0.0")
    assert saekit("remove", "demo", "--dry-run")["path"] == path
    assert list(saekit("list")["packs"]) == ["demo@1.0.0"]
    assert saekit("remove", "demo@1.0.0") == {"name": "demo", "version": "1.0.0", "path": path}
    assert saekit("list")["packs"] == {}
    assert "something installed" in saekit("remove", "demo", code=1)

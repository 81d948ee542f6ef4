"""Removing what is installed: it is gone, nothing else is, and saekit's own stays."""

from collections.abc import Callable
from pathlib import Path

import pytest

from activations.errors import ConfigError, UnknownNameError
from steer.packs import installed
from steer.packs.install import install
from steer.packs.installed import resolve, store, versions
from steer.packs.remove import Removed, remove
from tests.steer.packs.packs import tree, write_pack


@pytest.fixture
def three(make_pack: Callable[..., Path]) -> None:
    for version in ("1.0.0", "1.10.0"):
        install(str(make_pack(version, version=version)))
    install(str(make_pack("other", name="another")))


def test_a_version_is_gone_and_the_others_are_as_they_were(three: None) -> None:
    before = tree(store() / "demo" / "1.0.0"), tree(store() / "another")
    assert remove("demo@1.10.0") == Removed("demo", "1.10.0", store() / "demo" / "1.10.0")
    assert list(versions("demo")) == ["1.0.0"]
    assert resolve("demo") == store() / "demo" / "1.0.0"
    assert (tree(store() / "demo" / "1.0.0"), tree(store() / "another")) == before
    assert remove("demo").version == "1.0.0"
    assert {path.name for path in store().iterdir()} == {".lock", "another"}


def test_what_is_not_clear_or_not_there_is_refused(three: None) -> None:
    before = tree(store())
    with pytest.raises(ConfigError, match=r"one version, got 1\.0\.0, 1\.10\.0\. Say which, as in demo@1\.10\.0"):
        remove("demo")
    with pytest.raises(UnknownNameError, match=r"one of 1\.0\.0, 1\.10\.0"):
        remove("demo@2.0.0")
    with pytest.raises(UnknownNameError, match="one of another, demo"):
        remove("nothing")
    for name in ("../another", "demo/1.0.0", "demo@1", "..", str(store() / "demo")):
        with pytest.raises(ConfigError, match="NAME or NAME@VERSION"):
            remove(name)
    assert tree(store()) == before


def test_what_comes_with_saekit_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "SHIPPED", tmp_path / "shipped")
    shipped = write_pack(tmp_path / "shipped" / "demo" / "1.0.0")
    for name in ("demo", "demo@1.0.0"):
        with pytest.raises(ConfigError, match="one of saekit's own"):
            remove(name)
    assert not store().exists()
    install(str(write_pack(tmp_path / "newer", version="1.1.0")))
    assert remove("demo").version == "1.1.0"
    assert resolve("demo") == shipped


def test_what_is_damaged_goes_and_what_a_link_leads_to_stays(three: None, tmp_path: Path) -> None:
    (store() / "demo" / "1.0.0" / "manifest.json").unlink()
    assert remove("demo@1.0.0").version == "1.0.0"
    mine = write_pack(tmp_path / "mine")
    (store() / "another" / "2.0.0").symlink_to(mine)
    before = tree(mine)
    remove("another@2.0.0")
    assert list(versions("another")) == ["1.0.0"]
    assert tree(mine) == before

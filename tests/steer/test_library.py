"""Libraries: what was saved is loaded, and nothing else is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError, CorruptArtefactError, MissingArtefactError, StorageError, UnknownNameError
from activations.store_schema import ModelRef
from steer.library import find_vector, find_vectors, load_library, save_library
from steer.vectors import Reader, SteeringVector

RECEIPT = {"effect": 0.5, "random_control_effect": 0.0, "kl": 0.25, "examples": [{"prompt": "a"}]}


@given(st.integers(1, 64), st.integers(0, 2**32 - 1), st.floats(-1e6, 1e6), st.text(min_size=1))
def test_round_trip(tmp_path_factory, d_model: int, seed: int, coefficient: float, name: str) -> None:
    path = tmp_path_factory.mktemp("library")
    direction = np.random.default_rng(seed).standard_normal(d_model).astype(np.float32)
    model = ModelRef(id="m", fingerprint="f", n_layers=3, d_model=d_model)
    vector = SteeringVector(name, direction, "resid_post.1", model, 2.0, {"kind": "latent"}, coefficient, [RECEIPT])
    save_library(path, [vector])
    (loaded,) = load_library(path).values()
    np.testing.assert_array_equal(loaded.direction, direction)
    shared = {key: value for key, value in vars(loaded).items() if key != "direction"}
    assert shared == {key: value for key, value in vars(vector).items() if key != "direction"}


def test_a_reader_comes_back(tmp_path: Path, vector: SteeringVector) -> None:
    reader = Reader(np.flip(vector.direction), "resid_post.2", 0.25)
    save_library(tmp_path, [replace(vector, reader=reader), replace(vector, name="plain")])
    found = load_library(tmp_path)
    again = found["up"].reader
    assert again is not None
    np.testing.assert_array_equal(again.direction, reader.direction)
    assert (again.hook_point, again.midpoint) == ("resid_post.2", 0.25)
    assert found["plain"].reader is None
    save_library(tmp_path, [replace(vector, reader=replace(reader, direction=np.ones(31, np.float32)))])
    with pytest.raises(CorruptArtefactError, match="direction"):
        load_library(tmp_path)
    with pytest.raises(ConfigError, match="names of its own"):
        save_library(tmp_path / "other", [replace(vector, name="up/reader"), replace(vector, reader=reader)])


@pytest.fixture
def library(tmp_path: Path, vector: SteeringVector) -> Path:
    save_library(tmp_path, [replace(vector, coefficient=2.0, receipts=[RECEIPT])])
    return tmp_path


def test_the_card_tells_what_was_measured(library: Path) -> None:
    card = (library / "README.md").read_text()
    assert "| up |" in card
    assert "+0.500" in card
    assert "0.50" in card


def test_the_card_takes_each_figure_from_the_newest_receipt_at_the_vectors_coefficient(
    tmp_path: Path, vector: SteeringVector
) -> None:
    scored = {"kind": "score", "capability": {"steered": {"accuracy_change": -0.0625}}, "kl": 0.5}
    receipts = [
        {**RECEIPT, "coefficient": 2.0},
        {**scored, "coefficient": 2.0},
        {"coefficient": 3.0, "effect": 0.9, "kl": 9.0},
    ]
    save_library(tmp_path, [replace(vector, coefficient=2.0, window=(1.5, 2.5), receipts=receipts)])
    (line,) = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| up")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[5:] == ["-", "2", "1.5 to 2.5", "0.50", "+0.500", "+0.000", "+0.500", "-0.062", "-", "-"]


@pytest.mark.parametrize("window", [None, (1.0, 2.5), (-3.0, -1.0)])
def test_a_window_is_kept(tmp_path: Path, vector: SteeringVector, window: tuple[float, float] | None) -> None:
    save_library(tmp_path, [replace(vector, window=window)])
    assert load_library(tmp_path)["up"].window == window


@pytest.mark.parametrize("window", [(2.0, 1.0), (1.0, float("inf"))])
def test_a_bad_window_is_refused(tmp_path: Path, vector: SteeringVector, window: Any) -> None:
    save_library(tmp_path, [replace(vector, window=window)])
    with pytest.raises(CorruptArtefactError):
        load_library(tmp_path)


@pytest.mark.parametrize("key", ["coefficient", "mean_norm", "hook_point"])
def test_a_changed_manifest_is_refused(library: Path, key: str) -> None:
    path = library / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["vectors"][0][key] = 99
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtefactError, match="hash"):
        load_library(library)


def test_changed_vectors_are_refused(library: Path) -> None:
    path = library / "vectors.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtefactError, match="hash"):
        load_library(library)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "saekit-library-4"}'])
def test_other_manifests_are_refused(library: Path, content: str) -> None:
    (library / "manifest.json").write_text(content)
    with pytest.raises(CorruptArtefactError):
        load_library(library)


@pytest.mark.parametrize("bad", [np.full(32, np.nan, np.float32), np.ones(31, np.float32)])
def test_a_bad_direction_is_refused(tmp_path: Path, vector: SteeringVector, bad: np.ndarray) -> None:
    save_library(tmp_path, [replace(vector, direction=bad)])
    with pytest.raises(CorruptArtefactError, match="direction"):
        load_library(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match=r"manifest\.json"):
        load_library(tmp_path / "none")


def test_an_unknown_vector_lists_those_there_are(library: Path) -> None:
    assert find_vector(library, "up").coefficient == 2.0
    with pytest.raises(UnknownNameError, match="up"):
        find_vector(library, "down")


def test_vectors_that_belong_together_are_found_by_one_name(tmp_path: Path, vector: SteeringVector) -> None:
    parts = [replace(vector, name=f"tone@resid_post.{layer}", hook_point=f"resid_post.{layer}") for layer in (10, 2, 1)]
    save_library(tmp_path, [vector, *parts, replace(vector, name="tones@resid_post.0")])
    assert [each.hook_point for each in find_vectors(tmp_path, "tone")] == [f"resid_post.{i}" for i in (1, 2, 10)]
    assert [each.name for each in find_vectors(tmp_path, "up")] == ["up"]
    save_library(tmp_path, parts)
    assert len(find_vectors(tmp_path, None)) == 3
    save_library(tmp_path, [*parts, replace(vector, name="tone")])
    assert [each.name for each in find_vectors(tmp_path, "tone")] == ["tone"]
    with pytest.raises(UnknownNameError, match="tone"):
        find_vectors(tmp_path, "ton")


def test_a_library_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(StorageError, match="can be read"):
        load_library(tmp_path)

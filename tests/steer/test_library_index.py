"""The features of a library as an index: what a browser shows of them, and what is kept beside it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from activations.errors import CorruptArtefactError
from sae.index_db import FeatureIndex
from sae.labels.store import LabelStore, NewLabel
from sae.latent_query import LatentQuery, order_of
from steer.browser.sources import open_paths
from steer.library import Library
from steer.library_index import index_of_library
from steer.manifest import content_hash, read_manifest
from steer.pack import Example, Feature, Label, SaeRef
from steer.vectors import SteeringVector

SAE_OF = SaeRef(
    sha256="a" * 64, architecture="jumprelu", d_model=32, d_sae=64, hook_point="resid_post.1", model_id="tiny",
    model_fingerprint="f", n_layers=4,
)  # fmt: skip
RIVER = Feature(
    latent=7, label="rivers", author="ada", density=0.01, max_activation=2.5, mean_activation=1.0, histogram=[3, 1],
    histogram_start=2, output_score=0.5, top_logits=[(" water", 1.0)],
    examples=[Example(tokens=["the", " river", "↵"], activations=[0.0, 2.5, 0.5])],
    history=[Label(text="water", author="bob", created="2026-01-01T00:00:00+00:00", kind="explanation")],
)  # fmt: skip


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def library(tmp_path: Path, vector: SteeringVector) -> Path:
    other = RIVER.model_copy(update={"latent": 3, "label": "mills", "history": []})
    Library({"up": vector}, features=[RIVER, other], sae=SAE_OF).save(tmp_path / "library")
    return tmp_path / "library"


def test_a_feature_is_a_latent_with_its_texts_and_labels(library: Path, data_home: Path) -> None:
    folder = index_of_library(library)
    assert folder is not None
    assert folder.is_relative_to(data_home)
    index = FeatureIndex.open(folder)
    row = index.latent(7)
    assert (row.density, row.max_activation, row.histogram, row.output_score) == (0.01, 2.5, [3, 1], 0.5)
    assert row.top_logits == [(" water", 1.0)]
    (context,) = row.contexts
    assert index.token_texts(context.tokens) == ["the", " river", "↵"]
    np.testing.assert_allclose(context.activations, [0.0, 2.5, 0.5])
    assert (context.peak, context.score) == (1, 2.5)
    assert {(label.author, label.text) for label in index.labels(7)} == {("bob", "water"), ("ada", "rivers")}
    assert index.search("mills") == [3]
    index.close()


def test_a_list_shows_no_other_latents(library: Path) -> None:
    folder = index_of_library(library)
    assert folder is not None
    index = FeatureIndex.open(folder)
    assert order_of(index.columns(), LatentQuery()).tolist() == [3, 7]
    assert index.info["d_sae"] == 64
    index.close()


def test_what_people_write_stays_when_the_library_changes(library: Path) -> None:
    folder = index_of_library(library)
    assert folder is not None
    with LabelStore.open(folder, SAE_OF.sha256) as store:
        store.add_label(NewLabel(7, "explanation", "streams", "eve"))
    found = Library.open(library)
    replace(found, features=[RIVER.model_copy(update={"density": 0.5})]).save(library)
    assert index_of_library(library) == folder
    index = FeatureIndex.open(folder)
    assert index.latent(7).density == 0.5
    assert "streams" in {label.text for label in index.labels(7)}
    index.close()


def test_nothing_is_written_twice(library: Path) -> None:
    folder = index_of_library(library)
    assert folder is not None
    before = (folder / "index.sqlite").stat().st_mtime_ns
    assert index_of_library(library) == folder
    assert (folder / "index.sqlite").stat().st_mtime_ns == before


def test_a_browser_opens_them_unless_it_has_the_whole_index(library: Path, tmp_path: Path) -> None:
    opened = open_paths([library])
    assert list(opened.sources) == ["resid_post.1"]
    assert opened.libraries == (library,)
    opened.close()
    whole = index_of_library(library)
    assert whole is not None
    opened = open_paths([library, whole])
    assert [source.path for source in opened.sources.values()] == [whole]
    opened.close()


def test_a_library_without_features_has_no_index(tmp_path: Path, vector: SteeringVector) -> None:
    Library({"up": vector}).save(tmp_path / "plain")
    assert index_of_library(tmp_path / "plain") is None
    assert open_paths([tmp_path / "plain"]).sources == {}


@pytest.mark.parametrize("change", [{"d_sae": 5}, {"n_layers": None}, {"sha256": "x"}])
def test_features_that_its_sae_cannot_have_are_one_error(library: Path, change: dict[str, object]) -> None:
    manifest = read_manifest(library)
    manifest["sae"] |= change
    manifest["content_sha256"] = content_hash(manifest)
    (library / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtefactError):
        index_of_library(library)
    assert open_paths([library]).sources == {}, "its vectors are shown, and the bench tells what is wrong"

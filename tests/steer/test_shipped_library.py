"""The library that comes with saekit: whole, small enough, and measured."""

import pytest

from sae.artefact import SaeArtefact
from steer.library import Library
from steer.manifest import SAE, read_manifest, verify_files
from steer.packs.installed import SHIPPED, resolve

NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def library() -> Library:
    return Library.open(SHIPPED / NAME / "1.0.0")


def test_every_file_is_what_the_manifest_says_and_all_are_small() -> None:
    path = resolve(NAME)
    manifest = read_manifest(path)
    verify_files(path, manifest)
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 25_000_000
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == {
        "manifest.json", *manifest["files"],
    }  # fmt: skip


def test_its_sae_is_the_one_of_its_features_and_vectors(library: Library) -> None:
    artefact = SaeArtefact.load(SHIPPED / NAME / "1.0.0" / SAE)
    assert library.sae is not None
    assert artefact.sha256 == library.sae.sha256
    assert artefact.d_sae >= 9000
    of_latents = [vector for vector in library.vectors.values() if vector.source["kind"] == "latent"]
    assert {vector.source["sae_sha256"] for vector in of_latents} == {artefact.sha256}


def test_everything_was_measured(library: Library) -> None:
    steering = [feature for feature in library.features if feature.vector is not None]
    assert len(steering) >= 50
    assert all(feature.label and feature.history and feature.examples for feature in library.features)
    for vector in library.vectors.values():
        assert vector.receipts, vector.name
    for feature in steering:
        receipt = library.vectors[feature.vector or ""].receipts[-1]
        assert receipt["effect_ci95"][0] > 0
    assert all(kit.receipts for kit in library.kits)

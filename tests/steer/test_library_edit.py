"""Libraries as a whole: named, filled, joined, compared, and finished where a saving was stopped."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.errors import ConfigError, CorruptArtefactError, MismatchError, MissingArtefactError, UnknownNameError
from sae.artefact import SaeArtefact
from steer.config import AddConfig, InitConfig, MergeConfig
from steer.library import Library, find_vectors, load_library, save_library
from steer.library_edit import add, difference, init, merge, shown
from steer.manifest import content_hash, read_manifest, verify_files
from steer.pack import About, Example, Feature, FileRef, Kit, SaeRef
from steer.vectors import SteeringVector

SAE_OF = SaeRef(
    sha256="a" * 64,
    architecture="jumprelu",
    d_model=32,
    d_sae=64,
    hook_point="resid_post.1",
    model_id="tiny",
    model_fingerprint="f",
    n_layers=4,
)


def feature(latent: int, **changes: Any) -> Feature:
    example = Example(tokens=["a", " river"], activations=[0.0, 2.5])
    values = {"label": "rivers", "author": "ada", "density": 0.01, "max_activation": 2.5, "examples": [example]}
    return Feature(latent=latent, **values | changes)


@pytest.fixture
def tiny_sae(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    enc, dec = rng.standard_normal((2, 8, 32)).astype(np.float32) / 6
    metadata = {"hook_point": "resid_post.1", "model": {"id": "tiny", "fingerprint": "f"}, "metrics": {"fvu": 0.2}}
    SaeArtefact("topk", np.ascontiguousarray(enc.T), np.zeros(8, np.float32), dec, np.zeros(32, np.float32), k=2,
                metadata=metadata).save(tmp_path / "sae")  # fmt: skip
    return tmp_path / "sae"


@pytest.fixture
def library(tmp_path: Path, vector: SteeringVector) -> Path:
    made = {
        "up": replace(vector, coefficient=2.0),
        "tone@resid_post.1": replace(vector, name="tone@resid_post.1", coefficient=1.0),
        "tone@resid_post.2": replace(vector, name="tone@resid_post.2", hook_point="resid_post.2", coefficient=3.0),
    }
    kit = Kit(name="both", vectors={"up": 0.5, "tone": -1.0})
    Library(made, About(name="rivers", version="1.0.0"), [feature(3)], [kit], SAE_OF).save(tmp_path / "library")
    return tmp_path / "library"


def test_all_of_it_comes_back_and_the_same_content_has_the_same_bytes(library: Path, tmp_path: Path) -> None:
    found = Library.open(library)
    assert (found.about.name, found.about.version, found.sae) == ("rivers", "1.0.0", SAE_OF)
    assert found.features == [feature(3)]
    found.save(tmp_path / "other")
    for name in ("manifest.json", "vectors.safetensors", "README.md"):
        assert (tmp_path / "other" / name).read_bytes() == (library / name).read_bytes()


def test_one_hash_covers_every_file(library: Path) -> None:
    manifest = read_manifest(library)
    verify_files(library, manifest)
    (library / "README.md").write_text("Buy this.")
    with pytest.raises(CorruptArtefactError, match=r"README\.md that does not match"):
        verify_files(library, manifest)
    changed = manifest | {"about": manifest["about"] | {"licence": "MIT"}}
    assert content_hash(changed) != manifest["content_sha256"]


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("about", {"name": "../x"}), ("about", {"version": "1"}), ("about", {"evil": 1}), ("about", None),
        ("features", [{"latent": -1}]), ("features", {}), ("kits", [{"name": "k", "vectors": {}}]), ("kits", 3),
        ("kits", [{"name": "k", "vectors": {"k": 1.0}}]), ("kits", [{"name": "up", "vectors": {"up": 1.0}}]),
        ("features", [feature(3).model_dump(mode="json")] * 2), ("sae", None),
        ("sae", {"sha256": "short"}), ("files", {"../x": {"bytes": 1, "sha256": "a" * 64}}), ("files", []),
        ("files", {"a/b/c/d.txt": {"bytes": 1, "sha256": "a" * 64}}), ("files", {"CON.": {"bytes": 1}}), ("files", {}),
        ("files", {"vectors.safetensors": {"bytes": -1, "sha256": "a" * 64}}), ("vectors", [3]), ("vectors", None),
    ],
)  # fmt: skip
def test_a_manifest_that_was_tampered_with_is_one_error(library: Path, key: str, bad: Any) -> None:
    """By someone who also made the hash right."""
    manifest = read_manifest(library) | {key: bad}
    manifest["content_sha256"] = content_hash(manifest)
    (library / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtefactError):
        Library.open(library)


@pytest.mark.parametrize(
    "bad",
    [{"tokens": [], "activations": []}, {"tokens": ["a"], "activations": []}, {"activations": [float("nan")] * 2}],
)
def test_an_example_has_a_number_for_each_token(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="activations"):
        Example.model_validate({"tokens": ["a", "b"], "activations": [0.0, 1.0]} | bad)


def test_a_kit_is_its_vectors_at_its_factors(library: Path) -> None:
    found = find_vectors(library, "both")
    assert {each.name: each.coefficient for each in found} == {
        "up": 1.0, "tone@resid_post.1": -1.0, "tone@resid_post.2": -3.0,
    }  # fmt: skip


def test_saving_vectors_keeps_the_rest(library: Path, vector: SteeringVector) -> None:
    save_library(library, [*load_library(library).values(), replace(vector, name="new")])
    found = Library.open(library)
    assert "new" in found.vectors
    assert (found.about.name, len(found.features), len(found.kits)) == ("rivers", 1, 1)


def test_a_vector_of_a_kit_cannot_be_taken_away(library: Path) -> None:
    before = (library / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="kit 'both'"):
        save_library(library, [])
    assert (library / "manifest.json").read_bytes() == before


def test_init_names_it_and_keeps_what_is_not_given(library: Path, tmp_path: Path) -> None:
    init(InitConfig(library=library, version="1.1.0", licence="Apache-2.0"))
    about = Library.open(library).about
    assert (about.name, about.version, about.licence) == ("rivers", "1.1.0", "Apache-2.0")
    init(InitConfig(library=tmp_path / "new", name="new"))
    assert Library.open(tmp_path / "new").about.name == "new"


def test_vectors_and_kits_are_added(library: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    add(AddConfig(library=new, vectors=library, names=("tone",)))
    assert list(load_library(new)) == ["tone@resid_post.1", "tone@resid_post.2"]
    add(AddConfig(library=new, kit="soft", of={"tone": 0.5}, summary="Softly"))
    assert [each.coefficient for each in find_vectors(new, "soft")] == [0.5, 1.5]
    with pytest.raises(UnknownNameError, match="loud"):
        add(AddConfig(library=new, vectors=library, names=("loud",)))
    with pytest.raises(ConfigError, match="one thing of this name"):
        add(AddConfig(library=new, kit="tone", of={"tone": 0.5}))
    with pytest.raises(ConfigError, match="vectors, sae, features or kit"):
        add(AddConfig(library=new))


def test_an_sae_is_put_in_as_it_is_and_told_of(tiny_sae: Path, tmp_path: Path) -> None:
    artefact = SaeArtefact.load(tiny_sae)
    for embed in (True, False):
        library = add(AddConfig(library=tmp_path / str(embed), sae=tiny_sae, embed=embed))
        assert library.sae is not None
        assert (library.sae.sha256, library.sae.d_sae) == (artefact.sha256, artefact.d_sae)
        verify_files(tmp_path / str(embed), read_manifest(tmp_path / str(embed)))
    assert SaeArtefact.load(tmp_path / "True" / "sae").sha256 == artefact.sha256
    assert not (tmp_path / "False" / "sae").exists()
    assert Library.open(tmp_path / "True").attached.keys() == {
        "sae/cfg.json", "sae/sae_weights.safetensors", "sae/saekit.json",
    }  # fmt: skip


def test_an_sae_in_half_precision_is_as_near_as_that_is(tiny_sae: Path, tmp_path: Path) -> None:
    artefact = SaeArtefact.load(tiny_sae)
    artefact.save(tmp_path / "half", "float16")
    half = SaeArtefact.load(tmp_path / "half")
    for name, tensor in artefact.tensors().items():
        np.testing.assert_allclose(half.tensors()[name], tensor, rtol=2**-11, atol=2**-24)
    assert half.W_dec.dtype == np.float32
    weights = "sae_weights.safetensors"
    assert (tmp_path / "half" / weights).stat().st_size < 0.6 * (tiny_sae / weights).stat().st_size


def test_libraries_are_joined_and_what_differs_is_refused(
    library: Path, tmp_path: Path, vector: SteeringVector
) -> None:
    other = tmp_path / "other"
    Library({"down": replace(vector, name="down")}, features=[feature(5)], sae=SAE_OF).save(other)
    merged = merge(MergeConfig(libraries=(library, other), out=tmp_path / "all"))
    assert sorted(merged.vectors) == ["down", "tone@resid_post.1", "tone@resid_post.2", "up"]
    assert [each.latent for each in Library.open(tmp_path / "all").features] == [3, 5]
    assert merged.about.name == "rivers"
    save_library(other, [replace(vector, direction=np.flip(vector.direction))])
    with pytest.raises(ConfigError, match="vector 'up'"):
        merge(MergeConfig(libraries=(library, other), out=tmp_path / "all"))
    merge(MergeConfig(libraries=(library, other), out=tmp_path / "all", replace=True))
    np.testing.assert_array_equal(load_library(tmp_path / "all")["up"].direction, np.flip(vector.direction))
    Library(sae=SAE_OF.model_copy(update={"sha256": "b" * 64})).save(tmp_path / "third")
    with pytest.raises(MismatchError, match="same SAE"):
        merge(MergeConfig(libraries=(library, tmp_path / "third"), out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_what_differs_is_told(library: Path, tmp_path: Path, vector: SteeringVector) -> None:
    add(AddConfig(library=tmp_path / "other", vectors=library, names=("tone",)))
    save_library(tmp_path / "other", [*load_library(tmp_path / "other").values(), replace(vector, coefficient=9.0)])
    found = difference(library, tmp_path / "other")
    assert found["vectors"] == {"added": [], "removed": [], "changed": ["up"]}
    assert found["features"]["removed"] == ["3"]
    assert found["kits"]["removed"] == ["both"]


def test_one_thing_is_shown_by_its_name(library: Path) -> None:
    assert shown(library, None)["features"] == {"3": "rivers"}
    assert shown(library, "3")["author"] == "ada"
    assert shown(library, "both")["vectors"] == {"up": 0.5, "tone": -1.0}
    assert shown(library, "up")["coefficient"] == 2.0
    with pytest.raises(UnknownNameError, match="both"):
        shown(library, "down")


def test_features_need_their_sae(library: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"latent": 1, "text": "rivers", "authors": ["ada"], "decided": "2026-01-01T00:00:00+00:00"}\n')
    with pytest.raises(MissingArtefactError, match="SAE of the features"):
        add(AddConfig(library=tmp_path / "new", features=labels))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("missing", ["weights_sha256", "hook_point", "model"])
def test_an_sae_says_of_which_model_and_place_it_is(tiny_sae: Path, tmp_path: Path, missing: str, embed: bool) -> None:
    about = json.loads((tiny_sae / "saekit.json").read_text())
    del about[missing]
    (tiny_sae / "saekit.json").write_text(json.dumps(about))
    with pytest.raises(MismatchError, match="an SAE that"):
        add(AddConfig(library=tmp_path / "new", sae=tiny_sae, embed=embed))
    assert not (tmp_path / "new").exists()


def test_what_is_refused_leaves_no_sae_behind(library: Path, tiny_sae: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text("{}\n")
    new = tmp_path / "new"
    with pytest.raises(MissingArtefactError):
        add(AddConfig(library=new, sae=tiny_sae, features=labels, index=tmp_path / "none"))
    with pytest.raises(ConfigError, match="kit 'k'"):
        add(AddConfig(library=new, sae=tiny_sae, kit="k", of={"nobody": 1.0}))
    assert not new.exists()


def save_again_and_again(path: Path, vector: SteeringVector) -> None:
    n = 0
    while True:
        n += 1
        vectors = [replace(vector, name=f"v{i}", coefficient=float(n)) for i in range(40)]
        save_library(path, vectors)


def test_killed_while_saving_it_is_whole(
    tmp_path: Path, vector: SteeringVector, start_process: Callable[..., Any]
) -> None:
    path = tmp_path / "library"
    save_library(path, [vector])
    for i in range(6):
        before = (path / "manifest.json").stat().st_mtime_ns
        process = start_process(save_again_and_again, path, vector)
        while (path / "manifest.json").stat().st_mtime_ns == before:
            time.sleep(0.01)
        time.sleep(0.03 + 0.017 * i)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        coefficients = {each.coefficient for each in load_library(path).values()}
        assert len(coefficients) == 1


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_what_was_stopped_while_renaming_is_finished(library: Path, tmp_path: Path, renamed: int) -> None:
    """As many of the new files have their names as were renamed when it stopped."""
    new = tmp_path / "new"
    found = Library.open(library)
    replace(found, vectors=found.vectors | {"more": replace(found.vectors["up"], name="more")}).save(new)
    for i, name in enumerate(("vectors.safetensors", "README.md", "manifest.json")):
        target = library / (name if i < renamed else f"{name}.partial")
        target.write_bytes((new / name).read_bytes())
    names = Library.open(library).vectors
    assert ("more" in names) == (renamed > 0), "before anything was renamed the old one is whole"
    verify_files(library, read_manifest(library))


def test_what_a_file_is_called_stays_in_its_library(vector: SteeringVector, tmp_path: Path) -> None:
    save_library(tmp_path, [vector])
    manifest = read_manifest(tmp_path)
    for name in (
        "/etc/x.txt",
        "a/../b.txt",
        "a\\b.txt",
        ".hidden.txt",
        "manifest.json",
        "signature.json",
        "",
        "a",
        "a//b.txt",
    ):
        changed = manifest | {"files": manifest["files"] | {name: FileRef(bytes=0, sha256="a" * 64).model_dump()}}
        changed["content_sha256"] = content_hash(changed)
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(CorruptArtefactError, match="names"):
            read_manifest(tmp_path)

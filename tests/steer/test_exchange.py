"""Vectors leave a library and come into one, and steer as they did."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activations.errors import HookPointError, MismatchError, UnknownNameError
from activations.models import LoadedModel
from steer.config import ExportConfig, ImportConfig
from steer.exchange import export_vectors, import_vectors
from steer.library import load_library, save_library
from steer.operations import Intervention
from steer.runtime import steering
from steer.vectors import SteeringVector


@torch.no_grad()
def logits(tiny: LoadedModel, vectors: list[SteeringVector]) -> torch.Tensor:
    ids = torch.tensor([tiny.tokenizer("the cat sat")["input_ids"]])
    with steering(tiny, [Intervention.of(vector, vector.coefficient) for vector in vectors]):
        return tiny.model(ids).logits


@pytest.fixture
def library(tmp_path: Path, vector: SteeringVector) -> Path:
    up = replace(vector, coefficient=1.5)
    down = replace(vector, name="down", operation="ablate", hook_point="mlp_out.2", coefficient=0.5)
    parts = [
        replace(up, name=f"both@resid_post.{layer}", hook_point=f"resid_post.{layer}", coefficient=2.0 - layer)
        for layer in (1, 3)
    ]
    save_library(tmp_path / "library", [up, down, *parts])
    return tmp_path / "library"


@pytest.mark.parametrize(
    ("name", "to", "file"),
    [("up", "llama_cpp", "up.gguf"), ("up", "lm_eval", "up.pt"), ("up", "neuronpedia", "up.json"),
     ("down", "glp", "down.gguf"), ("both", "llama_cpp", "both.gguf"), ("both", "plain", "both.safetensors")],
)  # fmt: skip
@pytest.mark.parametrize("folded", [False, True])
def test_what_comes_back_steers_as_it_did(
    name: str, to: str, file: str, folded: bool, library: Path, tiny: LoadedModel, tmp_path: Path
) -> None:
    if folded and name == "down":
        with pytest.raises(MismatchError):
            export_vectors(ExportConfig(library=library, vector=name, to=to, out=tmp_path / file, folded=True))
        return
    told = export_vectors(ExportConfig(library=library, vector=name, to=to, out=tmp_path / file, folded=folded))
    assert told["use"]
    came = import_vectors(ImportConfig(file=tmp_path / file, out=tmp_path / "other", name="came"), tiny)
    kept = load_library(tmp_path / "other")
    assert [each.partition("@")[0] for each in kept] == ["came"] * len(told["vectors"])
    before = [each for each in load_library(library).values() if each.name.partition("@")[0] == name]
    torch.testing.assert_close(logits(tiny, list(kept.values())), logits(tiny, before), rtol=1e-5, atol=1e-5)
    assert (logits(tiny, before) - logits(tiny, [])).abs().max() > 1e-3
    for each in came:
        assert np.linalg.norm(each.direction) == pytest.approx(1, abs=1e-6)
        assert 0 < each.mean_norm < 100
        assert each.source["kind"] == "imported"
        assert each.source["format"] == to
        assert len(each.source["file_sha256"]) == 64


def test_a_strength_is_multiplied_in(library: Path, tiny: LoadedModel, tmp_path: Path) -> None:
    export_vectors(ExportConfig(library=library, vector="up", to="steering_vectors", out=tmp_path / "up.pt"))
    (came,) = import_vectors(ImportConfig(file=tmp_path / "up.pt", out=tmp_path / "other", strength=1.5), tiny)
    assert (came.name, came.coefficient) == ("up", pytest.approx(1.5, rel=1e-6))


def test_a_coefficient_may_be_another(library: Path, tmp_path: Path) -> None:
    config = ExportConfig(library=library, vector="up", out=tmp_path / "up.gguf", coefficient=4.25)
    assert export_vectors(config)["use"][0].endswith("up.gguf:4.25")


def test_what_is_there_is_not_written_over(library: Path, tmp_path: Path) -> None:
    (tmp_path / "up.gguf").write_text("mine")
    with pytest.raises(MismatchError, match="Choose another name"):
        export_vectors(ExportConfig(library=library, vector="up", out=tmp_path / "up.gguf"))
    assert (tmp_path / "up.gguf").read_text() == "mine"
    with pytest.raises(UnknownNameError, match="up"):
        export_vectors(ExportConfig(library=library, vector="upp", out=tmp_path / "upp.gguf"))


def test_a_file_for_another_model_is_refused(library: Path, tiny: LoadedModel, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", **{"resid_post.1": np.ones(7, np.float32)})  # type: ignore[reportArgumentType]
    with pytest.raises(MismatchError, match="the width of"):
        import_vectors(ImportConfig(file=tmp_path / "wide.npz", out=tmp_path / "other"), tiny)
    np.savez(tmp_path / "deep.npz", **{"resid_post.9": np.ones(tiny.d_model, np.float32)})  # type: ignore[reportArgumentType]
    with pytest.raises((MismatchError, HookPointError)):
        import_vectors(ImportConfig(file=tmp_path / "deep.npz", out=tmp_path / "other"), tiny)
    assert not (tmp_path / "other").exists()

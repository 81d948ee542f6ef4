"""repeng, steering-vectors and lm-eval do with what is exported for them what it says, at its blocks.

They steer every token, the first one too, which the runtime of saekit leaves alone: so they are compared with plain
hooks, and the runtime's own formula with the same hooks in tests/steer/test_runtime.py.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.hook_points import HookPoint
from activations.hooks import edit
from activations.models import LoadedModel, load_model
from steer.formats import find
from steer.vectors import SteeringVector

PACKAGES = ("repeng==0.4.0", "steering-vectors==0.12.2", "lm-eval==0.4.13")
IMPORTS = "import steering_vectors, lm_eval"
TEXT = "the cat sat on the mat"


def vectors_of(model: LoadedModel, *layers: int) -> list[SteeringVector]:
    rows = np.random.default_rng(1).normal(size=(model.n_layers, model.d_model))
    made = [
        SteeringVector(f"v@resid_post.{layer}", (rows[layer] / np.linalg.norm(rows[layer])).astype(np.float32),
                       f"resid_post.{layer}", model.ref, 4.0, {"kind": "random"}, 1.0 + layer)
        for layer in layers
    ]  # fmt: skip
    return made


def writing(vector: SteeringVector) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a vector does to every token."""
    direction = torch.from_numpy(vector.direction)
    if vector.operation == "ablate":
        return lambda h: h - vector.coefficient * (h @ direction)[..., None] * direction
    return lambda h: h + vector.coefficient * direction


@torch.no_grad()
def ours(model: LoadedModel, ids: list[int], vectors: list[SteeringVector]) -> np.ndarray:
    with ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(edit(model.model, model.family, HookPoint.parse(vector.hook_point), writing(vector)))
        return model.model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("form", "format_", "file"),
    [
        ("repeng", "llama_cpp", "v.gguf"),
        ("steering_vectors", "steering_vectors", "v.pt"),
        ("lm_eval", "lm_eval", "v.pt"),
    ],
)
def test_it_steers_as_the_runtime_does(
    form: str, format_: str, file: str, model: LoadedModel, tiny_llama: Path, make_peer: Any, tmp_path: Path
) -> None:
    ids, vectors = model.tokenizer(TEXT)["input_ids"], vectors_of(model, 1, 3)
    (tmp_path / "tokens.json").write_text(json.dumps(ids))
    find(format_).write(vectors, tmp_path / file, folded=False)
    strength = 1.0 if form == "lm_eval" else max(each.coefficient for each in vectors)
    peer = make_peer("steering", PACKAGES, IMPORTS)
    peer.run(tiny_llama, tmp_path / "tokens.json", tmp_path / "out.npz", form, tmp_path / file, str(strength))
    theirs = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(theirs["none"], ours(model, ids, []), atol=1e-5)
    np.testing.assert_allclose(theirs["steered"], ours(model, ids, vectors), atol=1e-4)
    wrong = [replace(each, hook_point=f"resid_post.{int(each.hook_point[-1]) - 1}") for each in vectors]
    assert np.abs(theirs["steered"] - ours(model, ids, wrong)).max() > 1e-2, "a layer beside it is something else"
    if form == "repeng":
        back = find("llama_cpp").read(tmp_path / "out.gguf", model.ref)
        assert [str(each.hook_point) for each in back] == ["resid_post.1", "resid_post.3"]
        np.testing.assert_allclose(back[1].values, vectors[1].direction, atol=1e-6)


def test_an_ablation_is_a_clamp_to_0_in_lm_eval(
    model: LoadedModel, tiny_llama: Path, make_peer: Any, tmp_path: Path
) -> None:
    ids = model.tokenizer(TEXT)["input_ids"]
    (vector,) = (replace(each, operation="ablate", coefficient=1.0) for each in vectors_of(model, 2))
    (tmp_path / "tokens.json").write_text(json.dumps(ids))
    find("lm_eval").write([vector], tmp_path / "v.pt", folded=False)
    peer = make_peer("steering", PACKAGES, IMPORTS)
    peer.run(tiny_llama, tmp_path / "tokens.json", tmp_path / "out.npz", "lm_eval", tmp_path / "v.pt", "1")
    theirs = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(theirs["steered"], ours(model, ids, [vector]), atol=1e-4)
    assert np.abs(theirs["steered"] - theirs["none"]).max() > 1e-2

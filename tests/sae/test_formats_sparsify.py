"""sparsify directories made by hand, against sparsify's formulas."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from activations.errors import CorruptArtefactError, MismatchError, SaekitError, ShapeError
from sae.artefact import SaeArtefact
from sae.formats import sparsify
from sae.torch_view import TorchSae

D_MODEL, D_SAE, K = 4, 8, 2
SHAPES = {"encoder.weight": (D_SAE, D_MODEL), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}


def write(path: Path, skips: bool = False, **config: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = SHAPES | ({"W_skip": (D_MODEL, D_MODEL)} if skips else {})
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    path.mkdir(parents=True)
    save_file(w, path / "sae.safetensors")
    plain = {"activation": "topk", "expansion_factor": 2, "num_latents": 0, "k": K, "d_in": D_MODEL}
    (path / "cfg.json").write_text(json.dumps(plain | {"skip_connection": skips} | config))
    return w


@pytest.mark.parametrize("transcodes", [True, False])
@pytest.mark.parametrize("skips", [True, False])
def test_it_computes_what_sparsify_does(tmp_path: Path, transcodes: bool, skips: bool) -> None:
    w = write(tmp_path / "layers.4", skips, transcode=transcodes)
    sae = sparsify.read(tmp_path / "layers.4")
    x = np.random.default_rng(1).normal(size=(20, D_MODEL)).astype(np.float32)
    pre = np.maximum((x if transcodes else x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    latents = np.where(pre >= np.sort(pre, axis=1)[:, [-K]], pre, 0)
    y = latents @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skips else 0)
    np.testing.assert_allclose(TorchSae(sae).encode(torch.tensor(x)), latents, atol=1e-5)
    np.testing.assert_allclose(TorchSae(sae)(torch.tensor(x)), y, atol=1e-5)
    assert (sae.d_sae, sae.transcodes) == (D_SAE, transcodes or skips)
    assert sae.metadata.get("hook_point") == (None if transcodes else "resid_post.4")


@pytest.mark.parametrize(("folder", "hook_point"), [("layers.4", "resid_post.4"), ("h.4", "resid_post.4")])
def test_the_folder_names_the_hook_point(tmp_path: Path, folder: str, hook_point: str) -> None:
    write(tmp_path / folder)
    assert sparsify.read(tmp_path / folder).hook_point == hook_point


@pytest.mark.parametrize("folder", ["layers.4.mlp", "embed_tokens", "sae", "xlayers.4"])
def test_a_module_that_is_no_hook_point_names_none(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder)
    sae = sparsify.read(tmp_path / folder)
    assert "hook_point" not in sae.metadata
    assert sae.metadata["source"] == {"format": "sparsify", "hookpoint": folder}


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"activation": "groupmax"}, MismatchError, "not one of each group"),
        ({"signed": True}, MismatchError, "not negative"),
        ({"num_latents": 9}, ShapeError, "W_dec"),
        ({"num_latents": -1}, CorruptArtefactError, "num_latents"),
        ({"expansion_factor": 2**50}, CorruptArtefactError, "expansion_factor"),
        ({"d_in": None}, CorruptArtefactError, "d_in"),
        ({"k": 0}, CorruptArtefactError, "k: expected a whole number"),
        ({"k": 9}, CorruptArtefactError, "from 1 to d_sae=8"),
        ({"transcode": "no"}, CorruptArtefactError, "transcode"),
        ({"skip_connection": True}, ShapeError, "W_skip"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, config: dict[str, Any], error: type[SaekitError], match: str) -> None:
    write(tmp_path / "sae", **config)
    with pytest.raises(error, match=match):
        sparsify.read(tmp_path / "sae")


def test_the_written_config_does_not_rely_on_the_expansion(tmp_path: Path) -> None:
    write(tmp_path / "layers.4")
    sae: SaeArtefact = sparsify.read(tmp_path / "layers.4")
    sparsify.write(sae, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "cfg.json").read_text())
    assert (config["num_latents"], config["k"], config["d_in"]) == (D_SAE, K, D_MODEL)
    assert config["normalize_decoder"] is False, "these rows are not of norm 1"
    before, after = (load_file(tmp_path / name / "sae.safetensors") for name in ("layers.4", "copy"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)

"""SAELens directories made by hand, against SAELens's formulas."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from activations.errors import CorruptArtefactError, MismatchError, NumericsError, SaekitError, ShapeError
from sae.artefact import SaeArtefact
from sae.formats import saelens
from sae.torch_view import TorchSae

D_MODEL, D_SAE, K = 5, 9, 3
ABOUT = {"sae_lens_version": "6.54.12", "hook_name": "blocks.7.hook_resid_post", "model_name": "gemma-2-2b"}
PLAIN = {"W_enc": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
GATES = {name: (D_SAE,) for name in ("b_gate", "b_mag", "r_mag")}


def tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}


def write(path: Path, weights: dict[str, np.ndarray], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(weights, path / "sae_weights.safetensors")
    plain = {"architecture": "standard", "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32", "metadata": ABOUT}
    (path / "cfg.json").write_text(json.dumps(plain | config))
    return path


def latents(artefact: SaeArtefact, x: np.ndarray) -> np.ndarray:
    return TorchSae(artefact).encode(torch.tensor(x)).numpy()


def keep_largest(pre: np.ndarray) -> np.ndarray:
    positive = np.maximum(pre, 0)
    return np.where(positive >= np.sort(positive, axis=1)[:, [-K]], positive, 0)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(30, D_MODEL)).astype(np.float32)


def test_a_gated_sae_is_a_jumprelu(tmp_path: Path, x: np.ndarray) -> None:
    w = tensors({name: shape for name, shape in PLAIN.items() if name != "b_enc"} | GATES)
    sae = saelens.read(write(tmp_path / "sae", w, architecture="gated"))
    projected = (x - w["b_dec"]) @ w["W_enc"]
    magnitude = np.maximum(projected * np.exp(w["r_mag"]) + w["b_mag"], 0)
    expected = np.where(projected + w["b_gate"] > 0, magnitude, 0)
    assert ((projected + w["b_gate"] > 0) != (magnitude > 0)).any(), "gate and magnitude disagree somewhere"
    np.testing.assert_allclose(latents(sae, x), expected, atol=1e-5)
    assert (sae.architecture, sae.hook_point) == ("jumprelu", "resid_post.7")
    assert sae.metadata["source"]["model_name"] == "gemma-2-2b"


def test_latents_that_are_measured_by_decoder_norm_are_folded(tmp_path: Path, x: np.ndarray) -> None:
    w = tensors(PLAIN)
    path = write(tmp_path / "sae", w, architecture="topk", k=K, rescale_acts_by_decoder_norm=True)
    sae, norms = saelens.read(path), np.linalg.norm(w["W_dec"], axis=1)
    expected = keep_largest(((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms)
    np.testing.assert_allclose(latents(sae, x), expected, atol=1e-5)
    decoded = (expected / norms) @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(TorchSae(sae)(torch.tensor(x)), decoded, atol=1e-5)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescales", [True, False])
def test_a_training_checkpoint_reads_raw_activations(
    tmp_path: Path, x: np.ndarray, architecture: str, rescales: bool
) -> None:
    w, scale = tensors(PLAIN) | {"topk_threshold": np.array(0.8, np.float64)}, 0.25
    path = write(
        tmp_path / "sae",
        w,
        architecture=architecture,
        k=2.5,
        normalize_activations="expected_average_only_in",
        rescale_acts_by_decoder_norm=rescales,
    )
    with pytest.raises(MismatchError, match="the scale of its inputs"):
        saelens.read(path)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale, "has_whitening": False}))
    norms = np.linalg.norm(w["W_dec"], axis=1) if rescales else 1
    pre = ((scale * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    scaled = np.where(pre > 0.8, pre, 0)
    decoded = ((scaled / norms) @ w["W_dec"] + w["b_dec"]) / scale
    sae = saelens.read(path)
    np.testing.assert_allclose(TorchSae(sae)(torch.tensor(x)), decoded, atol=1e-4)
    np.testing.assert_allclose(latents(sae, x), scaled / (scale if rescales else 1), atol=1e-4)


def test_older_names_and_layouts(tmp_path: Path, x: np.ndarray) -> None:
    w = tensors(PLAIN | {"log_threshold": (D_SAE,)})
    sae = saelens.read(write(tmp_path / "jump", w, architecture="jumprelu"))
    np.testing.assert_allclose(sae.threshold, np.exp(w["log_threshold"]), rtol=1e-6)
    old = {"metadata": None, "sae_lens_version": "5.1.0", "architecture": "standard"}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False}
    w = tensors(PLAIN) | {"scaling_factor": np.ones(D_SAE, np.float32)}
    sae = saelens.read(write(tmp_path / "old", w, **old, hook_point="blocks.3.hook_resid_pre"))
    assert (sae.architecture, sae.k, sae.hook_point) == ("topk", K, "resid_pre.3")
    np.testing.assert_allclose(latents(sae, x), keep_largest((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]), atol=1e-5)
    w["scaling_factor"] *= 2
    with pytest.raises(MismatchError, match="factors of 1"):
        saelens.read(write(tmp_path / "old", w, **old))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes_become_float32(tmp_path: Path, dtype: type) -> None:
    w = {name: tensor.astype(dtype) for name, tensor in tensors(PLAIN).items()}
    sae = saelens.read(write(tmp_path / "sae", w))
    for name, tensor in sae.tensors().items():
        np.testing.assert_array_equal(tensor, w[name].astype(np.float32))
        assert tensor.dtype == np.float32


def test_bfloat16_is_widened_from_its_bits(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_torch

    w = {name: torch.tensor(tensor).bfloat16() for name, tensor in tensors(PLAIN).items()}
    path = write(tmp_path / "sae", tensors(PLAIN))
    save_torch(w, path / "sae_weights.safetensors")
    for name, tensor in saelens.read(path).tensors().items():
        np.testing.assert_array_equal(tensor, w[name].float().numpy())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "temporal"}, "from their own token alone"),
        ({"architecture": "matching_pursuit"}, "in turn"),
        ({"architecture": "abstopk"}, "not negative"),
        ({"architecture": "new"}, "one of standard, topk, jumprelu"),
        ({"normalize_activations": "layer_norm"}, "no fixed weights"),
        ({"normalize_activations": "constant_norm_rescale"}, "no fixed weights"),
        ({"normalize_activations": "covariance_whitening"}, "folded"),
        ({"normalize_activations": "expected_average_only_in"}, "scale of its inputs"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"sae_lens_version": "4.0", "metadata": None, "activation_fn_str": "tanh-relu"}, "relu or topk"),
        ({"sae_lens_version": "4.0", "metadata": None, "hook_name": "blocks.1.attn.hook_z"}, "attention heads"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(MismatchError, match=reason):
        saelens.read(write(tmp_path / "sae", tensors(PLAIN), **changes))


@pytest.mark.parametrize(
    ("changes", "weights", "error"),
    [
        ({"d_in": 2**41}, {}, CorruptArtefactError),
        ({"d_sae": D_SAE + 1}, {}, ShapeError),
        ({"architecture": "topk"}, {}, CorruptArtefactError),
        ({"architecture": "topk", "k": D_SAE + 1}, {}, CorruptArtefactError),
        ({"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": "yes"}, {}, CorruptArtefactError),
        ({"apply_b_dec_to_input": 1}, {}, CorruptArtefactError),
        ({"architecture": "transcoder", "d_out": D_MODEL, "apply_b_dec_to_input": True}, {}, CorruptArtefactError),
        ({"metadata": [1]}, {}, CorruptArtefactError),
        ({"architecture": "jumprelu"}, {}, ShapeError),
        ({}, {"b_dec": np.full(D_MODEL, np.nan, np.float32)}, NumericsError),
        ({}, {"b_dec": np.zeros(D_MODEL, np.int64)}, CorruptArtefactError),
        ({}, {"b_dec": np.full(D_MODEL, 1e300)}, NumericsError),
        ({"architecture": "gated"}, {}, ShapeError),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, changes: dict[str, Any], weights: Any, error: type[SaekitError]
) -> None:
    with pytest.raises(error):
        saelens.read(write(tmp_path / "sae", tensors(PLAIN) | weights, **changes))


def test_exponents_that_overflow_are_refused(tmp_path: Path) -> None:
    w = tensors({name: shape for name, shape in PLAIN.items() if name != "b_enc"} | GATES)
    w["r_mag"][2] = 500
    with pytest.raises(NumericsError, match=r"W_enc|threshold"):
        saelens.read(write(tmp_path / "sae", w, architecture="gated"))


@pytest.mark.parametrize(
    ("about", "hook_point"),
    [
        ({"hook_name": "blocks.7.hook_mlp_out"}, "mlp_out.7"),
        ({"hook_name": "blocks.7.attn.hook_z"}, None),
        ({"hook_name": "blocks.7.hook_attn_in"}, None),
        ({"hook_name": "blocks.7.hook_resid_post", "hook_head_index": 2}, None),
        ({"hook_name": "blocks.1.hook_resid_post+blocks.2.hook_resid_post"}, "resid_post.1+resid_post.2"),
        ({"hook_name": "blocks.1.hook_resid_post+blocks.1.hook_resid_post"}, None),
        ({"hook_name": 7}, None),
        ({}, None),
    ],
)
def test_the_hook_point_is_kept_where_it_is_one(tmp_path: Path, about: dict[str, Any], hook_point: str | None) -> None:
    sae = saelens.read(write(tmp_path / "sae", tensors(PLAIN), metadata={"sae_lens_version": "6.1", **about}))
    assert sae.metadata.get("hook_point") == hook_point


def test_a_transcoder_needs_both_names(tmp_path: Path) -> None:
    across = {"architecture": "transcoder", "d_out": D_MODEL, "apply_b_dec_to_input": False}
    names = {"sae_lens_version": "6.1", "hook_name": "blocks.7.hook_resid_mid"}
    assert "hook_point" not in saelens.read(write(tmp_path / "a", tensors(PLAIN), **across, metadata=names)).metadata
    names["hook_name_out"] = "blocks.7.hook_mlp_out"
    sae = saelens.read(write(tmp_path / "b", tensors(PLAIN), **across, metadata=names))
    assert sae.hook_point == "resid_mid.7->mlp_out.7"

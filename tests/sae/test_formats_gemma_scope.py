"""Gemma Scope directories made by hand, and `.npz` files that nobody vouches for."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from activations.errors import CorruptArtefactError, MismatchError, NumericsError, SaekitError, ShapeError
from sae.artefact import SaeArtefact
from sae.formats import at_hook_point, gemma_scope, gemma_scope_2
from sae.formats.npz import npz_shapes, read_npz
from sae.torch_view import TorchSae

D_MODEL, D_SAE = 4, 9
SHAPES = {"W_enc": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
FOLDER = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
RESIDUAL = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.5.output"}
ACROSS = RESIDUAL | {
    "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
}


def arrays(**more: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (SHAPES | more).items()}
    return w | {"threshold": rng.uniform(0, 1, D_SAE).astype(np.float32)}


def write_1(path: Path, **changes: Any) -> dict[str, np.ndarray]:
    path.mkdir(parents=True)
    w = arrays() | changes
    np.savez(path / "params.npz", **{name: array for name, array in w.items() if array is not None})
    return w


def write_2(path: Path, config: dict[str, Any], **more: tuple[int, ...]) -> dict[str, np.ndarray]:
    path.mkdir(parents=True)
    w = arrays(**more)
    save_file({name.lower(): array for name, array in w.items()}, path / "params.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return w


def check(sae: SaeArtefact, w: dict[str, np.ndarray]) -> None:
    """Strictly above the threshold, b_dec not subtracted, and the affine path turned."""
    x = np.random.default_rng(1).normal(size=(30, D_MODEL)).astype(np.float32)
    pre = x @ w["W_enc"] + w["b_enc"]
    latents = np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
    y = latents @ w["W_dec"] + w["b_dec"]
    if "affine_skip_connection" in w:
        y = y + x @ w["affine_skip_connection"]
    np.testing.assert_allclose(TorchSae(sae).encode(torch.tensor(x)), latents, atol=1e-5)
    np.testing.assert_allclose(TorchSae(sae)(torch.tensor(x)), y, atol=1e-5)


@pytest.mark.parametrize(
    ("folder", "hook_point"),
    [
        (FOLDER, "resid_post.20"),
        (f"models--google--{FOLDER.replace('pt-res', 'it-mlp-canonical')}", "mlp_out.20"),
        (FOLDER.replace("res/", "att/"), None),
        (FOLDER.replace("res/", "residuals/"), None),
        (FOLDER.replace("layer_20", "embedding"), None),
        ("layer_20/width_16k/average_l0_71", None),
    ],
)
def test_the_first_generation_says_where_it_was_only_in_its_path(
    tmp_path: Path, folder: str, hook_point: str | None
) -> None:
    w = write_1(tmp_path / folder)
    sae = gemma_scope.read(tmp_path / folder)
    check(sae, w)
    assert sae.metadata.get("hook_point") == hook_point


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"threshold": None}, ShapeError, "threshold"),
        ({"more": np.zeros(2)}, ShapeError, "more"),
        ({"W_enc": np.zeros((D_MODEL, D_SAE, 1))}, CorruptArtefactError, "two widths"),
        ({"W_dec": np.zeros((D_MODEL, D_SAE))}, ShapeError, "W_dec"),
        ({"b_enc": np.full(D_SAE, np.inf)}, NumericsError, "b_enc"),
        ({"b_enc": np.zeros(D_SAE, np.int32)}, CorruptArtefactError, "int32"),
        ({"b_enc": np.zeros(D_SAE, ">f4")}, CorruptArtefactError, ">f4"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], error: type[SaekitError], match: str) -> None:
    write_1(tmp_path / "sae", **changes)
    with pytest.raises(error, match=match):
        gemma_scope.read(tmp_path / "sae")


def test_the_second_generation_with_its_hook_points(tmp_path: Path) -> None:
    w = write_2(tmp_path / "sae", RESIDUAL)
    sae = gemma_scope_2.read(tmp_path / "sae")
    check(sae, w)
    assert (sae.hook_point, sae.transcodes, sae.saved_name) == ("resid_post.5", False, "jumprelu")
    w = write_2(tmp_path / "across", ACROSS)
    sae = gemma_scope_2.read(tmp_path / "across")
    check(sae, w)
    assert sae.saved_name == "jumprelu_transcoder"
    assert "hook_point" not in sae.metadata, "the normed input of an MLP is none"
    w = write_2(tmp_path / "skip", ACROSS | {"affine_connection": True}, affine_skip_connection=(D_MODEL, D_MODEL))
    sae = gemma_scope_2.read(tmp_path / "skip")
    check(sae, w)
    assert sae.saved_name == "jumprelu_skip_transcoder"
    gemma_scope_2.write(sae, tmp_path / "copy")
    before, after = (load_file(tmp_path / name / "params.safetensors") for name in ("skip", "copy"))
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    assert json.loads((tmp_path / "copy" / "config.json").read_text()).items() >= ACROSS.items()


@pytest.mark.parametrize(
    ("config", "more", "error", "match"),
    [
        ({"architecture": "topk"}, {}, MismatchError, "jump_relu"),
        ({"affine_connection": True}, {}, CorruptArtefactError, "affine"),
        ({}, {"affine_skip_connection": (D_MODEL, D_MODEL)}, CorruptArtefactError, "affine"),
        ({}, {"W_dec": (D_SAE, 2, D_MODEL)}, MismatchError, "several layers"),
        ({}, {"W_dec": (D_SAE,)}, CorruptArtefactError, "two widths each"),
        ({}, {"b_dec": (D_MODEL + 1,)}, ShapeError, "b_dec"),
    ],
)
def test_what_is_wrong_with_the_second_is_named(
    tmp_path: Path, config: dict[str, Any], more: Any, error: type[SaekitError], match: str
) -> None:
    write_2(tmp_path / "sae", ACROSS | config, **more)
    with pytest.raises(error, match=match):
        gemma_scope_2.read(tmp_path / "sae")


def test_a_transcoder_is_written_only_with_its_two_modules(tmp_path: Path) -> None:
    write_1(tmp_path / "sae")
    plain = gemma_scope.read(tmp_path / "sae")
    made = at_hook_point(plain, "resid_mid.5->mlp_out.5")
    gemma_scope_2.write(made, tmp_path / "named")
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    assert config["hf_hook_point_in"] == "model.layers.5.pre_feedforward_layernorm.input"
    assert gemma_scope_2.read(tmp_path / "named").hook_point == "resid_mid.5->mlp_out.5"
    with pytest.raises(MismatchError, match="--hook-point"):
        gemma_scope_2.write(at_hook_point(plain, "mlp_in.5->mlp_out.5"), tmp_path / "other")


def npz(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy(array: np.ndarray, **header: Any) -> bytes:
    file = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": array.shape} | header
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue() + array.tobytes()


def test_npz_arrays_of_either_order_and_compressed(tmp_path: Path) -> None:
    a = np.random.default_rng(0).normal(size=(3, 5))
    others = {"fortran": np.asfortranarray(a), "half": a.astype(np.float16), "one": np.float32(2)}
    np.savez_compressed(tmp_path / "a.npz", c=a, **others)
    assert npz_shapes(tmp_path / "a.npz") == {"c": (3, 5), "fortran": (3, 5), "half": (3, 5), "one": ()}
    read = read_npz(tmp_path / "a.npz")
    for name in ("c", "fortran"):
        np.testing.assert_array_equal(read[name], a.astype(np.float32))
    np.testing.assert_array_equal(read["half"], a.astype(np.float16).astype(np.float32))
    assert read["one"] == 2


def test_pickles_in_npz_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CorruptArtefactError, match="object"):
        npz_shapes(tmp_path / "a.npz")


def test_sizes_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    a = np.zeros(4, np.float32)
    for shape in ((2**30, 2**20), (5,), (3,), (-4,), (2**64,)):
        with pytest.raises(CorruptArtefactError):
            npz_shapes(npz(tmp_path / "a.npz", {"a.npy": npy(a, shape=shape)}))
    bomb = npy(np.zeros(2**24, np.float32))
    with pytest.raises(CorruptArtefactError, match="64 times as large"):
        npz_shapes(npz(tmp_path / "a.npz", {"a.npy": bomb}, zipfile.ZIP_DEFLATED))


def test_members_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    a = npy(np.zeros(4, np.float32))
    for members in ({"a.txt": a}, {"a.npy": b"text"}, {"a.npy": b"\x93NUMPY\x03\x00" + a[8:]}):
        with pytest.raises(CorruptArtefactError):
            npz_shapes(npz(tmp_path / "a.npz", members))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", a)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", a)
    with pytest.raises(CorruptArtefactError, match="different names"):
        npz_shapes(tmp_path / "a.npz")

"""dictionary_learning directories made by hand, and state dicts that nobody vouches for."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.errors import CorruptArtefactError, MismatchError, MissingArtefactError, NumericsError, ShapeError
from sae.formats import dictionary_learning
from sae.formats.state_dict import read_state_dict
from sae.torch_view import TorchSae

D_MODEL, D_SAE, K = 4, 9, 2
LINEAR = {"encoder.weight": (D_SAE, D_MODEL), "decoder.weight": (D_MODEL, D_SAE)}
PLAIN = {"W_enc": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,)}
BIASED = LINEAR | {"encoder.bias": (D_SAE,)}
GATED = LINEAR | {"decoder_bias": (D_MODEL,), "r_mag": (D_SAE,), "gate_bias": (D_SAE,), "mag_bias": (D_SAE,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "AutoEncoder": BIASED | {"bias": (D_MODEL,)},
    "AutoEncoderNew": BIASED | {"decoder.bias": (D_MODEL,)},
    "GatedAutoEncoder": GATED,
    "JumpReluAutoEncoder": PLAIN | {"threshold": (D_SAE,)},
    "AutoEncoderTopK": BIASED | {"b_dec": (D_MODEL,)},
    "BatchTopKSAE": BIASED | {"b_dec": (D_MODEL,)},
    "MatryoshkaBatchTopKSAE": PLAIN,
}


def tensors(dict_class: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES[dict_class].items()}
    if dict_class.endswith(("TopK", "TopKSAE")):
        w |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.5)}
    if dict_class.startswith("Matryoshka"):
        w["group_sizes"] = torch.tensor([3, D_SAE - 3])
    return w


def write(
    path: Path, dict_class: str, changed: dict[str, Any] | None = None, **trainer: Any
) -> dict[str, torch.Tensor]:
    path.mkdir()
    w = tensors(dict_class) | (changed or {})
    torch.save({name: tensor for name, tensor in w.items() if tensor is not None}, path / "ae.pt")
    config = {"trainer": {"dict_class": dict_class, **trainer}, "buffer": {}}
    (path / "config.json").write_text(json.dumps(config))
    return w


def expected(dict_class: str, w: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and reconstruction, as their classes compute them."""
    W_enc = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    W_dec = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    b_dec = w[next(name for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in w)]
    projected = (x if dict_class in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - b_dec) @ W_enc
    if dict_class == "GatedAutoEncoder":
        magnitude = (projected * w["r_mag"].exp() + w["mag_bias"]).relu()
        latents = torch.where(projected + w["gate_bias"] > 0, magnitude, 0)
    else:
        pre = projected + w["b_enc" if "b_enc" in w else "encoder.bias"]
        latents = pre.relu()
        if dict_class == "AutoEncoderTopK":
            values, indices = latents.topk(K)
            latents = torch.zeros_like(latents).scatter(-1, indices, values)
        elif "threshold" in w:
            latents = torch.where(pre > w["threshold"], latents, 0)
    return latents, latents @ W_dec + b_dec


@pytest.mark.parametrize("dict_class", SHAPES)
def test_it_computes_what_the_class_does(tmp_path: Path, dict_class: str) -> None:
    w = write(tmp_path / "sae", dict_class, lm_name="EleutherAI/pythia-70m")
    sae, x = dictionary_learning.read(tmp_path / "sae"), torch.randn(30, D_MODEL)
    latents, y = expected(dict_class, w, x)
    torch.testing.assert_close(TorchSae(sae).encode(x), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(TorchSae(sae)(x), y, atol=1e-5, rtol=1e-5)
    assert sae.metadata["source"]["model_name"] == "EleutherAI/pythia-70m"


def test_the_table_here_has_a_row_for_each_class() -> None:
    assert SHAPES.keys() == dictionary_learning.DICT_CLASSES.keys()


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_is_not_set_is_refused(tmp_path: Path, dict_class: str) -> None:
    write(tmp_path / "sae", dict_class, {"threshold": torch.tensor(-1.0)})
    with pytest.raises(MismatchError, match="train it longer"):
        dictionary_learning.read(tmp_path / "sae")


@pytest.mark.parametrize(
    ("trainer", "hook_point"),
    [
        ({"layer": 5, "submodule_name": "resid_post_layer_5"}, "resid_post.5"),
        ({"layer": 5, "submodule_name": "mlp_layer_5"}, None),
        ({"layer": 5}, None),
        ({"layer": True, "submodule_name": "resid_post_layer_True"}, None),
    ],
)
def test_the_hook_point_is_kept_where_it_is_one(
    tmp_path: Path, trainer: dict[str, Any], hook_point: str | None
) -> None:
    write(tmp_path / "sae", "AutoEncoder", **trainer)
    assert dictionary_learning.read(tmp_path / "sae").metadata.get("hook_point") == hook_point


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"b_dec": None}, ShapeError, "'b_dec'"),
        ({"more": torch.zeros(2)}, ShapeError, "'more'"),
        ({"k": torch.tensor(3.5)}, CorruptArtefactError, "ae.pt: k"),
        ({"k": torch.tensor(0)}, CorruptArtefactError, "k"),
        ({"k": torch.zeros(2, dtype=torch.int32)}, ShapeError, "'k'"),
        ({"encoder.weight": torch.zeros(D_SAE)}, CorruptArtefactError, "two widths"),
        ({"encoder.bias": torch.full((D_SAE,), torch.nan)}, NumericsError, "encoder.bias"),
        ({"encoder.bias": torch.zeros(D_SAE, dtype=torch.complex64)}, CorruptArtefactError, "complex64"),
        ({"encoder.bias": torch.zeros(D_SAE).to_sparse()}, CorruptArtefactError, "sparse"),
        ({"encoder.weight": torch.zeros(1).expand(2**20, 2**20)}, CorruptArtefactError, "read again and again"),
        ({"encoder.bias": "text"}, CorruptArtefactError, "a tensor"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changed: dict[str, Any], error: Any, match: str) -> None:
    write(tmp_path / "sae", "AutoEncoderTopK", changed, k=K)
    with pytest.raises(error, match=match):
        dictionary_learning.read(tmp_path / "sae")


def test_what_the_config_says_must_hold(tmp_path: Path) -> None:
    write(tmp_path / "sae", "AutoEncoderTopK", k=K + 1)
    with pytest.raises(CorruptArtefactError, match=r"ae\.pt: k"):
        dictionary_learning.read(tmp_path / "sae")
    for dict_class in ("IdentityDict", None, ["AutoEncoder"]):
        (tmp_path / "sae" / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class}}))
        with pytest.raises(MismatchError, match="one of AutoEncoder, AutoEncoderNew"):
            dictionary_learning.read(tmp_path / "sae")
    (tmp_path / "sae" / "config.json").unlink()
    with pytest.raises(MissingArtefactError, match=r"config\.json"):
        dictionary_learning.read(tmp_path / "sae")


class Malicious:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.target, "owned"))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    return read_state_dict(path, lambda shapes: None)


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, legacy: bool) -> None:
    content = {"weight": torch.zeros(2), "more": Malicious(tmp_path / "owned")}
    torch.save(content, tmp_path / "ae.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CorruptArtefactError, match=r"torch\.save"):
        read_tensors(tmp_path / "ae.pt")
    assert not (tmp_path / "owned").exists()


def test_shapes_are_approved_before_data_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(3, 2)}, tmp_path / "ae.pt")
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: pytest.fail("data were read"))

    def refuse(shapes: Any) -> None:
        assert shapes == {"a": (3, 2)}
        raise ShapeError("here", expected="x", got="y", fix="z")

    with pytest.raises(ShapeError, match="here"):
        read_state_dict(tmp_path / "ae.pt", refuse)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as old,
        zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CorruptArtefactError, match="stored as they are"):
        read_tensors(tmp_path / "ae.pt")


def test_halves_and_views_become_whole_float32_arrays(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    torch.save({"half": base.bfloat16(), "turned": base.T, "n": torch.tensor(3)}, tmp_path / "ae.pt")
    read = read_tensors(tmp_path / "ae.pt")
    np.testing.assert_array_equal(read["half"], base.bfloat16().float())
    np.testing.assert_array_equal(read["turned"], base.T)
    assert (read["half"].dtype, read["n"].dtype, int(read["n"])) == (np.float32, np.int64, 3)
    assert read["turned"].flags["C_CONTIGUOUS"]

"""dictionary_learning: `ae.pt`, a state dict, and `config.json`, whose `trainer.dict_class` says what it is.

| dict_class | here | x - b_dec before the encoder |
|---|---|---|
| AutoEncoder | standard | yes |
| AutoEncoderNew | standard | no |
| GatedAutoEncoder | jumprelu, which it is | yes |
| JumpReluAutoEncoder | jumprelu | no, unless set in Python after loading, which no file says |
| AutoEncoderTopK | topk | yes |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | jumprelu with their one threshold, as they encode by default | yes |

Decoders of `torch.nn.Linear` are [d_model, d_sae]. Its SAEs read raw activations: a scale used in training is in the
biases. Refused: a threshold that training has not set yet (-1); on writing, transcoders.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae.artefact import SaeArtefact, SavedArchitecture, write_json
from sae.checked_files import check_shapes, corrupt, read_json
from sae.formats import folds
from sae.formats.base import group, new_directory, provenance, refused
from sae.formats.state_dict import read_state_dict, write_state_dict

TITLE = "dictionary_learning directory"
STATE, CONFIG = "ae.pt", "config.json"
Shapes = dict[str, tuple[int, ...]]


class DictClass(NamedTuple):
    """One class of theirs."""

    architecture: SavedArchitecture
    subtracts: bool
    """whether b_dec is subtracted before the encoder"""
    encoder: str
    """the tensor that gives d_model and d_sae"""
    names: dict[str, str]
    """their name of a tensor -> ours; what ours lacks is consumed in `_as_ours`"""
    scalars: tuple[str, ...] = ()


_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATES = {"r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag"}
_GATED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec", **_GATES}
_K = ("k", "threshold")
DICT_CLASSES: dict[str, DictClass] = {
    "AutoEncoder": DictClass("standard", True, "encoder.weight", _LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": DictClass("standard", False, "encoder.weight", _LINEAR | {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": DictClass("jumprelu", True, "encoder.weight", _GATED),
    "JumpReluAutoEncoder": DictClass("jumprelu", False, "W_enc", _PLAIN | {"threshold": "threshold"}),
    "AutoEncoderTopK": DictClass("topk", True, "encoder.weight", _LINEAR | {"b_dec": "b_dec"}, _K),
    "BatchTopKSAE": DictClass("jumprelu", True, "encoder.weight", _LINEAR | {"b_dec": "b_dec"}, _K),
    "MatryoshkaBatchTopKSAE": DictClass("jumprelu", True, "W_enc", _PLAIN, (*_K, "group_sizes")),
}


def matches(path: Path) -> bool:
    """By its state dict."""
    return (path / STATE).is_file()


def read(path: Path) -> SaeArtefact:
    """The SAE, by what its config says of the class."""
    trainer = group(read_json(path / CONFIG), "trainer", path / CONFIG)
    name = trainer.get("dict_class")
    known = DICT_CLASSES.get(name) if isinstance(name, str) else None
    if known is None:
        where = f"{path / CONFIG}: trainer.dict_class"
        raise refused(where, repr(name)[:80], f"one of {', '.join(DICT_CLASSES)}")
    where = path / STATE
    state = read_state_dict(where, lambda got: check_shapes(str(where), got, _expected(where, known, got)))
    scalars = {key: state.pop(key) for key in known.scalars}
    tensors: dict[str, Any] = {ours: _turned(theirs, state[theirs]) for theirs, ours in known.names.items()}
    if "b_gate" in tensors:
        parts = [tensors.pop(key) for key in ("W_enc", "b_gate", "b_mag", "r_mag")]
        tensors |= folds.gated(*parts)
    elif known.architecture == "jumprelu" and "threshold" in scalars:
        tensors["threshold"] = _threshold(where, float(scalars["threshold"]), len(tensors["b_enc"]))
    return SaeArtefact(
        architecture=known.architecture,
        k=_k(where, scalars["k"], trainer) if known.architecture == "topk" else None,
        apply_b_dec_to_input=known.subtracts,
        metadata=_metadata(path, trainer),
        **tensors,
    )


def write(artefact: SaeArtefact, path: Path) -> None:
    """As AutoEncoder or AutoEncoderNew, AutoEncoderTopK, or JumpReluAutoEncoder with the subtraction folded."""
    if artefact.transcodes:
        raise refused(path, f"a {artefact.saved_name}", "an autoencoder, the only kind that dictionary_learning has")
    if artefact.architecture == "standard":
        name, ours = ("AutoEncoder" if artefact.apply_b_dec_to_input else "AutoEncoderNew"), artefact
    elif artefact.architecture == "topk":
        name, ours = "AutoEncoderTopK", folds.with_subtraction(artefact)
    else:
        name, ours = "JumpReluAutoEncoder", folds.without_subtraction(artefact)
    tensors = ours.tensors()
    state: dict[str, Any] = {
        theirs: _turned(theirs, tensors[mine]) for theirs, mine in DICT_CLASSES[name].names.items()
    }
    if ours.k is not None:
        state |= {"k": ours.k, "threshold": -1.0}
    with new_directory(path) as new:
        write_state_dict(new / STATE, state)
        write_json(new / CONFIG, {"trainer": _trainer(name, ours), "buffer": {}})


def _expected(where: Path, known: DictClass, got: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Shapes that follow from those of the encoder; turned where torch.nn.Linear turns them."""
    shape = got.get(known.encoder, ())
    if len(shape) != 2 or 0 in shape:
        raise corrupt(f"{where}: {known.encoder}", "two widths", str(list(shape)))
    d_model, d_sae = shape if known.encoder == "W_enc" else shape[::-1]
    ours = {"W_enc": (d_model, d_sae), "W_dec": (d_sae, d_model), "b_dec": (d_model,)}
    shapes: Shapes = {theirs: ours.get(mine, (d_sae,)) for theirs, mine in known.names.items()}
    shapes = {name: shape[::-1] if name.endswith(".weight") else shape for name, shape in shapes.items()}
    groups = got.get("group_sizes", ())
    return shapes | {name: groups[:1] if name == "group_sizes" else () for name in known.scalars}


def _turned(name: str, tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor.T) if name.endswith(".weight") else tensor


def _threshold(where: Path, value: float, d_sae: int) -> np.ndarray:
    if value < 0:
        reason = "a threshold, which training sets after its first steps; train it longer"
        raise refused(f"{where}: threshold", value, reason)
    return np.full(d_sae, value, np.float32)


def _k(where: Path, k: np.ndarray, trainer: Mapping[str, Any]) -> int:
    stated = trainer.get("k", int(k))
    if k.dtype.kind != "i" or stated != int(k):
        raise corrupt(f"{where}: k", f"the whole number that {CONFIG} says, {stated!r}"[:120], str(k))
    return int(k)


def _metadata(path: Path, trainer: Mapping[str, Any]) -> dict[str, Any]:
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    is_residual = type(layer) is int and 0 <= layer < 10**4 and submodule == f"resid_post_layer_{layer}"
    names = {"model_name": trainer.get("lm_name"), "dict_class": trainer.get("dict_class")}
    hook_point = f"resid_post.{layer}" if is_residual else None
    return provenance("dictionary_learning", hook_point, layer=layer, submodule_name=submodule, **names)


def _trainer(name: str, artefact: SaeArtefact) -> dict[str, Any]:
    """What their loader and SAEBench read of the config."""
    about = artefact.metadata
    model = about.get("model", {}).get("id", about.get("source", {}).get("model_name"))
    trainer = {
        "dict_class": name,
        "activation_dim": artefact.d_model,
        "dict_size": artefact.d_sae,
        "k": artefact.k,
        "lm_name": model,
    }
    site, _, layer = str(about.get("hook_point")).partition(".")
    if site == "resid_post" and layer.isdecimal():
        trainer |= {"layer": int(layer), "submodule_name": f"resid_post_layer_{layer}"}
    return trainer

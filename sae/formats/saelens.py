"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and before.

Beyond what saekit writes itself, this reads gated SAEs (as the jumprelu that they are), TopK SAEs whose latents are
measured by decoder norm (folded), training checkpoints of BatchTopK and Matryoshka BatchTopK (with the running
threshold that SAELens uses at inference), old checkpoints with `log_threshold`, other float dtypes, and a scale of the
inputs that `activation_scaler.json` gives (folded).

Refused: normalisation of each token, whitening, inputs of attention heads side by side, AbsTopK, matching pursuit,
temporal SAEs. SAELens has no TopK transcoder, so none is written.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae.artefact import (
    CONFIG,
    KINDS,
    PROVENANCE,
    WEIGHTS,
    Kind,
    SaeArtefact,
    expected_shapes,
    write_weights_and_config,
)
from sae.checked_files import check_shapes, corrupt, read_json, read_safetensors, safetensors_heads
from sae.formats import folds
from sae.formats.base import flag, group, new_directory, provenance, refused, whole
from sae.hook_names import from_transformer_lens, wiring_text

TITLE = "SAELens directory"
SCALER, RESCALE = "activation_scaler.json", "rescale_acts_by_decoder_norm"
CHECKPOINTS = ("batchtopk", "matryoshka_batchtopk")
"""architectures that exist in training only"""
REFUSED = {
    "abstopk": "latents that are not negative",
    "matching_pursuit": "latents that follow from one matrix product, not from one another in turn",
    "temporal": "latents that follow from their own token alone",
}
NORMALISED = "activations that are not normalised token by token, which no fixed weights can do"


def matches(path: Path) -> bool:
    """By the names of its two files; with a saekit.json it is saekit's."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file() and not (path / PROVENANCE).is_file()


def read(path: Path) -> SaeArtefact:
    """The SAE, with what SAELens does beyond `SaeArtefact` folded into its weights."""
    where, config = path / CONFIG, read_json(path / CONFIG)
    about = group(config, "metadata", where)
    if _is_old(config, about):
        config, about = _as_version_6(config, where)
    name = config.get("architecture")
    kind = _kind(name, where)
    d_model, d_sae = (whole(config, key, where) for key in ("d_in", "d_sae"))
    d_out = whole(config, "d_out", where) if kind.transcodes else d_model
    scale, rescales = _input_scale(config, path), name in ("topk", *CHECKPOINTS) and flag(config, RESCALE, where)
    if kind.transcodes and scale != 1:
        raise refused(path / SCALER, f"a scale of {scale}", "no scale for a transcoder, whose output has another")
    heads = safetensors_heads(path / WEIGHTS)
    shapes = {key: head.shape for key, head in heads.items()}
    check_shapes(str(path / WEIGHTS), shapes, _expected(name, kind, shapes, d_model, d_sae, d_out))
    tensors = _as_ours(name, read_safetensors(path / WEIGHTS), path / WEIGHTS, scale, rescales)
    return SaeArtefact(
        architecture=kind.architecture,
        k=whole(config, "k", where) if kind.architecture == "topk" else None,
        apply_b_dec_to_input=flag(config, "apply_b_dec_to_input", where, default=not kind.transcodes),
        transcodes=kind.transcodes,
        metadata=provenance("saelens", _hook_point(about, kind), architecture=name, **_named(about)),
        **tensors,
    )


def write(artefact: SaeArtefact, path: Path) -> None:
    """The two files that SAELens reads, without a saekit.json."""
    if artefact.architecture == "topk" and artefact.transcodes:
        raise refused(path, "a topk transcoder", "a kind that SAELens has")
    with new_directory(path) as new:
        write_weights_and_config(artefact, new)


def _is_old(config: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    version = config.get("sae_lens_version") or about.get("sae_lens_version")
    major = re.match(r"\d{1,4}", version) if isinstance(version, str) else None
    return major is None or int(major[0]) < 6


def _as_version_6(config: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the metadata that SAELens 6 makes of an older config."""
    new = {"architecture": "standard", **config}
    about = group(config, "metadata", where) | {"hook_name": config.get("hook_name", config.get("hook_point"))}
    about |= {key: config[key] for key in ("model_name", "hook_head_index", "dataset_path") if key in config}
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation == "topk":
        new |= {"architecture": "topk", "k": group(config, "activation_fn_kwargs", where).get("k")}
    elif activation != "relu":
        raise refused(f"{where}: activation_fn", repr(activation), "relu or topk")
    if new.get("normalize_activations") in (None, False):
        new["normalize_activations"] = "none"
    if "hook_z" in str(about["hook_name"]):
        new.setdefault("reshape_activations", "hook_z")
    return new, about


def _kind(name: object, where: Path) -> Kind:
    if name == "gated" or name in CHECKPOINTS:
        return Kind("jumprelu")
    if not isinstance(name, str) or name not in KINDS:
        known = ", ".join((*KINDS, "gated", *CHECKPOINTS))
        raise refused(f"{where}: architecture", repr(name), REFUSED.get(str(name), f"one of {known}"))
    return KINDS[name]


def _input_scale(config: Mapping[str, Any], path: Path) -> float:
    """What inputs are multiplied by. Raises: MismatchError for what is more than that."""
    where, normalise = path / CONFIG, config.get("normalize_activations", "none")
    if config.get("reshape_activations", "none") != "none":
        reason = "activations of one hook point as they are, not those of attention heads side by side"
        raise refused(f"{where}: reshape_activations", repr(config["reshape_activations"]), reason)
    scaler = read_json(path / SCALER) if (path / SCALER).is_file() else {}
    if normalise == "covariance_whitening" or flag(scaler, "has_whitening", path / SCALER):
        raise refused(where, "whitened activations", "a final SAE, in which SAELens has folded them, not a checkpoint")
    scale = scaler.get("scaling_factor")
    if normalise not in ("none", "expected_average_only_in"):
        raise refused(f"{where}: normalize_activations", repr(normalise), NORMALISED)
    if normalise == "none" and scale is None:
        return 1.0
    if scale is None:
        reason = f"the scale of its inputs, in {SCALER} or folded into a final SAE"
        raise refused(f"{where}: normalize_activations", repr(normalise), reason)
    if type(scale) not in (int, float) or not 1e-30 < scale < 1e30:
        raise corrupt(f"{path / SCALER}: scaling_factor", "a positive number", repr(scale)[:80])
    return float(scale)


def _expected(
    name: object, kind: Kind, got: Mapping[str, tuple[int, ...]], d_model: int, d_sae: int, d_out: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that such a file has; `got` says which of two names an older one uses."""
    shapes = expected_shapes(kind, d_model, d_sae, d_out)
    latent = shapes["b_enc"]
    if name == "gated":
        del shapes["b_enc"], shapes["threshold"]
        shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), latent)
    elif name in CHECKPOINTS:
        del shapes["threshold"]
        shapes["topk_threshold"] = ()
    elif kind.architecture == "jumprelu" and "log_threshold" in got:
        del shapes["threshold"]
        shapes["log_threshold"] = latent
    return shapes | ({"scaling_factor": latent} if "scaling_factor" in got else {})


def _as_ours(name: object, tensors: dict[str, np.ndarray], where: Path, scale: float, rescales: bool) -> dict[str, Any]:
    """The tensors of an SaeArtefact that reads raw activations."""
    if (tensors.pop("scaling_factor", np.ones(1)) != 1).any():
        raise refused(f"{where}: scaling_factor", "another factor for each latent", "factors of 1, or none")
    if name == "gated":
        parts = [tensors.pop(key) for key in ("W_enc", "b_gate", "b_mag", "r_mag")]
        tensors |= folds.gated(*parts)
    if name in CHECKPOINTS:
        tensors["threshold"] = np.full(tensors["b_enc"].shape, tensors.pop("topk_threshold"), np.float32)
    if "log_threshold" in tensors:
        with np.errstate(over="ignore"):
            tensors["threshold"] = np.exp(tensors.pop("log_threshold"))
    if scale != 1:
        tensors = folds.input_scale(tensors, scale)
    if rescales:
        tensors |= folds.decoder_norms(tensors["W_enc"], tensors["b_enc"], tensors["W_dec"])
        if "threshold" in tensors:  # it is measured by the norms that the decoder had before it was scaled
            tensors["threshold"] = tensors["threshold"] / np.float32(scale)
    return tensors


def _hook_point(about: Mapping[str, Any], kind: Kind) -> str | None:
    """Of one name, or of several joined by a plus, as saekit writes those of a crosscoder."""
    if about.get("hook_head_index") is not None:
        return None
    sides = [str(about.get(key)).split("+") for key in ("hook_name", "hook_name_out")]
    reads, writes = ([from_transformer_lens(part) for part in side] for side in sides)
    return wiring_text(reads, writes if kind.transcodes else None)


def _named(about: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("model_name", "hook_name", "hook_name_out", "dataset_path", "context_size", "prepend_bos", "neuronpedia_id")
    return {key: about[key] for key in keys if key in about}

"""Gemma Scope 1: `params.npz` with W_enc, b_enc, W_dec, b_dec and threshold, in folders such as
`layer_20/width_16k/average_l0_71`.

JumpReLU, active strictly above the threshold, b_dec not subtracted before the encoder, normalisation folded in. The
file does not say what it reads: a hook point is known only if the path has both the layer and the name of a release of
residual streams or MLP outputs. A transcoder looks the same: the user says so with a hook point `A->B`. An SAE of
embeddings reads them before Gemma's factor of sqrt(d_model), which is no hook point here.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sae.artefact import Kind, SaeArtefact, expected_shapes
from sae.checked_files import check_shapes, corrupt
from sae.formats import folds
from sae.formats.base import new_directory, provenance, refused
from sae.formats.npz import npz_shapes, read_npz

TITLE = "Gemma Scope 1 directory"
PARAMS = "params.npz"
RELEASE = re.compile(r"gemma-scope-(?:2b|9b|27b)-(?:pt|it)-(res|mlp)(?![a-z])")
SITES = {"res": "resid_post", "mlp": "mlp_out"}


def matches(path: Path) -> bool:
    """By the name of its file."""
    return (path / PARAMS).is_file()


def read(path: Path) -> SaeArtefact:
    """A jumprelu SAE."""
    where, shapes = path / PARAMS, npz_shapes(path / PARAMS)
    width = shapes.get("W_enc", ())
    if len(width) != 2 or 0 in width:
        raise corrupt(f"{where}: W_enc", "two widths", str(list(width)))
    check_shapes(str(where), shapes, expected_shapes(Kind("jumprelu"), *width, width[0]))
    folder = "/".join(path.parts[-3:])
    metadata, tensors = provenance("gemma_scope", _hook_point(path), folder=folder), dict[str, Any](read_npz(where))
    return SaeArtefact(architecture="jumprelu", apply_b_dec_to_input=False, metadata=metadata, **tensors)


def write(artefact: SaeArtefact, path: Path) -> None:
    """Raises: MismatchError for topk, for a skip connection, and for a transcoder to another width."""
    ours = as_jumprelu(artefact, path)
    if ours.W_skip is not None or ours.d_out != ours.d_model:
        raise refused(path, "a skip connection or another output width", "what Gemma Scope 1 has: neither")
    with new_directory(path) as new:
        tensors: dict[str, Any] = {name: tensor.astype(np.float32) for name, tensor in ours.tensors().items()}
        np.savez(new / PARAMS, allow_pickle=False, **tensors)


def as_jumprelu(artefact: SaeArtefact, path: Path) -> SaeArtefact:
    """The form that both generations have; a standard SAE is a jumprelu with thresholds of 0.

    Raises: MismatchError for topk.
    """
    if artefact.architecture == "topk":
        raise refused(path, "a topk SAE", "a jumprelu or standard one; Gemma Scope has no fixed number of latents")
    plain = folds.without_subtraction(artefact)
    if plain.threshold is not None:
        return plain
    threshold = np.zeros(plain.d_sae, np.float32)
    return replace(plain, architecture="jumprelu", threshold=threshold)


def _hook_point(path: Path) -> str | None:
    """From a path such as `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`."""
    release = RELEASE.search(path.as_posix())
    layers = [match for part in path.parts if (match := re.fullmatch(r"layer_(\d{1,3})", part))]
    return f"{SITES[release[1]]}.{int(layers[0][1])}" if release and len(layers) == 1 else None

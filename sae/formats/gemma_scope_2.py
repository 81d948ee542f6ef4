"""Gemma Scope 2: `params.safetensors` with w_enc, b_enc, w_dec, b_dec and threshold, and `config.json`.

JumpReLU as in Gemma Scope 1. Transcoders have an output of their own in the config, and may have an
`affine_skip_connection` [d_model, d_out], which is W_skip turned. Modules of Gemma are hook points where they are what
the model itself adds or passes on; the normed input of an MLP, which its transcoders read, is none. Refused:
cross-layer transcoders, which write several layers.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sae.artefact import Kind, SaeArtefact, expected_shapes, write_json
from sae.checked_files import check_shapes, corrupt, read_json, read_safetensors, safetensors_heads
from sae.formats.base import flag, new_directory, provenance, refused
from sae.formats.gemma_scope import as_jumprelu
from sae.hook_names import from_gemma_module, to_gemma_module, wiring_text
from sae.wiring import Wiring

TITLE = "Gemma Scope 2 directory"
PARAMS, CONFIG, SKIP = "params.safetensors", "config.json", "affine_skip_connection"
NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}


def matches(path: Path) -> bool:
    """By the name of its file."""
    return (path / PARAMS).is_file()


def read(path: Path) -> SaeArtefact:
    """A jumprelu SAE, transcoder, or skip transcoder."""
    where, config = path / CONFIG, read_json(path / CONFIG)
    if config.get("architecture") != "jump_relu":
        raise refused(f"{where}: architecture", repr(config.get("architecture"))[:80], "'jump_relu'")
    modules = [config.get(f"hf_hook_point_{side}") for side in ("in", "out")]
    shapes = {name: head.shape for name, head in safetensors_heads(path / PARAMS).items()}
    skips = SKIP in shapes
    if flag(config, "affine_connection", where) != skips:
        raise corrupt(path / PARAMS, f"{SKIP} where {CONFIG} has an affine_connection", f"{skips}".lower())
    transcodes = skips or modules[1] not in (None, modules[0])
    check_shapes(str(path / PARAMS), shapes, _expected(path / PARAMS, shapes, transcodes))
    tensors = dict[str, Any](read_safetensors(path / PARAMS))
    W_skip = np.ascontiguousarray(tensors.pop(SKIP).T) if skips else None
    reads, writes = ([from_gemma_module(module)] for module in modules)
    hook_point = wiring_text(reads, writes if transcodes else None)
    source = {"model_name": config.get("model_name"), "hf_hook_point_in": modules[0], "hf_hook_point_out": modules[1]}
    return SaeArtefact(
        architecture="jumprelu",
        W_skip=W_skip,
        apply_b_dec_to_input=False,
        transcodes=transcodes,
        metadata=provenance("gemma_scope_2", hook_point, **source),
        **{NAMES[name]: tensor for name, tensor in tensors.items()},
    )


def write(artefact: SaeArtefact, path: Path) -> None:
    """Raises: MismatchError for topk, and for a transcoder whose hook points are no modules of Gemma."""
    ours = as_jumprelu(artefact, path)
    tensors = ours.tensors()
    W_skip = tensors.pop("W_skip", None)
    packed = {theirs: tensors[mine] for theirs, mine in NAMES.items()} | ({} if W_skip is None else {SKIP: W_skip.T})
    config = {"architecture": "jump_relu", "affine_connection": W_skip is not None, **_modules(ours, path)}
    model = ours.metadata.get("model", {}).get("id", ours.metadata.get("source", {}).get("model_name"))
    with new_directory(path) as new:
        save_file({name: np.ascontiguousarray(tensor, np.float32) for name, tensor in packed.items()}, new / PARAMS)
        write_json(new / CONFIG, config | {"model_name": model})


def _expected(where: Path, got: dict[str, tuple[int, ...]], transcodes: bool) -> dict[str, tuple[int, ...]]:
    encoder, decoder = got.get("w_enc", ()), got.get("w_dec", ())
    if len(decoder) == 3:
        raise refused(f"{where}: w_dec", list(decoder), "one output, not those of several layers")
    if len(encoder) != 2 or len(decoder) != 2 or 0 in encoder + decoder:
        raise corrupt(where, "w_enc and w_dec of two widths each", f"{list(encoder)} and {list(decoder)}")
    kind = Kind("jumprelu", transcodes, skips=SKIP in got)
    shapes = expected_shapes(kind, *encoder, decoder[1] if transcodes else encoder[0])
    named = {theirs: shapes[mine] for theirs, mine in NAMES.items()}
    return named | ({SKIP: shapes["W_skip"][::-1]} if kind.skips else {})


def _modules(artefact: SaeArtefact, path: Path) -> dict[str, Any]:
    text = artefact.metadata.get("hook_point")
    wiring = Wiring((), ()) if text is None else Wiring.parse(text)
    sides = [[to_gemma_module(name) for name in names] for names in (wiring.reads, wiring.writes)]
    reads, writes = (side[0] if len(side) == 1 else None for side in sides)
    if artefact.transcodes and (reads is None or writes is None):
        source = artefact.metadata.get("source", {})
        reads, writes = source.get("hf_hook_point_in"), source.get("hf_hook_point_out")
    if artefact.transcodes and (reads is None or writes is None):
        raise refused(path, f"hook point {text}", "a transcoder of two modules of Gemma; name them with --hook-point")
    return {"hf_hook_point_in": reads, **({"hf_hook_point_out": writes} if artefact.transcodes else {})}

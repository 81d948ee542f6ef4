"""sparsify: `cfg.json` and `sae.safetensors` in a folder that is named after the hook point, such as `layers.10`.

    z = the k largest of relu((x - b_dec) @ encoder.weight.T + encoder.bias), without b_dec in a transcoder
    y = z @ W_dec + b_dec + x @ W_skip.T

`num_latents` 0 stands for `d_in * expansion_factor`. A skip connection beside an autoencoder is read as a transcoder
that writes what it reads, with b_dec folded. Refused: groupmax, signed latents; on writing, whatever is not TopK.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from activations.errors import ShapeError
from sae.artefact import CONFIG, SaeArtefact, write_json
from sae.checked_files import check_shapes, read_json, read_safetensors, safetensors_heads
from sae.formats import folds
from sae.formats.base import flag, new_directory, provenance, refused, whole
from sae.hook_names import from_block

TITLE = "sparsify directory"
SPARSIFY_WEIGHTS = "sae.safetensors"


def matches(path: Path) -> bool:
    """By the names of its two files."""
    return (path / CONFIG).is_file() and (path / SPARSIFY_WEIGHTS).is_file()


def read(path: Path) -> SaeArtefact:
    """A topk SAE or transcoder."""
    where, weights, config = path / CONFIG, path / SPARSIFY_WEIGHTS, read_json(path / CONFIG)
    if config.get("activation", "topk") != "topk":
        reason = "topk, which keeps the largest of all latents, not one of each group"
        raise refused(f"{where}: activation", repr(config["activation"])[:80], reason)
    if flag(config, "signed", where):
        raise refused(f"{where}: signed", "true", "latents that are not negative")
    d_model, k = whole(config, "d_in", where), whole(config, "k", where)
    d_sae = whole(config, "num_latents", where, least=0) or d_model * whole(config, "expansion_factor", where)
    is_transcoder, skips = flag(config, "transcode", where), flag(config, "skip_connection", where)
    heads = {name: head.shape for name, head in safetensors_heads(weights).items()}
    check_shapes(str(weights), heads, _shapes(d_model, d_sae, skips))
    tensors = read_safetensors(weights)
    plain = SaeArtefact(
        architecture="topk",
        W_enc=np.ascontiguousarray(tensors["encoder.weight"].T),
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        k=k,
        apply_b_dec_to_input=not is_transcoder,
        transcodes=is_transcoder,
        metadata=_metadata(path, is_transcoder),
    )
    return _with_skip(plain, tensors["W_skip"]) if skips else plain


def write(artefact: SaeArtefact, path: Path) -> None:
    """Raises: MismatchError for what is not topk, ShapeError for a transcoder to another width."""
    if artefact.architecture != "topk" or artefact.k is None:
        raise refused(path, f"a {artefact.saved_name} SAE", "a topk SAE, the only kind that sparsify has")
    if artefact.d_out != artefact.d_model:
        fix = "Choose another format."
        raise ShapeError(path, expected=f"an output of width {artefact.d_model}", got=artefact.d_out, fix=fix)
    ours = folds.with_subtraction(artefact)
    tensors = {"encoder.weight": ours.W_enc.T, "encoder.bias": ours.b_enc, "W_dec": ours.W_dec, "b_dec": ours.b_dec}
    if ours.W_skip is not None:
        tensors["W_skip"] = ours.W_skip
    has_unit_rows = bool(np.allclose(np.linalg.norm(ours.W_dec, axis=1), 1, atol=1e-3))
    config = {
        "activation": "topk",
        "expansion_factor": max(1, ours.d_sae // ours.d_model),
        "normalize_decoder": has_unit_rows,
        "num_latents": ours.d_sae,
        "k": ours.k,
        "multi_topk": False,
        "skip_connection": ours.W_skip is not None,
        "transcode": ours.transcodes,
        "d_in": ours.d_model,
    }
    with new_directory(path) as new:
        packed = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
        save_file(packed, new / SPARSIFY_WEIGHTS)
        write_json(new / CONFIG, config)


def _shapes(d_model: int, d_sae: int, skips: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_model),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
    }
    return shapes | ({"W_skip": (d_model, d_model)} if skips else {})


def _with_skip(plain: SaeArtefact, W_skip: np.ndarray) -> SaeArtefact:
    """sparsify multiplies the input as it is, whether or not b_dec is subtracted before the encoder."""
    return replace(folds.without_subtraction(plain), transcodes=True, W_skip=W_skip)


def _metadata(path: Path, is_transcoder: bool) -> dict[str, Any]:
    """The folder's name is the path of a module, of which a transcoder reads the input and writes the output."""
    return provenance("sparsify", None if is_transcoder else from_block(path.name), hookpoint=path.name)

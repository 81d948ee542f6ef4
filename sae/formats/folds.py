"""What other projects compute differently, folded into weights that compute the same.

Each fold is exact up to float32 rounding: sums over a bias are taken in float64. Left out: normalisation of each token
by its own mean or norm, which no fixed weights can do.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from sae.artefact import SaeArtefact

COLUMNS = 4096
_QUIET = np.errstate(over="ignore", invalid="ignore")  # SaeArtefact refuses what overflows


@_QUIET
def gated(
    W_enc: Float[np.ndarray, "d_model d_sae"],
    b_gate: Float[np.ndarray, " d_sae"],
    b_mag: Float[np.ndarray, " d_sae"],
    r_mag: Float[np.ndarray, " d_sae"],
) -> dict[str, np.ndarray]:
    """W_enc, b_enc and threshold of the jumprelu that a gated SAE is.

    It has latents 1[x W + b_gate > 0] * relu(x W exp(r_mag) + b_mag). The first condition, times exp(r_mag) and with
    b_mag added, says pre > b_mag - b_gate exp(r_mag), where pre is what the relu is of. Source: Rajamanoharan et al.
    2024, arXiv:2404.16014, appendix on weight tying.
    """
    scale = np.exp(r_mag)
    return {"W_enc": W_enc * scale, "b_enc": b_mag, "threshold": b_mag - b_gate * scale}


@_QUIET
def decoder_norms(
    W_enc: Float[np.ndarray, "d_model d_sae"],
    b_enc: Float[np.ndarray, " d_sae"],
    W_dec: Float[np.ndarray, "d_sae d_out"],
) -> dict[str, np.ndarray]:
    """The same three for an SAE that measures latents by the norm of their decoder row: pre * n, latents @ (W_dec / n).

    A threshold, if there is one, is compared with pre * n and stays as it is. A row of norm 0 stays 0.
    """
    norms = np.linalg.norm(W_dec.astype(np.float64), axis=1).astype(np.float32)
    rows = W_dec / np.where(norms > 0, norms, 1)[:, None]
    return {"W_enc": W_enc * norms, "b_enc": b_enc * norms, "W_dec": rows}


@_QUIET
def input_scale(tensors: Mapping[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """Tensors that do with x what these do with scale * x, the output divided by the scale again; latents stay."""
    small = np.float32(1 / scale)
    return {
        **tensors,
        "W_enc": tensors["W_enc"] * np.float32(scale),
        "W_dec": tensors["W_dec"] * small,
        "b_dec": tensors["b_dec"] * small,
    }


def without_subtraction(artefact: SaeArtefact) -> SaeArtefact:
    """The same SAE with b_dec no longer subtracted: b_enc - b_dec @ W_enc."""
    if not artefact.apply_b_dec_to_input:
        return artefact
    b_enc = (artefact.b_enc - _projected(artefact)).astype(np.float32)
    return replace(artefact, b_enc=b_enc, apply_b_dec_to_input=False)


def with_subtraction(artefact: SaeArtefact) -> SaeArtefact:
    """The same SAE with b_dec subtracted: b_enc + b_dec @ W_enc. A transcoder has no such form and stays as it is."""
    if artefact.apply_b_dec_to_input or artefact.transcodes:
        return artefact
    b_enc = (artefact.b_enc + _projected(artefact)).astype(np.float32)
    return replace(artefact, b_enc=b_enc, apply_b_dec_to_input=True)


@_QUIET
def _projected(artefact: SaeArtefact) -> Float[np.ndarray, " d_sae"]:
    """b_dec @ W_enc in float64, a few columns at a time, since a float64 copy of W_enc may not fit in memory."""
    b_dec, parts = artefact.b_dec.astype(np.float64), -(-artefact.d_sae // COLUMNS)
    return np.concatenate([b_dec @ part.astype(np.float64) for part in np.array_split(artefact.W_enc, parts, axis=1)])

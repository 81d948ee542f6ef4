"""Which latents another SAE has too: of another seed, width or recipe, at the same hook point.

    mean max cosine   mean over latents of the largest cosine of its decoder row with one of the other SAE (MMCS)
    shared            share of latents that are mutual nearest neighbours of a latent there, by decoder row, with a
                      cosine above 0.7 of both decoder rows and both encoder columns
    matched cosine    mean cosine under the one-to-one assignment with the largest sum (Hungarian), where there are at
                      most 4096 latents on either side

Latents that no held-out token activated are left out of ours, since they match by chance alone; the other SAE's are all
there. Random directions in the other's place show what that many rows reach by chance. After Paulo and Belrose (arXiv
2501.16615) and Song et al. (2505.20254). Nearest rows are exact, in blocks, whatever d_sae is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from activations.errors import MismatchError
from sae.artefact import SaeArtefact
from sae.cosines import nearest
from sae.metrics import means
from sae.torch_view import TorchSae

SHARED_COSINE, MAX_ASSIGNED = 0.7, 4096


def load_others(paths: Sequence[Path], artefact: SaeArtefact) -> dict[str, SaeArtefact]:
    """The SAEs to compare with, by path; raises MismatchError for one of another model or hook point."""
    others = {}
    for path in paths:
        other = SaeArtefact.load(path)
        ours, theirs = (_place(sae) for sae in (artefact, other))
        if ours != theirs:
            raise MismatchError(
                path, expected=f"an SAE of {_said(ours)}", got=_said(theirs), fix="Compare SAEs of one model and place."
            )
        others[str(path)] = other
    return others


def stability(
    sae: TorchSae, others: dict[str, SaeArtefact], live: Bool[np.ndarray, " d_sae"], seed: int
) -> dict[str, Any]:
    """Match the live latents with those of each other SAE; returns rows of scores by its path."""
    alive = torch.from_numpy(np.flatnonzero(live)).to(sae.W_dec.device)
    ours = sae.W_dec[alive], sae.W_enc.T[alive]
    result = {}
    for path, artefact in others.items():
        theirs = tuple(torch.from_numpy(rows).to(sae.W_dec) for rows in (artefact.W_dec, artefact.W_enc.T.copy()))
        generator = torch.Generator().manual_seed(seed)
        chance = tuple(torch.randn(rows.shape, generator=generator).to(rows) for rows in theirs)
        rows = {"sae": match(ours, theirs, seed), "random_directions": match(ours, chance, seed)}
        result[path] = {"n_latents": len(alive), "n_other": artefact.d_sae, "rows": rows}
    return result


def match(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], seed: int) -> dict[str, Any]:
    """Scores of decoder rows and encoder columns, [latent, d] each, against those of others."""
    if not len(ours[0]):
        return {"mean_max_cosine": None, "shared": None, "matched_cosine": None}
    forth, to = (part[:, 0] for part in nearest(ours[0], theirs[0], 1))
    back = nearest(theirs[0], ours[0], 1)[1][:, 0]
    is_mutual = back[to] == torch.arange(len(to), device=to.device)
    encoders = functional.cosine_similarity(ours[1], theirs[1][to], dim=1)
    is_shared = is_mutual & (forth > SHARED_COSINE) & (encoders > SHARED_COSINE)
    values = {"mean_max_cosine": forth, "shared": is_shared}
    row = means({name: units.double().cpu().numpy() for name, units in values.items()}, seed)
    return row | {"matched_cosine": _assigned(ours[0], theirs[0])}


def _assigned(ours: Float[Tensor, "n d"], theirs: Float[Tensor, "m d"]) -> float | None:
    from scipy.optimize import linear_sum_assignment

    if max(len(ours), len(theirs)) > MAX_ASSIGNED:
        return None
    cosines = (functional.normalize(ours, dim=1) @ functional.normalize(theirs, dim=1).T).cpu().numpy()
    return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())


def _place(sae: SaeArtefact) -> tuple[str | None, str, int, int]:
    return sae.metadata.get("model", {}).get("fingerprint"), sae.hook_point, sae.d_model, sae.d_out


def _said(place: tuple[str | None, str, int, int]) -> str:
    fingerprint, hook_point, d_model, d_out = place
    return f"model {(fingerprint or 'unknown')[:12]} at {hook_point}, widths {d_model} and {d_out}"

"""What an SAE has to beat, as SAEs themselves, so that whatever scores an SAE scores them too.

    random_sae   as wide and as sparse as the SAE, with random directions instead of learnt ones (frozen, untrained)
    pca          the principal components of the activations, as many as the SAE has active latents

Scores that a random SAE reaches as well say nothing about what was learnt (arXiv 2602.14111). Left out: baselines that
need labels, which are beside what they are compared with.
"""

import numpy as np
import torch
from jaxtyping import Float

from sae.artefact import SaeArtefact
from sae.torch_view import TorchSae

FIT_TOKENS = 16_384
"""tokens of the training part that baselines are fitted to"""
THRESHOLD_TOKENS = 1024


def random_sae(sae: TorchSae, x: Float[np.ndarray, "token d_model"], seed: int) -> TorchSae:
    """An SAE of random unit directions d_i, which reads x . d_i and is active above one threshold for all latents.

    Args:
      sae: whose width it has, and whose mean L0 on x, to which the threshold is set.
      x: activations to fit to: mean, threshold, and the one factor on the decoder that leaves the least error.
    """
    rng, mean = np.random.default_rng(seed), x.mean(axis=0, dtype=np.float64).astype(np.float32)
    directions = rng.standard_normal((sae.d_sae, sae.d_model), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    part = torch.from_numpy(x[:: max(1, len(x) // THRESHOLD_TOKENS)][:THRESHOLD_TOKENS]).to(sae.W_enc)
    with torch.inference_mode():
        n_active = int((sae.encode(part) > 0).sum())
        pre = (part - torch.from_numpy(mean).to(part)) @ torch.from_numpy(directions).to(part).T
        rank = min(max(pre.numel() - n_active, 1), pre.numel())
        threshold = max(float(pre.flatten().kthvalue(rank).values), 0.0)
        latents = torch.where(pre > threshold, pre, 0)
        decoded = latents @ torch.from_numpy(directions).to(part)
        wanted = part - torch.from_numpy(mean).to(part)
        factor = float((wanted * decoded).sum() / decoded.square().sum().clamp(min=1e-12))
    return TorchSae(
        SaeArtefact(
            "jumprelu",
            W_enc=np.ascontiguousarray(directions.T),
            b_enc=np.zeros(sae.d_sae, np.float32),
            W_dec=np.float32(factor) * directions,
            b_dec=mean,
            threshold=np.full(sae.d_sae, threshold, np.float32),
            metadata=sae.metadata,
        )
    ).to(sae.W_enc.device)


def pca_sae(sae: TorchSae, x: Float[np.ndarray, "token d_model"], k: int) -> TorchSae:
    """The first k principal components of x, each as two latents, one for either sign, so that L0 is k."""
    mean = x.mean(axis=0, dtype=np.float64)
    centred = (x - mean).astype(np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    rows = vectors[:, ::-1][:, :k].T.astype(np.float32)
    both = np.concatenate([rows, -rows])
    return TorchSae(
        SaeArtefact(
            "standard",
            W_enc=np.ascontiguousarray(both.T),
            b_enc=np.zeros(len(both), np.float32),
            W_dec=both,
            b_dec=mean.astype(np.float32),
            metadata=sae.metadata,
        )
    ).to(sae.W_enc.device)

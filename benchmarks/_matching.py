"""Which latents of one SAE another one has too, by the cosines of their decoder rows."""

import numpy as np
import torch
from jaxtyping import Float


def unit_rows(W_dec: Float[np.ndarray, "latent d_model"]) -> Float[torch.Tensor, "latent d_model"]:
    """Rows of norm 1, on the GPU if there is one."""
    rows = torch.from_numpy(W_dec).to("cuda" if torch.cuda.is_available() else "cpu")
    return torch.nn.functional.normalize(rows, dim=1)


def best_cosines(
    rows: Float[torch.Tensor, "n d_model"], others: Float[torch.Tensor, "m d_model"]
) -> Float[torch.Tensor, " n"]:
    """For each unit row, its largest cosine with any of the others."""
    return (rows @ others.T).max(dim=1).values


def agreement(dictionaries: list[Float[torch.Tensor, "latent d_model"]], cosine: float) -> dict[str, float]:
    """How alike the decoder rows of several SAEs are; rows have norm 1, and there are two SAEs at least.

    Returns: matched, the share of rows that another SAE has with a cosine of `cosine` or more, and mean_best_cosine;
      both are means over all ordered pairs of SAEs.
    """
    best = [best_cosines(a, b) for a in dictionaries for b in dictionaries if a is not b]
    return {
        "matched": round(float(torch.stack([(x >= cosine).double().mean() for x in best]).mean()), 4),
        "mean_best_cosine": round(float(torch.stack([x.mean() for x in best]).mean()), 4),
    }

"""Measures of an SAE on stored activations, a part at a time, so that memory grows neither with tokens nor with d_sae.

Left out: what the numbers mean, which is in `sae.metrics`; the language model.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.progress import progress
from activations.store import ActivationStore
from sae.cosines import nearest
from sae.data import statistics, used_tokens
from sae.metrics import ACTIVATION_EDGES, Activity, Evaluation
from sae.torch_view import TorchSae
from sae.wiring import Wiring, side_by_side

BLOCK_SEQUENCES = 32
LATENTS_AT_ONCE = 1 << 25
"""cells of a matrix of latents in memory, 128 MiB of float32"""


class Part(NamedTuple):
    """Tokens of the store that fit through an SAE at once."""

    x: Float[np.ndarray, "token d_in"]
    """what the SAE reads"""
    y: Float[np.ndarray, "token d_out"]
    """what it should give"""
    documents: Int[np.ndarray, " token"]
    """document of each token"""


def reconstruction(store: ActivationStore, wiring: Wiring, sae: TorchSae, start: int, stop: int) -> Evaluation:
    """Measure on the unmasked tokens of sequences start..stop."""
    mean = np.concatenate([statistics(store, name).mean for name in wiring.writes])
    evaluation = Evaluation(mean, sae.d_sae)
    with progress("reconstruct", int(store.mask(start, stop).sum()), "tok") as advance:
        for part in _parts(store, wiring, sae.d_sae, start, stop):
            with torch.inference_mode():
                x = torch.from_numpy(part.x).to(sae.W_enc.device)
                latents = sae.encode(x)
                y_hat = sae.reconstruct(x.to(latents), latents)
                evaluation.add(part.y, y_hat.cpu().numpy(), activity_on_device(latents), part.documents)
            advance(len(part.x))
    return evaluation


def activity_on_device(latents: Float[Tensor, "batch d_sae"]) -> Activity:
    """`sae.metrics.activity`, counted where the latents are."""
    above = latents > 0
    logs = latents[above].double().log10()
    edges = torch.from_numpy(ACTIVATION_EDGES).to(logs.device)
    bins = (torch.bucketize(logs, edges, right=True) - 1).clamp(0, len(edges) - 2)
    parts = above.sum(1), torch.relu(latents).sum(1, dtype=torch.float64), above.sum(0)
    counts = torch.bincount(bins, minlength=len(edges) - 1)
    return Activity(*(part.cpu().numpy() for part in (*parts, counts)))


def _parts(store: ActivationStore, wiring: Wiring, d_sae: int, start: int, stop: int) -> Iterator[Part]:
    step = max(1, LATENTS_AT_ONCE // d_sae)
    for first in range(start, stop, BLOCK_SEQUENCES):
        last = min(first + BLOCK_SEQUENCES, stop)
        used = {name: used_tokens(store, name, first, last) for name in wiring.hook_points}
        x, y = side_by_side(used, wiring.reads), side_by_side(used, wiring.writes)
        documents = np.repeat(store.documents(first, last), store.mask(first, last).sum(axis=1))
        for i in range(0, len(x), step):
            yield Part(x[i : i + step], y[i : i + step], documents[i : i + step])


def cosine_spectrum(rows: Float[Tensor, "d_sae d"], seed: int) -> dict[str, Any]:
    """How alike directions are: the largest cosine of each row with another, beside random directions.

    Returns: edges from -1 to 1 by 0.02, counts of the rows and of as many random ones, and both means.
    """
    chance = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).to(rows)
    edges, result = np.linspace(-1, 1, 101), {}
    for name, part in (("", rows), ("random_", chance)):
        values = nearest(part, part, 1, same=True)[0][:, 0].cpu().double().clamp(-1, 1).numpy()
        result[f"{name}counts"] = np.histogram(values, edges)[0].tolist()
        result[f"{name}mean"] = float(values.mean())
    return {"edges": edges.round(2).tolist(), **result}

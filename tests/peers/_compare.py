"""What the scripts that run in peers' environments share; only numpy and torch are needed.

Folders of SAEs are laid out as conftest.py says.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

D_MODEL, D_SAE, K, N_TOKENS = 24, 80, 6, 64
Encode = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def compare(folder: Path, encode: Encode, reconstruct: Encode, **about: object) -> None:
    """Print one JSON line: the largest differences over the largest reference values, and what else is known."""
    reference = np.load(folder / "reference.npz")
    x = torch.tensor(reference["x"])
    result = {
        "name": folder.name,
        "encode": difference(encode(x), reference["latents"]),
        "reconstruct": difference(reconstruct(x), reference["reconstruction"]),
    }
    sys.stdout.write(json.dumps({**result, **about}) + "\n")


@torch.no_grad()
def keep_reference(folder: Path, encode: Encode, reconstruct: Encode) -> None:
    """Write what the peer makes of random inputs beside an SAE that it saved."""
    x = torch.randn(N_TOKENS, D_MODEL)
    outputs = {"latents": encode(x).float().numpy(), "reconstruction": reconstruct(x).float().numpy()}
    np.savez(folder / "reference.npz", x=x.numpy(), **outputs)


@torch.no_grad()
def randomise(module: torch.nn.Module, positive: tuple[str, ...] = ()) -> None:
    """Give every parameter random values, those named in `positive` positive ones."""
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape)
        parameter.copy_(values.abs() if name in positive else values)


def difference(got: torch.Tensor, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest expected value."""
    return float(np.abs(got.float().numpy() - expected).max() / np.abs(expected).max())

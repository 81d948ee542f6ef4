"""Sparse codes: which latents are active on which tokens, and how much, without the zeros between them."""

from typing import NamedTuple, cast

from jaxtyping import Float, Int
from torch import Tensor

from sae.torch_view import TorchSae


class Codes(NamedTuple):
    """The active latents of some tokens, by token, and those of a token by latent."""

    row: Int[Tensor, " entry"]
    """which of the tokens"""
    latent: Int[Tensor, " entry"]
    """which latent"""
    value: Float[Tensor, " entry"]
    """its activation, above 0"""


def select(sae: TorchSae, pre: Float[Tensor, "token d_sae"]) -> Codes:
    """What `sae.encode` makes of tokens with these pre-activations."""
    if sae.architecture == "topk":
        values, latents = pre.topk(cast(int, sae.k), dim=-1)
        latents, order = latents.sort(dim=-1)
        values = values.gather(-1, order)
        row, place = (values > 0).nonzero(as_tuple=True)
        return Codes(row, latents[row, place], values[row, place])
    least = 0.0 if sae.architecture == "standard" else sae.threshold.clamp(min=0)
    flat = (pre > least).flatten().nonzero().squeeze(1)
    row = flat // sae.d_sae
    return Codes(row, flat - row * sae.d_sae, pre.flatten()[flat])

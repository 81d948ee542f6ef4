"""A saved SAE as a PyTorch module, for steering and for reading features; no JAX.

The arithmetic is that of `sae.artefact.SaeArtefact`, in float32 whatever the model runs in: bfloat16 pre-activations
fall on too few values to compare with a threshold. Left out: training.
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from activations.errors import ShapeError
from sae.artefact import SaeArtefact


class TorchSae(nn.Module):
    """Encode and decode raw activations with a saved SAE."""

    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_dec: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " d_sae"]

    def __init__(self, artefact: SaeArtefact):
        """Take the weights over as buffers."""
        super().__init__()
        self.architecture, self.k = artefact.architecture, artefact.k
        self.metadata = artefact.metadata
        for name, tensor in artefact.tensors().items():
            self.register_buffer(name, torch.tensor(tensor))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """All latents of each token; raises ShapeError for another width."""
        pre = self._preactivations(x, self.W_enc, self.b_enc)
        if self.architecture == "jumprelu":
            return torch.where(pre > self.threshold, torch.relu(pre), 0)
        values, indices = torch.relu(pre).topk(cast(int, self.k), dim=-1)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def encode_some(self, x: Float[Tensor, "*batch d_model"], latents: Int[Tensor, " n"]) -> Float[Tensor, "*batch n"]:
        """`encode(x)[..., latents]`; for jumprelu at the cost of n latents instead of d_sae."""
        if self.architecture == "topk":
            return self.encode(x)[..., latents]
        pre = self._preactivations(x, self.W_enc[:, latents], self.b_enc[latents])
        return torch.where(pre > self.threshold[latents], torch.relu(pre), 0)

    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        """latents @ W_dec + b_dec."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Reconstruct x."""
        return self.decode(self.encode(x))

    def _preactivations(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise ShapeError(
                "TorchSae: activations",
                expected=f"width d_model={self.d_model}",
                got=x.shape[-1],
                fix="Use an SAE that was trained on this model.",
            )
        return (x.to(W_enc.dtype) - self.b_dec) @ W_enc + b_enc

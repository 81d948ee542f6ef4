"""A saved SAE as a PyTorch module, for steering and for reading features; no JAX.

The arithmetic is that of `sae.artefact.SaeArtefact`, in float32 whatever the model runs in: bfloat16 pre-activations
fall on too few values to compare with a threshold. Left out: training.
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from activations.errors import ShapeError
from sae.artefact import SaeArtefact


class TorchSae(nn.Module):
    """Encode and reconstruct raw activations with a saved SAE."""

    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]
    W_skip: Float[Tensor, "d_out d_model"]

    def __init__(self, artefact: SaeArtefact):
        """Take the weights over as buffers."""
        super().__init__()
        self.architecture, self.k = artefact.architecture, artefact.k
        self.apply_b_dec_to_input, self.skips = artefact.apply_b_dec_to_input, artefact.W_skip is not None
        self.metadata = artefact.metadata
        for name, tensor in artefact.tensors().items():
            self.register_buffer(name, torch.tensor(tensor))

    @property
    def d_model(self) -> int:
        """Width of what it reads."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    def preactivations(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """(x - b_dec) @ W_enc + b_enc, or without b_dec: what the rule picks active latents from."""
        return self._linear(x, self.W_enc, self.b_enc)

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """All latents of each token; raises ShapeError for another width."""
        pre = self.preactivations(x)
        if self.architecture == "topk":
            values, indices = torch.relu(pre).topk(cast(int, self.k), dim=-1)
            return torch.zeros_like(pre).scatter(-1, indices, values)
        return self._activate(pre, slice(None))

    def encode_some(self, x: Float[Tensor, "*batch d_model"], latents: Int[Tensor, " n"]) -> Float[Tensor, "*batch n"]:
        """`encode(x)[..., latents]`; unless it is topk, at the cost of n latents instead of d_sae."""
        if self.architecture == "topk":
            return self.encode(x)[..., latents]
        return self._activate(self._linear(x, self.W_enc[:, latents], self.b_enc[latents]), latents)

    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """latents @ W_dec + b_dec: what the latents write."""
        return latents @ self.W_dec + self.b_dec

    def reconstruct(
        self, x: Float[Tensor, "*batch d_model"], latents: Float[Tensor, "*batch d_sae"]
    ) -> Float[Tensor, "*batch d_out"]:
        """What it makes of x with these latents: `decode(latents)`, and x @ W_skip.T more in a skip transcoder."""
        decoded = self.decode(latents)
        return decoded + x.to(self.W_skip.dtype) @ self.W_skip.T if self.skips else decoded

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstruct x, or what a transcoder predicts from it."""
        return self.reconstruct(x, self.encode(x))

    def _activate(self, pre: Tensor, latents: slice | Tensor) -> Tensor:
        if self.architecture == "standard":
            return torch.relu(pre)
        return torch.where(pre > self.threshold[latents], torch.relu(pre), 0)

    def _linear(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise ShapeError(
                "TorchSae: activations",
                expected=f"width d_model={self.d_model}",
                got=x.shape[-1],
                fix="Use an SAE that was trained on this model.",
            )
        x = x.to(W_enc.dtype)
        return functional.linear(x - self.b_dec if self.apply_b_dec_to_input else x, W_enc.mT, b_enc)

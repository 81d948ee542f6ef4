"""What the weights alone say of each latent: the tokens it speaks for.

Left out: whatever needs a text; the latents that are like it (`sae.cosines`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.models import LoadedModel

_LENS_ROWS = 256


class Lens(NamedTuple):
    """The logit lens of each decoder row."""

    top: Int[Tensor, "d_sae n"]
    """tokens whose logits it raises most"""
    top_values: Float[Tensor, "d_sae n"]
    """by how much, a unit of activation"""
    bottom: Int[Tensor, "d_sae n"]
    """tokens whose logits it lowers most"""
    bottom_values: Float[Tensor, "d_sae n"]
    """by how much, a unit of activation; negative"""
    entropy: Float[Tensor, " d_sae"]
    """nats, 0..log(vocabulary): of the softmax of the row's own logits"""


def logit_lens(loaded: LoadedModel, W_dec: Float[Tensor, "d_sae d_out"], n: int) -> Lens:
    """Final norm and unembedding of each decoder row; of one that writes several hook points, of its last part.

    The norm is applied to the row itself, less what it makes of nothing (a bias), so that gain and centring of any
    kind of norm count. Changes of logits leave out the norm's data-dependent scale, which stretches all logits of a
    token alike, and are centred. The entropy is that of the prediction if the row were all there is in the residual
    stream, where the norm sets the scale: low for a latent that speaks for a few tokens.
    Source: logit lens, nostalgebraist 2020, lesswrong.com/posts/AcKRB8wDpdaN6v6ru.
    """
    unembedding = loaded.family.lm_head(loaded.model).weight.detach().float()  # type: ignore[union-attr]
    parts = []
    for rows in W_dec[:, -loaded.d_model :].split(_LENS_ROWS):
        rows = rows.to(loaded.device)
        with torch.inference_mode():
            logits = _normed(loaded, rows) @ unembedding.T
            logits -= logits.mean(dim=1, keepdim=True)
            log_p = logits.log_softmax(1)
            entropy = -(log_p.exp() * log_p).sum(1)
            logits *= rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5
            top, bottom = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
        parts.append(tuple(t.cpu() for t in (top.indices, top.values, bottom.indices, bottom.values, entropy)))
    return Lens(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _normed(loaded: LoadedModel, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """What the final norm makes of directions, less what it makes of nothing."""
    norm = loaded.family.final_norm(loaded.model)
    large = (1e3 * rows).to(dtype=loaded.dtype)  # far above the norm's epsilon
    return (norm(large) - norm(torch.zeros_like(large[:1]))).float()

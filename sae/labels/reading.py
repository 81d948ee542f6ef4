"""What the indexed model makes of contexts: which latents are active in them, and what stands for a text as a whole.

Each is read alone, with a BOS where the tokenizer has one, as in `sae.index_effects`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from activations.progress import progress
from activations.tokens import bos_ids
from sae.contexts import Context
from sae.torch_view import TorchSae
from sae.wiring import Wiring

BATCH_TOKENS = 2048


def active_in(
    loaded: LoadedModel, sae: TorchSae, wiring: Wiring, contexts: Sequence[Context]
) -> Bool[np.ndarray, "n d_sae"]:
    """Which latents are active on some token of each context."""
    found = [np.zeros((0, sae.d_sae), bool)]
    points = [HookPoint.parse(name) for name in wiring.reads]
    with progress("negatives", len(contexts), "contexts") as advance:
        for x, used in _read(loaded, points, [context.tokens.tolist() for context in contexts]):
            latents = sae.encode(x) > 0
            found.append((latents & used[..., None]).any(1).cpu().numpy())
            advance(len(x))
    return np.concatenate(found)


def pooled(loaded: LoadedModel, texts: Sequence[str]) -> Float[np.ndarray, "n d_model"]:
    """Mean of the last residual stream over the tokens of each text but the first."""
    found = [np.zeros((0, loaded.d_model), np.float32)]
    rows = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for x, used in _read(loaded, [HookPoint("resid_post", loaded.n_layers - 1)], rows):
        total = (x * used[..., None]).sum(1)
        found.append((total / used.sum(1).clamp(min=1)[:, None]).cpu().numpy())
    return np.concatenate(found)


def _read(
    loaded: LoadedModel, points: Sequence[HookPoint], texts: Sequence[list[int]]
) -> Iterator[tuple[Float[Tensor, "batch pos d"], Bool[Tensor, "batch pos"]]]:
    """What is at hook points, side by side, and which of it counts: no padding, and not the first token."""
    bos = bos_ids(loaded.tokenizer)
    rows = [[*bos, *text] for text in texts]
    n = max(1, BATCH_TOKENS // max(map(len, rows), default=1))
    for start in range(0, len(rows), n):
        part = [torch.tensor(row) for row in rows[start : start + n]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(loaded.device)
        lengths = torch.tensor([len(row) for row in part], device=loaded.device)
        at = torch.arange(ids.shape[1], device=loaded.device)
        used = (at > 0) & (at < lengths[:, None])
        with capture(loaded.model, loaded.family, points, stop_after_last=True) as captured:
            run_until(loaded.model, {"input_ids": ids})
        yield torch.cat([captured[point].float() for point in points], dim=-1), used

"""What the indexed model writes while a latent is amplified, as answers to requests, so that texts are kept as such.

Amplified means that `dose` mean norms of what the SAE writes at, measured over the prompt's tokens but the first, are
added along the latent's decoder row on every token but the first, at all hook points that it writes. Left out: what is
asked about the texts (`sae.labels.questions`), and how well a latent steers (`sae.index_effects`).
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from activations.generate import generate
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from sae.index_effects import written
from sae.labels.chat import Message, Reply, Request
from sae.labels.config import ScoringConfig
from sae.torch_view import TorchSae
from sae.wiring import Wiring

PROMPTS = (
    "The first thing I noticed was",
    "People often say that",
    "In the end, what we found",
    "Yesterday they told us about",
    "It is well known that the",
    "She opened the letter and",
    "There is one more reason why",
    "On the way home he thought of",
)
"""neutral beginnings of texts"""
NOTHING = -1
"""in place of a latent: the model as it is"""
BATCH = 16


class Amplifier:
    """A `Chat` that goes on with a prompt while the request's latent is amplified."""

    price_in = price_out = 0.0
    max_answer_tokens = 0
    """that are paid for"""

    def __init__(
        self, loaded: LoadedModel, sae: TorchSae, wiring: Wiring, sae_sha256: str, scoring: ScoringConfig, seed: int
    ):
        self._loaded, self._sae, self._wiring, self._scoring, self._seed = loaded, sae, wiring, scoring, seed
        self.name = f"amplified:{loaded.id}"
        self.settings: Mapping[str, Any] = {
            "fingerprint": loaded.fingerprint,
            "sae_sha256": sae_sha256,
            "dose": scoring.dose,
            "max_new_tokens": scoring.max_new_tokens,
            "seed": seed,
        }

    def requests(self, latent: int) -> list[Request]:
        """What to ask of a latent, or of NOTHING: a text behind each prompt."""
        return [
            Request("amplified", latent, (Message("system", f"latent {latent}"), Message("user", prompt)))
            for prompt in PROMPTS[: self._scoring.n_prompts]
        ]

    def count(self, messages: tuple[Message, ...]) -> int:
        """Tokens that are paid for: none."""
        return 0

    async def answers(self, requests: Iterable[Request]) -> AsyncIterator[tuple[Request, Reply]]:
        """Texts, those behind the same prompt together."""
        by_prompt: dict[str, list[Request]] = {}
        for request in requests:
            by_prompt.setdefault(request.messages[-1].content, []).append(request)
        for prompt, same in by_prompt.items():
            for start in range(0, len(same), BATCH):
                batch = same[start : start + BATCH]
                for request, text in zip(batch, self._texts(prompt, batch), strict=True):
                    yield request, Reply(text)
                await asyncio.sleep(0)  # so that Ctrl-C is heard

    def _texts(self, prompt: str, batch: list[Request]) -> list[str]:
        rows = torch.stack([self._row(request.latent) for request in batch])
        size, seed = self._scoring.max_new_tokens, self._seed + PROMPTS.index(prompt)
        return amplified(self._loaded, self._wiring, rows, prompt, self._scoring.dose, size, seed)

    def _row(self, latent: int) -> Float[Tensor, " d_out"]:
        return torch.zeros_like(self._sae.W_dec[0]) if latent == NOTHING else self._sae.W_dec[latent]


def amplified(
    loaded: LoadedModel,
    wiring: Wiring,
    rows: Float[Tensor, "n d_out"],
    prompt: str,
    dose: float,
    max_new_tokens: int,
    seed: int,
) -> list[str]:
    """What the model writes behind `prompt` with each of `rows` amplified; a row of zeros amplifies nothing."""
    points = [HookPoint.parse(name) for name in wiring.writes]
    ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]], device=loaded.device)
    with capture(loaded.model, loaded.family, points) as captured:
        run_until(loaded.model, {"input_ids": ids})
    norm = torch.cat([captured[point].float() for point in points], -1)[0, 1:].norm(dim=1).mean()
    rows = rows.to(loaded.device)
    deltas = dose * norm * rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-9)
    with written(loaded, wiring, deltas[:, None], _added):
        return generate(loaded, [prompt] * len(rows), max_new_tokens=max_new_tokens, seed=seed)


def _added(delta: Float[Tensor, "batch 1 d"], h: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
    """With `delta` on every token but the first of the text: all rows begin together, without padding."""
    is_start = h.shape[1] > 1
    spared = h[:, :1] if is_start else h[:, :0]
    return torch.cat([spared, h[:, spared.shape[1] :] + delta.to(h)], dim=1)

"""What a latent does in the running model: whether it can steer, and what a text costs without it.

What activates a latent says little about what it does (Arad et al. 2025, arXiv:2505.20063; Wang et al. 2025,
arXiv:2510.03659: Kendall's tau_b of 0.3 between how interpretable latents are and how well they steer), so it is
measured:

    output score       (1 - r / vocabulary) * p, where p is the largest probability, and r the best rank from 0, that
                       any of the LENS_TOKENS tokens of its logit lens has as the next token of a neutral prompt after
                       the latent is amplified. 0..1; above about 0.01 a latent says what its logits say (2505.20063)
    confidence change  C(amplified) - C(prompt), where C = -1/k sum of log p over the k = LENS_TOKENS likeliest next
                       tokens, in nats: large where the mass is on few tokens. It follows the criterion of 2510.03659,
                       how much amplifying changes the next token's distribution, with the token confidence of Fu et
                       al. 2025 (arXiv:2508.15260)
    ablation effect    mean over the tokens behind a context's peak of loss without the latent - loss with it, in nats
                       a token; positive where it helps to predict. The window alone is read, with a BOS where the
                       tokenizer has one, and the latent's part is taken out at every token but the first

Amplified means AMPLIFY times the largest activation of any latent on the prompt's last token, added along the decoder
row there, as in the code of 2505.20063. Left out: generated text, which `steer.measures.effect` measures.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from activations.hook_points import HookPoint
from activations.hooks import capture, edit, run_until
from activations.models import LoadedModel
from activations.progress import progress
from activations.tokens import bos_ids
from sae.config import IndexConfig
from sae.index_pass import Statistics
from sae.index_weights import Lens
from sae.priorities import LARGEST
from sae.reservoir import NO_TOKEN
from sae.torch_view import TorchSae
from sae.wiring import Wiring

PROMPT = "From my experience,"
AMPLIFY = 10.0
LENS_TOKENS = 20
BATCH_TOKENS = 1024
"""of windows that run together"""
STEERED = 256
"""latents that are amplified together"""


class Effects(NamedTuple):
    """By latent; NaN where not measured."""

    output_score: Float[Tensor, " d_sae"]
    confidence_change: Float[Tensor, " d_sae"]
    ablation: Float[Tensor, "d_sae n"]
    """of the n strongest contexts"""


def measure_effects(
    config: IndexConfig, loaded: LoadedModel, sae: TorchSae, wiring: Wiring, lens: Lens, found: Statistics
) -> Effects:
    """What the config asks for, of every latent that was active."""
    shapes = (sae.d_sae,), (sae.d_sae,), (sae.d_sae, config.n_ablated)
    effects = Effects(*(torch.full(shape, torch.nan) for shape in shapes))
    if config.output_scores:
        live = found.active.nonzero().squeeze(1).cpu()
        scores = steering_scores(loaded, sae, wiring, lens.top[:, :LENS_TOKENS], live)
        effects.output_score[live], effects.confidence_change[live] = scores
    if config.n_ablated:
        top = found.top.tensors()
        latent, rank = (top["priority"][:, : config.n_ablated] != LARGEST).cpu().nonzero(as_tuple=True)
        tokens = top["tokens"].cpu()[latent, rank]
        rise = ablation_effects(loaded, sae, wiring, tokens, config.window_before, latent)
        effects.ablation[latent, rank] = rise
    return effects


def steering_scores(
    loaded: LoadedModel,
    sae: TorchSae,
    wiring: Wiring,
    lens_tokens: Int[Tensor, "d_sae k"],
    latents: Int[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Output score and confidence change of each of `latents`; NaN if no latent is active on the prompt."""
    ids = torch.tensor([loaded.tokenizer(PROMPT)["input_ids"]], device=loaded.device)
    x, logits = _read(loaded, wiring, ids)
    before = logits[0, -1].log_softmax(-1)
    strength = AMPLIFY * float(sae.encode(x[:, -1]).max())
    scores = [(torch.zeros(0), torch.zeros(0))]
    next_token = _LastToken(loaded, ids)
    with progress("output scores", len(latents), "latents") as advance:
        for part in latents.split(STEERED):
            delta = strength * sae.W_dec[part.to(loaded.device)]
            after = next_token.logits(wiring, delta).log_softmax(-1)
            said = after.gather(1, lens_tokens[part].to(after.device)).amax(1)
            rank = (after > said[:, None]).sum(1)
            change = _confidence(after) - _confidence(before)
            scores.append((((1 - rank / after.shape[1]) * said.exp()).cpu(), change.cpu()))
            advance(len(part))
    output, confidence = (torch.cat(column) for column in zip(*scores, strict=True))
    return (output, confidence) if strength else (output * torch.nan, confidence * torch.nan)


class _LastToken:
    """A prompt whose last token is run with all kinds of things added to it; what is before it is run once."""

    def __init__(self, loaded: LoadedModel, ids: Int[Tensor, "1 pos"]):
        self._loaded, self._last = loaded, ids[:, -1:]
        self._before = run_until(loaded.model, {"input_ids": ids[:, :-1], "use_cache": True}).past_key_values

    def logits(self, wiring: Wiring, delta: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch vocab"]:
        """Logits behind the prompt, with `delta` added to what the SAE writes at its last token."""
        cache = deepcopy(self._before)  # which the pass adds to
        cache.batch_repeat_interleave(len(delta))
        inputs = {"past_key_values": cache, "use_cache": True}
        return _edited(self._loaded, wiring, self._last.expand(len(delta), -1), delta[:, None], inputs)[:, -1]


def ablation_effects(
    loaded: LoadedModel,
    sae: TorchSae,
    wiring: Wiring,
    windows: Int[Tensor, "n window"],
    peak: int,
    latents: Int[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Ablation effect of a latent on each window; NaN where nothing is behind the peak.

    Args:
      windows: token ids, NO_TOKEN outside the text.
      peak: index of the peak in each window.
    """
    effects = [torch.zeros(0)]
    with progress("ablation", len(windows), "contexts") as advance:
        for ids, from_, length, latent in _batches(loaded, windows, peak, latents):
            x, clean = _read(loaded, wiring, ids)
            at = torch.arange(ids.shape[1], device=ids.device)
            used = (at > 0) & (at < length[:, None])
            value = sae.encode(x).gather(2, latent[:, None, None].expand(-1, ids.shape[1], 1)) * used[..., None]
            ablated = _edited(loaded, wiring, ids, -value * sae.W_dec[latent][:, None])
            rise = _losses(ablated, ids) - _losses(clean, ids)
            counted = (at[:-1] >= from_[:, None]) & (at[1:] < length[:, None])
            effects.append(((rise * counted).sum(1) / counted.sum(1)).cpu())  # 0 / 0 is NaN
            advance(len(ids))
    return torch.cat(effects)


def _batches(
    loaded: LoadedModel, windows: Int[Tensor, "n window"], peak: int, latents: Int[Tensor, " n"]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Windows with BOS in front and padding behind: ids, index of the peak, length, latent."""
    bos = torch.tensor(bos_ids(loaded.tokenizer), dtype=windows.dtype)
    rows = [torch.cat([bos, window[window != NO_TOKEN]]) for window in windows]
    places = len(bos) + (windows[:, :peak] != NO_TOKEN).sum(1)
    n = max(1, BATCH_TOKENS // (windows.shape[1] + len(bos)))
    for start in range(0, len(rows), n):
        part = rows[start : start + n]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).long()
        lengths = torch.tensor([len(row) for row in part])
        batch = ids, places[start : start + n], lengths, latents[start : start + n]
        yield tuple(value.to(loaded.device) for value in batch)  # type: ignore[misc]


def _read(
    loaded: LoadedModel, wiring: Wiring, ids: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos vocab"]]:
    """What the SAE reads, and the logits."""
    points = [HookPoint.parse(name) for name in wiring.reads]
    with capture(loaded.model, loaded.family, points) as captured:
        logits = run_until(loaded.model, {"input_ids": ids}).logits
    return torch.cat([captured[point].float() for point in points], dim=-1), logits.float()


def _edited(
    loaded: LoadedModel,
    wiring: Wiring,
    ids: Int[Tensor, "batch pos"],
    delta: Float[Tensor, "batch pos d_out"],
    inputs: Mapping[str, Any] = MappingProxyType({}),
) -> Float[Tensor, "batch pos vocab"]:
    """The logits with `delta` added to what the SAE writes."""
    with written(loaded, wiring, delta, lambda part, h: h + part.to(h)):
        return run_until(loaded.model, {"input_ids": ids, **inputs}).logits.float()


@contextmanager
def written(
    loaded: LoadedModel,
    wiring: Wiring,
    delta: Float[Tensor, "batch pos d_out"],
    add: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Have each pass go on from `add(delta, h)` at all hook points that an SAE writes, each with its own delta."""
    with ExitStack() as stack:
        for name, part in zip(wiring.writes, delta.split(loaded.d_model, dim=-1), strict=True):
            stack.enter_context(edit(loaded.model, loaded.family, HookPoint.parse(name), partial(add, part)))
        yield


def _losses(logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch next"]:
    """Nats of each token given those before it."""
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def _confidence(log_p: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    return -log_p.topk(LENS_TOKENS, dim=-1).values.mean(-1)

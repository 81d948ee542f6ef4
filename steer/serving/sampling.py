"""The next token of one answer, from the scores of all tokens; a function of its own seed, whatever is beside it.

    score  = logit + bias - frequency_penalty * count - presence_penalty * (count > 0)
    p      = softmax(score / temperature) of the top_k likeliest, of those the fewest that have top_p together
    token  = the first at which the cumulative p, in the order of ids, is above a uniform draw

At temperature 0 the likeliest, the lower id of two. Counts are those of what the answer has said. Log probabilities are
the model's own, before any of this, as they are steered.

Left out: stopping (`steer.serving.writing`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEAST_TEMPERATURE = 1e-30
"""float32 has little below it"""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    """token -> what is added to its logit"""
    n_top: int | None = None
    """likeliest tokens whose log probabilities are told; none: not even the token's own"""


class Step(NamedTuple):
    """A token of an answer."""

    token: int
    logprob: float | None
    """nats; none: not asked for"""
    top: list[tuple[int, float]]
    """the likeliest tokens and theirs, likeliest first"""


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._draws = torch.Generator().manual_seed(sampling.seed)  # of the CPU: alike on every device
        self._counts: Counter[int] = Counter()

    def choose(self, scores: Float[Tensor, " vocab"]) -> Int[Tensor, ""]:
        """A token drawn from scores, on their device."""
        sampling = self.sampling
        # Over a tiny temperature logits are infinite, and differences only to the likeliest of no chance.
        p = ((scores - scores.amax()) / max(sampling.temperature, LEAST_TEMPERATURE)).softmax(-1)
        if sampling.top_k is not None or sampling.top_p < 1:
            ordered, at = p.sort(descending=True, stable=True)
            out = ordered.cumsum(-1) - ordered >= sampling.top_p
            if sampling.top_k is not None:
                out[sampling.top_k :] = True
            out[0] = False
            p = torch.zeros_like(p).scatter(0, at, ordered.masked_fill(out, 0.0))
        total = p.double().cumsum(-1)
        drawn = torch.rand((), generator=self._draws, dtype=torch.float64).item() * total[-1]
        # A draw that rounds to the whole may lie behind the last token that has a chance.
        last = torch.where(p > 0, torch.arange(len(p), device=p.device), 0).amax()
        return torch.minimum(torch.searchsorted(total, drawn, right=True), last)

    def said(self, token: int) -> None:
        """Of a token that the answer goes on with."""
        if self.sampling.frequency_penalty or self.sampling.presence_penalty:
            self._counts[token] += 1

    @property
    def changes(self) -> Mapping[int, float]:
        """Token -> what is added to its logit."""
        sampling = self.sampling
        if not self._counts:
            return sampling.bias
        found = dict(sampling.bias)
        for token, count in self._counts.items():
            less = sampling.frequency_penalty * count + sampling.presence_penalty
            found[token] = found.get(token, 0.0) - less
        return found


def pick(samplers: Sequence[Sampler], logits: Float[Tensor, "row vocab"]) -> list[Step]:
    """The next token of each answer, by its own sampler; one wait for the device, whatever the number of rows.

    Args:
      logits: float32; left as they are.
    """
    scores = _changed(samplers, logits)
    chosen = scores.argmax(-1)
    for row, each in enumerate(samplers):
        if each.sampling.temperature > 0:
            chosen[row] = each.choose(scores[row])
    tokens = chosen.tolist()
    for each, token in zip(samplers, tokens, strict=True):
        each.said(token)
    told = {row: each.sampling.n_top for row, each in enumerate(samplers) if each.sampling.n_top is not None}
    if not told:
        return [Step(token, None, []) for token in tokens]
    logprobs = logits[list(told)].log_softmax(-1)
    of_chosen = logprobs.gather(-1, chosen[list(told), None])[:, 0].tolist()
    top = logprobs.topk(max(1, *told.values()))
    values = dict(zip(told, zip(of_chosen, top.indices.tolist(), top.values.tolist(), strict=True), strict=True))
    return [_step(token, values.get(row), told.get(row)) for row, token in enumerate(tokens)]


def _changed(samplers: Sequence[Sampler], logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
    """Logits with biases and penalties."""
    changes = [(row, token, by) for row, each in enumerate(samplers) for token, by in each.changes.items()]
    if not changes:
        return logits
    rows, tokens, values = zip(*changes, strict=True)
    at = torch.tensor([rows, tokens]).to(logits.device)
    return logits.index_put((at[0], at[1]), torch.tensor(values).to(logits.device), accumulate=True)


def _step(token: int, found: tuple[float, list[int], list[float]] | None, n_top: int | None) -> Step:
    if found is None:
        return Step(token, None, [])
    logprob, indices, values = found
    return Step(token, logprob, list(zip(indices, values, strict=True))[:n_top])

"""The next token of one answer, from the scores of all tokens; a function of its own seed, whatever is beside it.

    score  = logit + bias - frequency_penalty * count - presence_penalty * (count > 0)
    p      = softmax(score / temperature) of the top_k likeliest, of those the fewest that have top_p together
    token  = the first at which the cumulative p, in the order of ids, is above a uniform draw

At temperature 0 the likeliest, the lower id of two. Counts are those of what the answer has said. Log probabilities are
the model's own, before any of this, as they are steered.

Left out: stopping (`steer.serving.writing`).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


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
        self._sampling = sampling
        self._draws = torch.Generator().manual_seed(sampling.seed)  # of the CPU: alike on every device
        self._counts: Counter[int] = Counter()

    def pick(self, logits: Float[Tensor, " vocab"]) -> Step:
        """The next token; `logits` is float32 and is left as it is."""
        sampling = self._sampling
        scores = self._scores(logits)
        token = int(scores.argmax()) if sampling.temperature == 0 else self._drawn(scores)
        self._counts[token] += 1
        if sampling.n_top is None:
            return Step(token, None, [])
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(sampling.n_top)
        return Step(token, float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))

    def _scores(self, logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        changes = defaultdict[int, float](float)
        for token, count in self._counts.items():
            changes[token] -= self._sampling.frequency_penalty * count + self._sampling.presence_penalty
        for token, bias in self._sampling.bias.items():
            changes[token] += bias
        changed = {token: change for token, change in changes.items() if change}
        if not changed:
            return logits
        at = torch.tensor(list(changed), device=logits.device)
        return logits.index_add(0, at, torch.tensor(list(changed.values()), device=logits.device))

    def _drawn(self, scores: Float[Tensor, " vocab"]) -> int:
        sampling = self._sampling
        p = (scores / sampling.temperature).softmax(-1)
        if sampling.top_k is not None or sampling.top_p < 1:
            ordered, at = p.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            out = before >= sampling.top_p
            if sampling.top_k is not None:
                out[sampling.top_k :] = True
            out[0] = False
            p = torch.zeros_like(p).scatter(0, at, ordered.masked_fill(out, 0.0))
        total = p.double().cumsum(-1)
        drawn = torch.rand((), generator=self._draws, dtype=torch.float64).item() * total[-1]
        # A draw that rounds to the whole may lie behind the last token that has a chance.
        return min(int(torch.searchsorted(total, drawn, right=True)), int(p.nonzero()[-1]))

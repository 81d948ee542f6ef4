"""The n best places of each latent, at most one a document, with the text around them, as a text streams by.

What is best is either the largest score, ties going to the smaller priority, or the smallest priority alone, which
makes the places a uniform sample. Either is an order of all places, so that the result is that of sorting them all,
whatever blocks they come in. Flow of `add`:
1. leave out what is behind the worst place kept of its latent: soon nearly everything;
2. cut the windows of the rest, and let it wait until there is enough to be worth the next step;
3. sort it together with what is kept; keep the best of each document, then n.

Memory is 2 + WAITING times d_sae * n * window, whatever the length of the text. Left out: choosing what to offer.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.priorities import LARGEST

NO_TOKEN = -1
WAITING = 0.5
"""places that wait to be sorted in, at most, as a share of those that are kept"""
_DOCUMENT_BITS, _SOURCE_BITS = 31, 8
MAX_SOURCES = 1 << _SOURCE_BITS
"""texts that `document_key` tells apart"""


class Offer(NamedTuple):
    """Places of latents, to be kept if they are good enough."""

    latent: Int[Tensor, " entry"]
    score: Float[Tensor, " entry"]
    """activation, or pre-activation of a place that is not active"""
    priority: Int[Tensor, " entry"]
    document: Int[Tensor, " entry"]
    """source and document as one number: see `document_key`"""


class Window(NamedTuple):
    """Text around places."""

    position: Int[Tensor, " entry"]
    """the place, as an index into its sequence"""
    tokens: Int[Tensor, "entry window"]
    """token ids; NO_TOKEN outside the sequence"""
    values: Float[Tensor, "entry window"]
    """the latent's activation at each token"""


class Reservoir:
    """Places of all latents, best first; an empty one has priority LARGEST and score -inf."""

    def __init__(self, d_sae: int, n: int, window: int, *, by_score: bool, device: torch.device | str = "cpu"):
        """An empty one, with windows of `window` tokens; `by_score`: largest scores, else smallest priorities."""
        self.n, self.by_score = n, by_score
        self.score = torch.full((d_sae, n), -torch.inf, device=device)
        self.priority = torch.full((d_sae, n), LARGEST, dtype=torch.int64, device=device)
        self.document = torch.zeros(d_sae, n, dtype=torch.int64, device=device)
        self.position = torch.zeros(d_sae, n, dtype=torch.int32, device=device)
        self.tokens = torch.full((d_sae, n, window), NO_TOKEN, dtype=torch.int32, device=device)
        self.values = torch.zeros(d_sae, n, window, dtype=torch.float16, device=device)
        self._waiting: list[tuple[Offer, Window]] = []
        self._most_waiting = max(1, int(self.score.numel() * WAITING))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it holds, by name; not copied."""
        self._merge()
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def add(self, offer: Offer, cut: Callable[[Int[Tensor, " new"]], Window]) -> None:
        """Keep what is good enough of an offer; `cut` gives the text around places by their indices in the offer."""
        where = self._may_enter(offer).nonzero().squeeze(1)
        if len(where) > self._most_waiting:  # cutting as many windows would take more memory than keeping them
            where = where[best(_take(offer, where), self.n, by_score=self.by_score)[0]]
        if len(where):
            self._waiting.append((_take(offer, where), cut(where)))
        if sum(len(window.position) for _, window in self._waiting) > self._most_waiting:
            self._merge()

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what is good enough of what another reservoir of this kind holds, which `tensors` gave."""
        offer, window = _held(tensors)
        self.add(offer, lambda new: Window(*(part[new] for part in window)))

    def _may_enter(self, offer: Offer) -> Bool[Tensor, " entry"]:
        """False where a latent has n places already that are better."""
        if self.by_score:
            return offer.score >= self.score[offer.latent, -1]
        return offer.priority < self.priority[offer.latent, -1]

    def _merge(self) -> None:
        """Sort what waits into the places."""
        if not self._waiting:
            return
        offers, windows = zip(_held(vars(self)), *self._waiting, strict=True)
        offer = Offer(*(torch.cat(parts) for parts in zip(*offers, strict=True)))
        chosen, rank = best(offer, self.n, by_score=self.by_score)
        self.score.fill_(-torch.inf)
        self.priority.fill_(LARGEST)
        self.tokens.fill_(NO_TOKEN)
        self.values.zero_()
        place = offer.latent[chosen], rank
        for name in ("score", "priority", "document"):
            getattr(self, name)[place] = getattr(offer, name)[chosen]
        for name in Window._fields:
            column = getattr(self, name)
            column[place] = torch.cat([getattr(window, name).to(column.dtype) for window in windows])[chosen]
        self._waiting = []


def _held(tensors: Mapping[str, Any]) -> tuple[Offer, Window]:
    """The places that a reservoir's tensors hold, without the empty ones."""
    latent, rank = (tensors["priority"] != LARGEST).nonzero(as_tuple=True)
    offer = Offer(latent, *(tensors[name][latent, rank] for name in Offer._fields[1:]))
    return offer, Window(*(tensors[name][latent, rank] for name in Window._fields))


def _take(offer: Offer, where: Int[Tensor, " kept"]) -> Offer:
    return Offer(*(part[where] for part in offer))


def best(offer: Offer, n: int, *, by_score: bool) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"]]:
    """Indices of the best n places of each latent, one a document, and the rank of each; by latent, best first."""
    order = offer.priority.argsort()
    key = offer.latent << 32
    if by_score:
        key = key + _descending(offer.score)
    order = order[key[order].argsort(stable=True)]
    documents, by_document = ((offer.latent << (_DOCUMENT_BITS + _SOURCE_BITS)) + offer.document)[order].sort(
        stable=True
    )
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[1:] = documents[1:] != documents[:-1]
    is_best = torch.empty_like(is_first)
    is_best[by_document] = is_first
    order = order[is_best]
    latent = offer.latent[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(latent, latent)
    return order[rank < n], rank[rank < n]


def document_key(source: int, document: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """A document of a source as one number below 2^39.

    >>> split_key(int(document_key(3, torch.tensor([7]))))
    (3, 7)
    """
    return document.long() + (source << _DOCUMENT_BITS)


def split_key(key: int) -> tuple[int, int]:
    """Source and document of a `document_key`."""
    return key >> _DOCUMENT_BITS, key & ((1 << _DOCUMENT_BITS) - 1)


def _descending(score: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Integers in 0..2^32 in the opposite order of the scores, of which none is NaN."""
    bits = (score + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    return 2**31 - torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

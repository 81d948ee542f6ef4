"""Latches of the scopes of many requests, gone over on the host: they depend on token ids alone, which are known there.

Requests with the same latches and as many tokens in a pass are taken together, which is what decoding is made of.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steer.scopes import NONE, Latch, LatchTable, latch_table, run_latches


class Part(NamedTuple):
    """The tokens of one request in a pass."""

    number: int
    """of the request"""
    latches: tuple[Latch, ...]
    start: int
    """position of the first of them"""
    ids: Sequence[int]


class Latched:
    """The states of latches, by request."""

    def __init__(self) -> None:
        """No request is known."""
        self._states: dict[int, tuple[Bool[Tensor, " latch"], Int[Tensor, " back"]]] = {}

    def forget(self, number: int) -> None:
        """Of a request that has ended."""
        self._states.pop(number, None)

    def run(self, parts: Sequence[Part]) -> list[Bool[Tensor, "pos latch"]]:
        """Whether each token is inside each latch of its request; goes on from the pass before."""
        groups: dict[tuple[tuple[Latch, ...], int], list[int]] = {}
        for i, part in enumerate(parts):
            groups.setdefault((part.latches, len(part.ids)), []).append(i)
        found: dict[int, Tensor] = {}
        for (latches, _), members in groups.items():
            inside = self._together(_table(latches), [parts[i] for i in members])
            found |= dict(zip(members, inside, strict=True))
        return [found[i] for i in range(len(parts))]

    def _together(self, table: LatchTable, parts: Sequence[Part]) -> Bool[Tensor, "request pos latch"]:
        start = torch.zeros(len(table.with_markers), dtype=torch.bool), torch.full((table.tokens.shape[1],), NONE)
        states, last = zip(*(self._states.get(part.number, start) for part in parts), strict=True)
        ids = torch.tensor([[*part.ids] for part in parts])
        index = torch.tensor([part.start for part in parts])[:, None] + torch.arange(ids.shape[1])
        run = run_latches(table, ids, index, torch.stack(states), torch.stack(last))
        for part, state, latest in zip(parts, run.states, run.last, strict=True):
            self._states[part.number] = state, latest
        return run.inside


@lru_cache(64)
def _table(latches: tuple[Latch, ...]) -> LatchTable:
    return latch_table(latches)

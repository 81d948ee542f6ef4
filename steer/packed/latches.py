"""Latches of the scopes of many requests, gone over where the token ids lie: on the model's device.

An engine may run a pass before the host knows what the pass before it chose, so nothing here waits for the device.
Requests with the same latches and as many tokens in a pass are taken together, which is what decoding is made of.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from activations.devices import sent
from steer.scopes import NONE, Latch, LatchTable, latch_table, run_latches


class Part(NamedTuple):
    """The tokens of one request in a pass, which lie behind each other."""

    number: int
    """of the request"""
    latches: tuple[Latch, ...]
    start: int
    """where the first of them is in the pass"""
    n: int
    """how many they are"""


class Latched:
    """The states of latches, by request."""

    def __init__(self) -> None:
        """No request is known."""
        self._states: dict[int, tuple[Bool[Tensor, " latch"], Int[Tensor, " back"]]] = {}

    def forget(self, number: int) -> None:
        """Of a request that has ended, or that begins again under another number."""
        self._states.pop(number, None)

    def run(
        self,
        parts: Sequence[Part],
        ids: Int[Tensor, " pos"],
        position: Int[Tensor, " pos"],
        flags: Bool[Tensor, "room flag"],
    ) -> None:
        """Write whether each token is inside each latch of its request; goes on from the pass before.

        Args:
          ids, position: of all tokens of the pass.
          flags: of these, and of more behind them. The first columns of a request are its latches; of other requests
            nothing is written.
        """
        groups: dict[tuple[tuple[Latch, ...], int], list[Part]] = {}
        for part in parts:
            groups.setdefault((part.latches, part.n), []).append(part)
        for (latches, n), members in groups.items():
            starts = sent(torch.tensor([part.start for part in members]), ids.device)
            at = starts[:, None] + torch.arange(n, device=ids.device)
            table = _table(latches, ids.device)
            flags[:, : len(latches)][at] = self._together(table, members, ids[at], position[at])

    def _together(
        self,
        table: LatchTable,
        parts: Sequence[Part],
        ids: Int[Tensor, "request pos"],
        position: Int[Tensor, "request pos"],
    ) -> Bool[Tensor, "request pos latch"]:
        start = torch.zeros_like(table.with_markers), torch.full_like(table.tokens[0], NONE)
        states, last = zip(*(self._states.get(part.number, start) for part in parts), strict=True)
        run = run_latches(table, ids, position, torch.stack(states), torch.stack(last))
        for part, state, latest in zip(parts, run.states, run.last, strict=True):
            self._states[part.number] = state, latest
        return run.inside


@lru_cache(64)
def _table(latches: tuple[Latch, ...], device: torch.device) -> LatchTable:
    return LatchTable(*(tensor.to(device) for tensor in latch_table(latches)))

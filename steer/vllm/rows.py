"""Which request has which slots and gates, while it runs.

Flow of a step: 1. what finished or was preempted gives its room back; 2. a request that is scheduled and steered gets
slots, gates, and a number; 3. every token of the pass gets the number of its request and its position.

A request that was preempted is computed again from its first token that is not cached, with the same positions, and so
steered as before; its gates start anew with it, and where they fired until then stays known. Left out: where vLLM calls
this (`steer.vllm.plugin`).
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activations.hook_points import HookPoint
from steer.gates import Gate, gate_table
from steer.tables import LaneKey, Row
from steer.vllm.catalogue import Prepared
from steer.vllm.tables import LOG_TOKENS, OWNER, Batch, Site, Sizes

KEPT = 1024
"""finished requests of which it is known where their gates fired"""
Fired = dict[str, list[int]]
"""gate -> positions of the tokens on which it was open"""


class Room:
    """Numbers from 0 on, the lowest that is free first, so that those in use lie together."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._taken: set[int] = set()

    def take(self, n: int) -> list[int]:
        """So many numbers."""
        found = []
        for _ in range(n):
            found.append(heapq.heappop(self._free) if self._free else len(self._taken))
            self._taken.add(found[-1])
        return found

    def give(self, numbers: Iterable[int]) -> None:
        """Give them back."""
        for number in numbers:
            self._taken.remove(number)
            heapq.heappush(self._free, number)

    @property
    def end(self) -> int:
        """Behind the highest that is in use."""
        return max(self._taken, default=-1) + 1


@dataclass
class Held:
    """What a request has."""

    number: int
    slots: dict[LaneKey, list[int]] = field(default_factory=dict)
    gates: list[Gate] = field(default_factory=list)
    gate_row: int | None = None
    length: int = 0
    """tokens that were computed"""


class Rows:
    """The requests that are steered."""

    def __init__(self, points: Sequence[HookPoint], sizes: Sizes):
        """Make all tables, empty."""
        self.batch = Batch(sizes)
        self.sites = {point: Site(point, self.batch) for point in points}
        self._rows: dict[str, Held] = {}
        self._room = {lane.key: Room() for site in self.sites.values() for lane in site.all}
        self._gate_room, self._next = Room(), 1
        self._finished: OrderedDict[str, Fired] = OrderedDict()
        self._preempted: dict[str, Fired] = {}

    def to(self, device: torch.device) -> "Rows":
        """Move the tables to the model's device."""
        for module in (self.batch, *self.sites.values()):
            module.to(device)
        return self

    @property
    def n_bytes(self) -> int:
        """What the tables take."""
        modules = (self.batch, *self.sites.values())
        return sum(buffer.nbytes for module in modules for buffer in module.buffers())

    def keep(self, request: str, prepare: Callable[[], Prepared]) -> None:
        """Give a request what it needs, unless it has it."""
        if request not in self._rows:
            self._rows[request] = self._made(prepare())

    def release(self, requests: Iterable[str], *, finished: bool) -> None:
        """Take back what requests have."""
        for request in requests:
            found = self._known(request)
            row = self._rows.pop(request, None)
            if row is not None:
                self._forget(row)
            if found is None:
                continue
            if finished:
                self._preempted.pop(request, None)
                self._finished[request] = found
                while len(self._finished) > KEPT:
                    self._finished.popitem(last=False)
            else:
                self._preempted[request] = found

    def prepare(self, requests: Sequence[str], counts: Sequence[int], positions: Callable[[int], Tensor]) -> None:
        """Say whose the tokens of the next pass are.

        Args:
          requests: of the batch, in its order, each with so many tokens.
          positions: of the first so many tokens, on the device.
        """
        rows = [self._rows.get(request) for request in requests]
        if not any(rows):
            self.batch.rest()
            return
        lengths, nowhere = np.asarray(counts, dtype=np.int64), self.batch.sizes.n_requests
        owner = np.repeat([0 if row is None else row.number for row in rows], lengths)
        gate_rows = [nowhere if row is None or row.gate_row is None else row.gate_row for row in rows]
        ends = np.cumsum(lengths)
        first, last = np.zeros((2, len(owner)), dtype=bool)
        first[ends - lengths], last[ends - 1] = True, True
        position = positions(len(owner))
        given = [torch.from_numpy(each).to(position.device) for each in (owner, np.repeat(gate_rows, lengths))]
        edges = [torch.from_numpy(each).to(position.device) for each in (first, last)]
        self.batch.fill(given[0], given[1], position.long(), edges[0], edges[1])
        for row, count in zip(rows, counts, strict=True):
            if row is not None:
                row.length += int(count)

    def fired(self, request: str) -> Fired | None:
        """Where the gates of a request fired, while it runs and for a while after; none: not known, or no gates."""
        # vLLM puts a dash and eight digits behind the names that its users give to requests.
        names = (name for name in (*self._rows, *self._preempted) if request in (name, name[:-9]))
        if (running := next(names, None)) is not None:
            return self._known(running)
        return next((found for name, found in self._finished.items() if request in (name, name[:-9])), None)

    def _known(self, request: str) -> Fired | None:
        """Of a request that has not finished."""
        row, before = self._rows.get(request), self._preempted.get(request)
        now = self._fired(row) if row is not None and row.gates else None
        if before is None or now is None:
            return now if before is None else before
        return {name: sorted({*before[name], *found}) for name, found in now.items()}

    def _made(self, prepared: Prepared) -> Held:
        row = Held(self._next, gates=prepared.gates)
        self._next = self._next % (2**30) + 1
        for key, rows in prepared.contents.items():
            row.slots[key] = self._put(key, row.number, rows[0])
        if prepared.gates:
            (row.gate_row,) = self._gate_room.take(1)
            self.batch.is_gated = True
            self._set_gates(row.gate_row, prepared.gates)
        return row

    def _put(self, key: LaneKey, number: int, slots: Sequence[Row]) -> list[int]:
        site, room = self.sites[key.acts], self._room[key]
        places = room.take(len(slots))
        owned = [_owned(slot, number) for slot in slots]
        site.lane(key).put(places, owned)
        site.use(key, room.end)
        return places

    def _set_gates(self, row: int, gates: Sequence[Gate]) -> None:
        for point, site in self.sites.items():
            columns = [i for i, gate in enumerate(gates) if gate.readout.hook_point == point]
            if columns:
                site.set_gates(row, gate_table([gates[i] for i in columns]), columns)
                site.gated_rows = max(site.gated_rows, row + 1)

    def _forget(self, row: Held) -> None:
        for key, places in row.slots.items():
            self._room[key].give(places)  # where they acted on nobody else, and where the next one overwrites them
            self.sites[key.acts].use(key, self._room[key].end)
        if row.gate_row is None:
            return
        self._gate_room.give([row.gate_row])
        self.batch.is_gated = self._gate_room.end > 0
        for site in self.sites.values():
            site.here[row.gate_row] = False
            taken = site.here[:-1].any(1).nonzero()
            site.gated_rows = int(taken.max()) + 1 if len(taken) else 0

    def _fired(self, row: Held) -> Fired:
        log = self.batch.log[row.gate_row, : min(row.length, LOG_TOKENS)].cpu()
        return {gate.name: log[:, i].nonzero()[:, 0].tolist() for i, gate in enumerate(row.gates)}


def _owned(row: Row, number: int) -> Row:
    """The same, on tokens of one request alone."""
    low, high = (number * OWNER + min(bound, OWNER - 1) for bound in (row.where.low, row.where.high))
    return row._replace(where=row.where._replace(low=low, high=high))


def describe(rows: Rows) -> dict[str, Any]:
    """What the tables take, for the log."""
    return {"hook points": [str(point) for point in rows.sites], "MB": round(rows.n_bytes / 1e6, 1)}

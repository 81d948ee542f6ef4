"""Which request has which slots and gates, while it runs.

Flow of a step: 1. what finished or was preempted gives its room back; 2. a request that is scheduled and steered gets a
number, and with all others that are new, slots and gates; 3. every token of the pass gets the number of its request and
its position; 4. latches, which depend on token ids alone, go over these (`steer.packed.latches`).

A request that was preempted is computed again from its first token that is not cached, with the same positions, and so
steered as before; its gates and latches start anew with it, and where gates fired until then stays known. Left out:
where an engine calls this (`steer.vllm.runners`, `steer.serving.packed`).
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from activations.devices import sent
from activations.hook_points import HookPoint
from steer.gates import Gate, gate_table
from steer.packed.latches import Latched, Part
from steer.packed.prepared import Prepared
from steer.packed.tables import LOG_TOKENS, NOBODY, OWNER, Batch, Site, Sizes
from steer.scopes import Latch
from steer.tables import LaneKey, Row

KEPT = 1024
"""finished requests of which it is known where their gates fired"""
Fired = dict[str, list[int]]
"""gate -> positions of the tokens on which it was open"""
Log = tuple[list[str], Bool[Tensor, "token gate"]]
"""names of the gates of a request, and whether each was open on each token"""


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
    latches: tuple[Latch, ...]
    gates: list[Gate]
    n_flags: int
    n_clauses: int
    slots: dict[LaneKey, list[int]] = field(default_factory=dict)
    gate_row: int = NOBODY


class Rows:
    """The requests that are steered."""

    def __init__(self, points: Sequence[HookPoint], sizes: Sizes, lanes: Sequence[LaneKey] = ()):
        """Make all tables, empty.

        Args:
          points: those that have some from the start.
          lanes: what these have beside lanes that read at most where they act, by a row of their own.
        """
        self.batch = Batch(sizes)
        self.sites = {point: Site(point, self.batch) for point in points}
        for key in lanes:
            self.sites[key.acts].make_room(key, sizes.n_requests * sizes.n_slots)
        for lane in [lane for site in self.sites.values() for lane in site.all]:
            if lane.key.reads is not None:
                self.sites[lane.key.reads].readers.append(lane)
        self._rows: dict[str, Held] = {}
        self._new: list[tuple[Held, Prepared]] = []
        self._room: dict[LaneKey, Room] = {}
        self._gate_room, self._next, self._n_clauses = Room(), 1, 1
        self._gate_room.take(1)  # that of nobody
        self._latched = Latched()
        self._finished: OrderedDict[str, list[Log]] = OrderedDict()
        self._preempted: dict[str, list[Log]] = {}

    def to(self, device: torch.device) -> "Rows":
        """Move the tables to the model's device."""
        for module in (self.batch, *self.sites.values()):
            module.to(device)
        return self

    @property
    def n_bytes(self) -> int:
        """What the tables take, and the encoders of SAEs that have to be encoded."""
        modules = (self.batch, *self.sites.values())
        return sum(tensor.nbytes for each in modules for tensor in (*each.buffers(), *each.parameters()))

    # --- requests come and go ----------------------------------------------------------------------------------------

    def __contains__(self, request: str) -> bool:
        """Whether it has what it needs."""
        return request in self._rows

    def keep(self, request: str, prepare: Callable[[], Prepared]) -> None:
        """Give a request what it needs, unless it has it."""
        if request in self._rows:
            return
        prepared = prepare()
        held = self._rows[request] = Held(
            self._next, tuple(prepared.latches), prepared.gates, prepared.n_flags, prepared.n_clauses
        )  # fmt: skip
        self._next = self._next % (2**30) + 1
        if prepared.gates:
            (held.gate_row,) = self._gate_room.take(1)
        self._new.append((held, prepared))

    def release(self, requests: Iterable[str], *, finished: bool) -> None:
        """Take back what requests have."""
        names = [name for name in requests if name in self._rows or name in self._preempted]
        gone = [self._rows[name] for name in names if name in self._rows]
        if gone:
            self._settle()
        for name in names:
            held = self._rows.get(name)
            if held is not None and held.gates:
                self._preempted.setdefault(name, []).append(self._log_of(held))
            if finished and name in self._preempted:
                self._finished[name] = self._preempted.pop(name)
            self._rows.pop(name, None)
        while len(self._finished) > KEPT:
            self._finished.popitem(last=False)
        self._forget(gone)

    def fired(self, request: str) -> Fired | None:
        """Where the gates of a request fired, while it runs and for a while after; none: not known, or no gates."""
        # vLLM puts a dash and eight digits behind the names that its users give to requests.
        names = (*self._rows, *self._preempted, *self._finished)
        for name in (request, *(name for name in names if name[:-9] == request)):
            held = self._rows.get(name)
            logs = [*self._finished.get(name, self._preempted.get(name, []))]
            if held is not None and held.gates:
                logs.append(self._log_of(held))
            if logs:
                return _together(logs)
        return None

    def _log_of(self, held: Held) -> Log:
        """What it is now; it lies on the device, so that nobody has to wait for it."""
        own = slice(len(held.latches), held.n_flags)
        return [gate.name for gate in held.gates], self.batch.log[held.gate_row, :LOG_TOKENS, own].clone()

    def _settle(self) -> None:
        """Write what new requests need into the tables, all of it at once."""
        new, self._new = self._new, []
        if not new:
            return
        slots: dict[LaneKey, tuple[list[int], list[Row]]] = {}
        for held, prepared in new:
            for key, (rows,) in prepared.contents.items():
                places = held.slots[key] = self._room.setdefault(key, Room()).take(len(rows))
                at, put = slots.setdefault(key, ([], []))
                at.extend(places)
                put.extend(_owned(row, held.number) for row in rows)
        with torch.inference_mode(False), torch.no_grad():
            for key, (places, rows) in slots.items():
                self._put(key, places, rows)
            gated = [held for held, _ in new if held.gates]
            if gated:
                self._set_gates(gated)
        self._measure()

    def _measure(self) -> None:
        """How many columns of flags, and clauses of conditions, have to be looked at."""
        self.batch.n_flags = max((held.n_flags for held in self._rows.values()), default=0)
        n_clauses = max((held.n_clauses for held in self._rows.values()), default=1)
        if n_clauses != self._n_clauses:
            self._n_clauses = n_clauses
            for key in self._room:
                self._use(key)

    def _put(self, key: LaneKey, places: Sequence[int], rows: Sequence[Row]) -> None:
        site = self._site(key.acts)
        site.make_room(key, self._room[key].end)
        if rows:
            site.lane(key).put(places, rows)
        self._use(key)

    def _use(self, key: LaneKey) -> None:
        n_slots = self._room[key].end
        lane = self._site(key.acts).lane(key).first(n_slots, self._n_clauses) if n_slots else None
        for point in {key.acts, key.reads or key.acts}:
            self._site(point).use(key, lane)

    def _site(self, point: HookPoint) -> Site:
        if point not in self.sites:
            self.sites[point] = Site(point, self.batch).to(self.batch.index.device)
        return self.sites[point]

    def _set_gates(self, several: Sequence[Held]) -> None:
        """Of new requests."""
        n_rows = max(held.gate_row for held in several) + 1
        self.batch.make_room(n_rows)
        gates = [
            (gate, (held.gate_row, len(held.latches) + i)) for held in several for i, gate in enumerate(held.gates)
        ]
        for point in dict.fromkeys(gate.readout.hook_point for gate, _ in gates):
            own = [(gate, place) for gate, place in gates if gate.readout.hook_point == point]
            site = self._site(point)
            site.set_gates([place for _, place in own], gate_table([gate for gate, _ in own]))
            site.gated_rows = max(site.gated_rows, *(row + 1 for _, (row, _) in own))

    def _forget(self, gone: Sequence[Held]) -> None:
        for held in gone:
            for key, places in held.slots.items():
                self._room[key].give(places)  # where they acted on nobody else, and where the next one overwrites them
            self._latched.forget(held.number)
        for key in dict.fromkeys(key for held in gone for key in held.slots):
            self._use(key)
        self._measure()
        empty = [held.gate_row for held in gone if held.gate_row != NOBODY]
        if not empty:
            return
        self._gate_room.give(empty)
        at = sent(torch.tensor(empty), self.batch.log.device)
        self.batch.log.index_fill_(0, at, False)
        rows = [(each.gate_row, {gate.readout.hook_point for gate in each.gates}) for each in self._rows.values()]
        for point in {gate.readout.hook_point for held in gone for gate in held.gates}:
            self.sites[point].here.index_fill_(0, at, False)
            self.sites[point].gated_rows = max((row + 1 for row, points in rows if point in points), default=0)

    # --- in front of a pass ------------------------------------------------------------------------------------------

    def prepare(
        self,
        requests: Sequence[str],
        counts: Sequence[int],
        positions: Callable[[int], Tensor],
        ids: Callable[[int], Tensor],
    ) -> None:
        """Say whose the tokens of the next pass are.

        Args:
          requests: of the batch, in its order, each with so many tokens.
          positions: of the first so many tokens, on the device.
          ids: the same of token ids.
        """
        self._settle()
        rows = [self._rows.get(request) for request in requests]
        if not any(rows):
            self.batch.rest()
            return
        numbers = [0 if row is None else row.number for row in rows]
        gate_rows = [NOBODY if row is None else row.gate_row for row in rows]
        n = int(sum(counts))
        self.batch.fill(numbers, gate_rows, counts, positions(n))
        latched = [(i, row) for i, row in enumerate(rows) if row is not None and row.latches]
        if latched:
            starts = [0, *accumulate(counts)]
            parts = [Part(row.number, row.latches, int(starts[i]), int(counts[i])) for i, row in latched]
            self._latched.run(parts, ids(n).long(), positions(n).long(), self.batch.flags[0])


def _owned(row: Row, number: int) -> Row:
    """The same, on tokens of one request alone."""
    low, high = (number * OWNER + min(bound, OWNER - 1) for bound in (row.where.low, row.where.high))
    return row._replace(where=row.where._replace(low=low, high=high))


def _together(logs: Sequence[Log]) -> Fired:
    """What was computed again after a request was preempted counts once."""
    names, was_open = logs[0][0], torch.stack([log for _, log in logs]).any(0).cpu()
    return {name: was_open[:, i].nonzero()[:, 0].tolist() for i, name in enumerate(names)}


def describe(rows: Rows) -> dict[str, Any]:
    """What the tables take, for the log."""
    return {"hook points": [str(point) for point in rows.sites], "MB": round(rows.n_bytes / 1e6, 1)}

"""The tables of a steered model whose forward passes have the tokens of many requests behind each other in one row.

Such a pass has the tokens of all requests in [1, pos, d_model], without padding between them. So a `Lane` has a single
row here, with the slots of all requests, and a token belongs to one of them by its index:

    index of a token  =  OWNER * number of its request + its position          below 0 for what is not steered
    low, high         =  the same of a slot, so that it acts on tokens of its own request alone

Gates have MAX_FLAGS columns for each gated request, a row of them. What the latches and gates of a request say is in
the flags of its tokens, so a slot asks for the flags of its own request, as `steer.plan` numbered them. Tokens of one
request lie behind each other, and the first of them takes up the state that the pass before left. So a pass costs as
many operations whatever the number of requests.

Where a pass may be captured as a graph, everything is executed, in buffers that were made before any is captured and
are rewritten in place; shapes depend on the number of tokens alone. Otherwise what is not in use is passed over, and
tables grow when there is no room. On a GPU one kernel does what is done at a hook point (`steer.packed.kernel`), behind
those that find what is not read from one row where it acts (`steer.packed.apart`).

Left out: which request has which slots (`steer.packed.rows`).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from activations.devices import sent
from activations.hook_points import HookPoint
from steer.gates import GateTable, composed, moves, read
from steer.packed.prepared import MAX_AGE, MAX_CLAUSES, MAX_FLAGS
from steer.tables import Lane, LaneKey, applied

OWNER = 2**32
"""positions of a request are below it"""
LOG_TOKENS = 4096
"""tokens of a request of which the log tells whether gates were open"""
HAS_TRITON = find_spec("triton") is not None
NOBODY = 0
"""row of gates that is of no request"""
UNSTEERED = -(2**62)
"""added to the position of a token that is not steered, so that its index is below 0"""
_AT_REST = [[-1], [-1], [NOBODY], [0], [0]]


def has_kernel(value: Tensor) -> bool:
    """Whether a tensor is where `steer.packed.kernel` runs."""
    return value.is_cuda and HAS_TRITON


class Sizes(NamedTuple):
    """How much room there is."""

    d_model: int
    n_tokens: int
    """of a forward pass"""
    n_requests: int
    """at once"""
    n_slots: int
    """of a request, in each lane; 0: lanes and rows of gates grow when there is no room, and no pass is captured"""
    n_captured: int
    """tokens up to which a pass may be captured as a graph; 0: none is"""


class Batch(nn.Module):
    """Whose the tokens of a forward pass are, and what their flags say."""

    tokens: Int[Tensor, "5 pos"]
    """index, position, row of gates, and whether a token is the first, and the last, of its request in the pass"""
    flags: Bool[Tensor, "1 pos flag"]
    ages: Int[Tensor, "row flag"]
    log: Bool[Tensor, "row token flag"]

    def __init__(self, sizes: Sizes):
        """Make room; no token is steered."""
        super().__init__()
        n, rows = sizes.n_tokens, sizes.n_requests + 1
        self.sizes, self.is_idle, self.n_flags, self.longest = sizes, True, 0, n
        self.readings: dict[LaneKey, Tensor] = {}
        """what lanes have read in this pass, to act here or at a later hook point"""
        self.register_buffer("tokens", torch.tensor(_AT_REST).repeat(1, n), persistent=False)
        self._n_filled = 0
        self.register_buffer("flags", torch.zeros(1, n, MAX_FLAGS, dtype=torch.bool), persistent=False)
        self.register_buffer("ages", torch.zeros(rows, MAX_FLAGS, dtype=torch.long), persistent=False)
        shape = (rows, LOG_TOKENS + 1, MAX_FLAGS)
        self.register_buffer("log", torch.zeros(shape, dtype=torch.bool), persistent=False)

    @property
    def index(self) -> Int[Tensor, "1 pos"]:
        """Of each token; below 0 for what is not steered."""
        return self.tokens[:1]

    @property
    def position(self) -> Int[Tensor, " pos"]:
        """Of each token in its sequence; below 0 behind the last token of the pass."""
        return self.tokens[1]

    @property
    def row(self) -> Int[Tensor, " pos"]:
        """Where the gates of each token's request are; NOBODY: it has none."""
        return self.tokens[2]

    @property
    def first(self) -> Int[Tensor, " pos"]:
        """1 for the first token of a request in the pass, else 0."""
        return self.tokens[3]

    @property
    def last(self) -> Int[Tensor, " pos"]:
        """1 for the last token of a request in the pass, else 0."""
        return self.tokens[4]

    def rest(self) -> None:
        """No token of the next pass is steered."""
        if not self.is_idle:
            self._clear(0)
            self.is_idle = True

    def fill(self, numbers: Sequence[int], rows: Sequence[int], counts: Sequence[int], position: Tensor) -> None:
        """The tokens of the next pass, request by request.

        Args:
          numbers: of the requests; 0: not steered.
          rows: where their gates are; NOBODY: they have none.
          counts: tokens of each.
          position: of all tokens, on the device.
        """
        lengths, n = np.asarray(counts, dtype=np.int64), len(position)
        ends, owner = np.cumsum(lengths), np.asarray(numbers, dtype=np.int64)
        given = np.zeros((5, n), dtype=np.int64)
        given[0] = np.repeat(np.where(owner > 0, owner * OWNER, UNSTEERED), lengths)
        given[2] = np.repeat(np.asarray(rows, dtype=np.int64), lengths)
        given[3, ends - lengths], given[4, ends - 1] = 1, 1
        self._clear(n)
        self.tokens[:, :n] = sent(torch.from_numpy(given), self.tokens.device)
        self.tokens[:2, :n] += position
        self.is_idle, self.longest, self._n_filled = False, int(lengths.max()), n

    def _clear(self, n: int) -> None:
        """Behind so many tokens."""
        if n < self._n_filled:
            self.tokens[:2, n : self._n_filled], self.tokens[2:, n : self._n_filled] = -1, 0
            self._n_filled = n

    def make_room(self, n_rows: int) -> None:
        """For so many rows of gates."""
        for name in ("ages", "log"):
            grow(self, name, n_rows)


def _whole(hidden: Tensor, residual: Tensor | None) -> Float[Tensor, "1 pos d_model"]:
    """The residual stream."""
    return hidden[None] if residual is None else hidden[None].float() + residual[None].float()


def grow(module: nn.Module, name: str, n: int) -> None:
    """Give a buffer at least n rows, those behind its own of zeros; twice what it had, so that it happens seldom."""
    old = module.get_buffer(name)
    if len(old) < n:
        new = old.new_zeros(max(n, 2 * len(old)), *old.shape[1:])
        new[: len(old)] = old
        module.register_buffer(name, new, persistent=False)


class Used(NamedTuple):
    """What is done at a hook point in a pass."""

    acting: Sequence[Lane]
    reading: Sequence[Lane]
    """those that read here, wherever they act"""
    n_rows: int
    """rows of gates of which some may be read here"""


class Site(nn.Module):
    """A hook point: what is read at it, and what acts on it."""

    here: Bool[Tensor, "row flag"]

    def __init__(self, point: HookPoint, batch: Batch):
        """Make its tables, empty."""
        super().__init__()
        self.point, self._batch, sizes = point, [batch], batch.sizes
        self._names: dict[LaneKey, str] = {}
        self.acting: dict[LaneKey, Lane] = {}
        """of each lane that is in use, the slots of its beginning, behind which none is"""
        self.reading: dict[LaneKey, Lane] = {}
        """the same of lanes that read here"""
        self.readers: list[Lane] = []
        """lanes that read here from the start, whole"""
        self.gated_rows = 0
        """the same of rows of gates"""
        if sizes.n_slots:
            for reads, keeps in ((None, False), (None, True), (point, False)):
                self.make_room(LaneKey(point, reads, None, keeps), sizes.n_requests * sizes.n_slots)
        self._table(len(batch.ages) * MAX_FLAGS, sizes.d_model)
        self.register_buffer("here", torch.zeros(len(batch.ages), MAX_FLAGS, dtype=torch.bool), persistent=False)

    def _table(self, n: int, d_model: int) -> None:
        empty = {
            "weight": torch.zeros(n, d_model), "bias": torch.zeros(n), "floor": torch.zeros(n),
            "absolute": torch.zeros(n, dtype=torch.bool), "relative": torch.zeros(n, dtype=torch.bool),
            "on": torch.zeros(n), "off": torch.zeros(n), "min_tokens": torch.ones(n, dtype=torch.long),
        }  # fmt: skip
        for name, tensor in empty.items():
            self.register_buffer(f"gate_{name}", tensor, persistent=False)

    def lane(self, key: LaneKey) -> Lane:
        """One of its lanes, whole."""
        found = self.get_submodule(self._names[key])
        assert isinstance(found, Lane)
        return found

    @property
    def all(self) -> list[Lane]:
        """Its lanes, whole."""
        return [self.lane(key) for key in self._names]

    def make_room(self, key: LaneKey, n_slots: int) -> None:
        """For so many slots of a lane."""
        name = self._names.setdefault(key, f"lane{len(self._names)}")
        old, batch = self._modules.get(name), self._batch[0]
        if old is None:
            made = Lane(key, n_slots, 1, MAX_CLAUSES, MAX_FLAGS, batch.sizes.d_model).to(batch.index.device)
            self.add_module(name, made)
        elif isinstance(old, Lane) and old.n_slots < n_slots:
            self.add_module(name, old.grown(max(n_slots, 2 * old.n_slots)))

    def use(self, key: LaneKey, lane: Lane | None) -> None:
        """What of a lane that acts or reads here is in use from now on; none: nothing."""
        for used, is_here in ((self.acting, key.acts == self.point), (self.reading, key.reads == self.point)):
            used.pop(key, None)
            if lane is not None and is_here:
                used[key] = lane

    def set_gates(self, places: Sequence[tuple[int, int]], table: GateTable) -> None:
        """Gates that are read here, each at a row and a column."""
        device = self.here.device
        rows = max(row for row, _ in places) + 1
        for name in GateTable._fields:
            grow(self, f"gate_{name}", rows * MAX_FLAGS)
        grow(self, "here", rows)
        at = sent(torch.tensor([row * MAX_FLAGS + column for row, column in places]), device)
        for name, tensor in table._asdict().items():
            self.get_buffer(f"gate_{name}").index_copy_(0, at, sent(tensor, device))
        self.here.view(-1)[at] = True

    @torch.no_grad()
    def act(self, hidden: Float[Tensor, "pos d_model"], residual: Float[Tensor, "pos d_model"] | None) -> None:
        """Steer the residual stream, which is `hidden`, or the sum of both; what changes is written into `hidden`."""
        if self._rests(len(hidden)):
            return
        used = self._used(len(hidden))
        if self._has_kernel(hidden, used):
            self._launch(hidden, residual, used)
            return
        value = _whole(hidden, residual)
        moved = self._by_operations(value, used)
        # Not `moved - residual`: what nothing acts on keeps its bits, and so do the parts of what does.
        hidden.copy_(torch.where(moved != value, hidden[None] + (moved - value), hidden[None])[0])

    def steered(self, value: Float[Tensor, "1 pos d_model"]) -> Float[Tensor, "1 pos d_model"]:
        """The value at the hook point, steered; the same tensor where nothing acts."""
        if self._rests(value.shape[1]):
            return value
        used = self._used(value.shape[1])
        if not self._has_kernel(value[0], used):
            return self._by_operations(value, used)
        moved = value.clone()
        self._launch(moved[0], None, used)
        return moved

    def _has_kernel(self, hidden: Float[Tensor, "pos d_model"], used: Used) -> bool:
        """Whether one kernel does all that is done here in this pass, but for what it is given."""
        if not (has_kernel(hidden) and hidden.is_contiguous()):
            return False
        from steer.packed.kernel import can_run

        return can_run(used.acting, min(len(hidden), self._batch[0].longest) if used.n_rows else 0)

    def _launch(
        self, hidden: Float[Tensor, "pos d_model"], residual: Float[Tensor, "pos d_model"] | None, used: Used
    ) -> None:
        from steer.packed.kernel import run

        self._read_apart(hidden, residual, [lane for lane in used.reading if lane.key.reads_apart])
        if used.acting or used.n_rows:
            run(hidden, residual, used.acting, used.n_rows, self._batch[0], dict(self.named_buffers(recurse=False)))

    def _read_apart(
        self, hidden: Float[Tensor, "pos d_model"], residual: Float[Tensor, "pos d_model"] | None, lanes: Sequence[Lane]
    ) -> None:
        """In front of a kernel. In a graph also lanes that nobody uses are read, which must cost nothing then."""
        if len(hidden) > self._batch[0].sizes.n_captured:
            if lanes:
                self._read(_whole(hidden, residual), lanes)
            return
        from steer.packed.apart import read_apart

        for lane in lanes:
            self._batch[0].readings[lane.key] = read_apart(hidden, residual, lane, self._batch[0])

    def _by_operations(self, value: Float[Tensor, "1 pos d_model"], used: Used) -> Float[Tensor, "1 pos d_model"]:
        batch, n = self._batch[0], value.shape[1]
        x, index = value.float(), batch.index[:, :n]
        if used.n_rows:
            self._move_gates(x, n, used.n_rows)
        self._read(x, used.reading)
        if not used.acting:
            return value
        readings = [batch.readings[lane.key] if lane.key.reads else None for lane in used.acting]
        flags = batch.flags[:, :n, : self._width(n)]
        return applied(value, used.acting, readings, index, flags)

    def _read(self, x: Float[Tensor, "1 pos d_model"], lanes: Sequence[Lane]) -> None:
        """Keep what they read here until they act, here or later in the pass."""
        for lane in lanes:
            self._batch[0].readings[lane.key] = lane.read(x.float())

    def _used(self, n: int) -> Used:
        """What may be in use in a pass over so many tokens."""
        if n <= self._batch[0].sizes.n_captured:
            return Used(self.all, self.readers, len(self._batch[0].ages))
        return Used([*self.acting.values()], [*self.reading.values()], self.gated_rows)

    def _rests(self, n: int) -> bool:
        batch = self._batch[0]
        is_used = bool(self.acting or self.reading or self.gated_rows)
        return n > batch.sizes.n_captured and (batch.is_idle or not is_used)

    def _width(self, n: int) -> int:
        """Columns of flags that a pass over so many tokens looks at."""
        batch = self._batch[0]
        return MAX_FLAGS if n <= batch.sizes.n_captured else batch.n_flags

    def _move_gates(self, x: Float[Tensor, "1 pos d_model"], n: int, n_rows: int) -> None:
        """Which gates are open on which tokens; moves them on, and writes the log."""
        batch, k, width = self._batch[0], n_rows * MAX_FLAGS, self._width(n)
        table = GateTable(*(self.get_buffer(f"gate_{name}")[:k] for name in GateTable._fields))
        position = batch.position[None, :n]
        row = torch.where(batch.row[:n] < n_rows, batch.row[:n], NOBODY)
        columns = row[:, None] * MAX_FLAGS + torch.arange(width, device=row.device)
        values = read(table, x)[0].gather(1, columns)[None]
        own = GateTable(*(tensor if tensor.ndim == 2 else tensor[columns][None] for tensor in table))
        moved = moves(own, values, torch.where(row != NOBODY, position, -1), MAX_AGE)
        start = batch.ages[row, :width][None, ..., None]
        resumed = moved.gather(-1, start).expand_as(moved)
        moved = torch.where(batch.first[:n].bool()[None, :, None, None], resumed, moved)
        # The first token of a request makes one state of all, so no state of the request before it comes through.
        longest = n if n <= batch.sizes.n_captured else batch.longest
        ages = composed(moved, longest)[..., 0]
        here = self.here[row, :width]
        batch.flags[:, :n, :width] = torch.where(here, ages > 0, batch.flags[:, :n, :width])
        self._keep(ages[0], here, row, n)

    def _keep(
        self, ages: Int[Tensor, "pos flag"], here: Bool[Tensor, "pos flag"], row: Int[Tensor, " pos"], n: int
    ) -> None:
        batch, width = self._batch[0], ages.shape[-1]
        kept = torch.where(batch.last[:n].bool(), row, NOBODY)
        batch.ages[kept, :width] = torch.where(here, ages, batch.ages[kept, :width])
        position = batch.position[:n]
        at = torch.where((position >= 0) & (position < LOG_TOKENS), position, LOG_TOKENS)
        batch.log[row, at, :width] = torch.where(here, ages > 0, batch.log[row, at, :width])

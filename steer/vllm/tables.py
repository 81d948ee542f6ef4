"""The tables of a steered model under vLLM, where tokens of many requests lie behind each other in one row.

A forward pass has the tokens of all requests in [pos, d_model], without padding between them. So a `Lane` has a single
row here, with the slots of all requests, and a token belongs to one of them by its index:

    index of a token  =  OWNER * number of its request + its position          -1 for what is not steered
    low, high         =  the same of a slot, so that it acts on tokens of its own request alone

Gates have MAX_GATES columns for each gated request. What the gates of a request say is in the flags of its tokens, so a
slot asks for the flags of its own request, as `steer.plan` numbered them. Tokens of one request lie behind each other,
and the first of them takes up the state that the pass before left.

All buffers are made before any graph is captured and rewritten in place; shapes depend on the number of tokens alone.
Where a pass may be captured everything is executed; otherwise what is not in use is passed over.

Left out: which request has which slots (`steer.vllm.rows`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from activations.hook_points import HookPoint
from steer.gates import GateTable, composed, moves, read
from steer.tables import Lane, LaneKey, applied
from steer.vllm.catalogue import MAX_AGE, MAX_CLAUSES, MAX_GATES

OWNER = 2**32
"""positions of a request are below it"""
LOG_TOKENS = 4096
"""tokens of a request of which the log tells whether gates were open"""


class Sizes(NamedTuple):
    """How much room there is."""

    d_model: int
    n_tokens: int
    """of a forward pass"""
    n_requests: int
    """at once"""
    n_slots: int
    """of a request, in each lane"""
    n_captured: int
    """tokens up to which a pass may be captured as a graph; 0: none is"""


class Batch(nn.Module):
    """Whose the tokens of a forward pass are, and what its gates say."""

    index: Int[Tensor, "1 pos"]
    position: Int[Tensor, "1 pos"]
    row: Int[Tensor, " pos"]
    first: Bool[Tensor, " pos"]
    last: Bool[Tensor, " pos"]
    flags: Bool[Tensor, "1 pos gate"]
    ages: Int[Tensor, "row gate"]
    log: Bool[Tensor, "row token gate"]

    def __init__(self, sizes: Sizes):
        """Make room; no token is steered."""
        super().__init__()
        n, rows = sizes.n_tokens, sizes.n_requests
        self.sizes, self.is_idle, self.is_gated = sizes, True, False
        self.register_buffer("index", torch.full((1, n), -1), persistent=False)
        self.register_buffer("position", torch.full((1, n), -1), persistent=False)
        self.register_buffer("row", torch.full((n,), rows), persistent=False)  # the row behind all: of no request
        for name in ("first", "last"):
            self.register_buffer(name, torch.zeros(n, dtype=torch.bool), persistent=False)
        self.register_buffer("flags", torch.zeros(1, n, MAX_GATES, dtype=torch.bool), persistent=False)
        self.register_buffer("ages", torch.zeros(rows + 1, MAX_GATES, dtype=torch.long), persistent=False)
        shape = (rows + 1, LOG_TOKENS + 1, MAX_GATES)
        self.register_buffer("log", torch.zeros(shape, dtype=torch.bool), persistent=False)

    def rest(self) -> None:
        """No token of the next pass is steered."""
        if not self.is_idle:
            self.index.fill_(-1)
            self.position.fill_(-1)
            self.row.fill_(self.sizes.n_requests)
            self.is_idle = True

    def fill(
        self,
        owner: Int[Tensor, " n"],
        row: Int[Tensor, " n"],
        position: Int[Tensor, " n"],
        first: Bool[Tensor, " n"],
        last: Bool[Tensor, " n"],
    ) -> None:
        """The tokens of the next pass.

        Args:
          owner: number of each token's request; 0: not steered.
          row: where its gates are; `n_requests` if it has none.
        """
        self.is_idle = False
        n, is_steered = len(owner), owner > 0
        self.index[0, n:].fill_(-1)
        self.position[0, n:].fill_(-1)
        self.row[n:].fill_(self.sizes.n_requests)
        self.index[0, :n] = torch.where(is_steered, owner * OWNER + position, -1)
        self.position[0, :n] = torch.where(is_steered, position, -1)
        self.row[:n], self.first[:n], self.last[:n] = row, first, last


class Site(nn.Module):
    """A hook point: what is read at it, and what acts on it."""

    here: Bool[Tensor, "row gate"]

    def __init__(self, point: HookPoint, batch: Batch):
        """Make its tables, empty."""
        super().__init__()
        self.point, self._batch, sizes = point, [batch], batch.sizes
        keys = [LaneKey(point, reads, None, keeps) for reads, keeps in ((None, False), (None, True), (point, False))]
        n_slots = sizes.n_requests * sizes.n_slots
        lanes = [Lane(key, n_slots, 1, MAX_CLAUSES, MAX_GATES, sizes.d_model) for key in keys]
        self.lanes = nn.ModuleList(lanes)
        self.used: dict[LaneKey, Lane] = {}
        """of each lane that is in use, the slots of its beginning, behind which none is"""
        self.gated_rows = 0
        """the same of rows of gates"""
        n_gates = sizes.n_requests * MAX_GATES
        self._table(n_gates, sizes.d_model)
        self.register_buffer("here", torch.zeros(sizes.n_requests + 1, MAX_GATES, dtype=torch.bool), persistent=False)

    def _table(self, n: int, d_model: int) -> None:
        empty = {
            "weight": torch.zeros(n, d_model), "bias": torch.zeros(n), "floor": torch.zeros(n),
            "absolute": torch.zeros(n, dtype=torch.bool), "relative": torch.zeros(n, dtype=torch.bool),
            "on": torch.zeros(n), "off": torch.zeros(n), "min_tokens": torch.ones(n, dtype=torch.long),
        }  # fmt: skip
        for name, tensor in empty.items():
            self.register_buffer(f"gate_{name}", tensor, persistent=False)

    def lane(self, key: LaneKey) -> Lane:
        """One of its lanes."""
        return next(lane for lane in self.all if lane.key == key)

    def use(self, key: LaneKey, n_slots: int) -> None:
        """So many slots of a lane may be in use from now on, its first ones."""
        self.used.pop(key, None)
        if n_slots:
            self.used[key] = self.lane(key).first(n_slots)

    def set_gates(self, row: int, table: GateTable, columns: Sequence[int]) -> None:
        """The gates of a row that are read here, each in its column; none: forget them."""
        self.here[row] = False
        for i, column in enumerate(columns):
            self.here[row, column] = True
            for name, tensor in table._asdict().items():
                self.get_buffer(f"gate_{name}")[row * MAX_GATES + column] = tensor[i].to(self.here.device)

    @torch.no_grad()
    def act(self, hidden: Float[Tensor, "pos d_model"], residual: Float[Tensor, "pos d_model"] | None) -> None:
        """Steer the residual stream, which is `hidden`, or the sum of both; what changes is written into `hidden`."""
        batch, n = self._batch[0], len(hidden)
        is_whole = n <= batch.sizes.n_captured
        if not is_whole and (batch.is_idle or not (self.used or self.gated_rows)):
            return
        value = hidden[None] if residual is None else hidden[None].float() + residual[None].float()
        x, index = value.float(), batch.index[:, :n]
        n_rows = batch.sizes.n_requests if is_whole else self.gated_rows
        if n_rows:
            self._move_gates(x, n, n_rows)
        lanes = self.all if is_whole else [*self.used.values()]
        if not lanes:
            return
        readings = [None if lane.key.reads is None else lane.read(x) for lane in lanes]
        flags = batch.flags[:, :n] if is_whole or batch.is_gated else batch.flags[:, :n, :0]
        moved = applied(value, lanes, readings, index, flags)
        # Not `moved - residual`: what nothing acts on keeps its bits, and so do the parts of what does.
        hidden.copy_(torch.where(moved != value, hidden[None] + (moved - value), hidden[None])[0])

    @property
    def all(self) -> list[Lane]:
        """Its lanes, whole."""
        return [lane for lane in self.lanes if isinstance(lane, Lane)]

    def _move_gates(self, x: Float[Tensor, "1 pos d_model"], n: int, n_rows: int) -> None:
        """Which gates are open on which tokens; moves them on, and writes the log."""
        batch, k = self._batch[0], n_rows * MAX_GATES
        table = GateTable(*(self.get_buffer(f"gate_{name}")[:k] for name in GateTable._fields))
        row, position = batch.row[:n], batch.position[:, :n]
        is_gated = (row < n_rows)[None]
        columns = row.clamp(max=n_rows - 1)[:, None] * MAX_GATES + torch.arange(MAX_GATES, device=row.device)
        values = read(table, x)[0].gather(1, columns)[None]
        own = GateTable(*(tensor if tensor.ndim == 2 else tensor[columns][None] for tensor in table))
        moved = moves(own, values, torch.where(is_gated, position, -1), MAX_AGE)
        start = batch.ages[row][None, ..., None]
        resumed = moved.gather(-1, start).expand_as(moved)
        moved = torch.where(batch.first[:n][None, :, None, None], resumed, moved)
        # The first token of a request makes one state of all, so no state of the request before it comes through.
        ages = composed(moved)[..., 0]
        here = self.here[row][None] & is_gated[..., None]
        batch.flags[:, :n] = torch.where(here, ages > 0, batch.flags[:, :n])
        self._keep(ages[0], here[0], n)

    def _keep(self, ages: Int[Tensor, "pos gate"], here: Bool[Tensor, "pos gate"], n: int) -> None:
        batch = self._batch[0]
        nowhere = batch.sizes.n_requests
        kept = torch.where(batch.last[:n], batch.row[:n], nowhere)
        batch.ages[kept] = torch.where(here, ages, batch.ages[kept])
        index = batch.position[0, :n]
        at = torch.where((index >= 0) & (index < LOG_TOKENS), index, LOG_TOKENS)
        logged = batch.log[batch.row[:n], at]
        batch.log[batch.row[:n], at] = torch.where(here, ages > 0, logged)

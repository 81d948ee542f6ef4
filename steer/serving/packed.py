"""Steering several requests that lie behind each other in one forward pass, each by what it asked for.

A pass has [1, token] with the tokens of one request after those of another, as many of each as are computed now. Every
request has a `Steering` of its own, whose tables, gates and latches see its own tokens alone; so nothing of one request
can reach another, and what steers one is what would steer it by itself. A pass in which nothing acts is left alone.

Flow of a pass: 1. in front of it, `spans` says which tokens are whose; 2. requests with one token each and no gates or
latches, which is what decoding is mostly made of, are taken together, their tables as the rows of one; the others go
one by one; 3. at each hook point tokens go through what steers them; hooks are put on when a point is first asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from activations.hook_points import HookPoint
from activations.hooks import edit
from activations.models import LoadedModel
from steer.runtime import Steering
from steer.tables import Lane, LaneKey, applied


class Span(NamedTuple):
    """The tokens of one request in a pass."""

    start: int
    stop: int
    steered: Steering | None


class Together:
    """Requests that one table steers: a row, and a token, each."""

    def __init__(self, several: Sequence[Steering]):
        """Args: several: of one sequence each, without gates and latches."""
        tables = [{lane.key: lane for lane in each.lanes if not lane.is_empty} for each in several]
        keys = dict.fromkeys(key for lanes in tables for key in lanes)
        self._lanes = [joined(key, [lanes.get(key) for lanes in tables]) for key in keys]
        points = {point for lane in self._lanes for point in (lane.key.acts, lane.key.reads) if point is not None}
        self.points = sorted(points, key=lambda point: point.depth)
        self._index: Any = None
        self._readings: list[Any] = []

    def begin(self, index: Int[Tensor, "row 1"], ids: Int[Tensor, "row 1"]) -> None:
        """In front of a pass."""
        self._index, self._readings = index, [None] * len(self._lanes)

    def at(self, point: HookPoint, value: Float[Tensor, "row 1 d_model"]) -> Float[Tensor, "row 1 d_model"]:
        """The value at one of `points`, steered."""
        for i, lane in enumerate(self._lanes):
            if lane.key.reads == point:
                self._readings[i] = lane.read(value.float())
        acting = [i for i, lane in enumerate(self._lanes) if lane.key.acts == point]
        if not acting:
            return value
        lanes, readings = [self._lanes[i] for i in acting], [self._readings[i] for i in acting]
        flags = torch.zeros((*self._index.shape, 0), dtype=torch.bool, device=value.device)
        return applied(value, lanes, readings, self._index, flags)

    def end(self) -> None:
        """Behind a pass."""
        self._index, self._readings = None, []


def joined(key: LaneKey, lanes: Sequence[Lane | None]) -> Lane:
    """The tables of several sequences as the rows of one; where there is none, a row that acts on nothing."""
    known = [lane for lane in lanes if lane is not None]
    n, first = max(lane.n_slots for lane in known), known[0]
    whole = Lane(key, n, 0, 1, 0, first.writes.shape[-1], encoder=first.encoder)
    for name, buffer in first.named_buffers(recurse=False):
        if buffer.ndim < 2:
            continue  # of what is not read
        rows = [torch.zeros_like(buffer) if lane is None else getattr(lane, name) for lane in lanes]
        whole._buffers[name] = torch.cat([_with_slots(row, n) for row in rows])
    whole.is_empty = False
    return whole


def _with_slots(rows: Tensor, n: int) -> Tensor:
    """A buffer with room for `n` slots, those behind its own acting on nothing."""
    return functional.pad(rows, [0, 0] * (rows.ndim - 2) + [0, n - rows.shape[1]])


class _Part(NamedTuple):
    """Some tokens of a pass and what steers them."""

    tokens: Any
    """their places in the pass: a slice, or an index for one token a row"""
    steered: Steering | Together

    def taken(self, packed: Tensor) -> Tensor:
        """[1, token, ...] -> [row, pos, ...]"""
        return packed[:, self.tokens] if isinstance(self.tokens, slice) else packed[0, self.tokens][:, None]

    def put(self, packed: Tensor, value: Tensor) -> None:
        """Back to where they were taken from."""
        packed[:, self.tokens] = value if isinstance(self.tokens, slice) else value[None, :, 0]


class PackedSteering:
    """What steers packed passes of a model."""

    def __init__(self, loaded: LoadedModel, spans: Callable[[], Sequence[Span]]):
        """Args: spans: asked in front of every pass whose tokens are where in it."""
        self._loaded, self._spans = loaded, spans
        self._hooks = ExitStack()
        self._points: set[HookPoint] = set()
        self._now: list[_Part] = []
        self._together: tuple[list[Steering], Together | None] = [], None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks, for as long as the context lasts."""
        base = self._loaded.model.base_model
        with self._hooks:
            self._hooks.callback(base.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            self._hooks.callback(base.register_forward_hook(self._end).remove)
            yield

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, positions = kwargs["input_ids"].long(), kwargs["position_ids"].long()
        self._now = self._parts(ids.device)
        for part in self._now:
            part.steered.begin(part.taken(positions), part.taken(ids))
        for point in {point for part in self._now for point in part.steered.points} - self._points:
            self._hooks.enter_context(edit(self._loaded.model, self._loaded.family, point, partial(self._at, point)))
            self._points.add(point)

    def _parts(self, device: torch.device) -> list[_Part]:
        spans = [(span, span.steered) for span in self._spans() if span.steered is not None and not span.steered.rests]
        few = [(span, each) for span, each in spans if span.stop - span.start == 1 and not each.has_flags]
        parts = [
            _Part(slice(span.start, span.stop), each)
            for span, each in spans
            if span.stop - span.start > 1 or each.has_flags
        ]
        if few:
            several = [each for _, each in few]
            if self._together[0] != several:
                self._together = several, Together(several)
            assert self._together[1] is not None
            tokens = torch.tensor([span.start for span, _ in few], device=device)
            parts.append(_Part(tokens, self._together[1]))
        return parts

    def _at(self, point: HookPoint, value: Tensor) -> Tensor:
        parts = [part for part in self._now if point in part.steered.points]
        if not parts:
            return value
        steered = value.clone()
        for part in parts:
            part.put(steered, part.steered.at(point, part.taken(value)))
        return steered

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for part in self._now:
            part.steered.end()
        self._now = []

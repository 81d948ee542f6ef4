"""Steering several requests that lie behind each other in one forward pass, each by what it asked for.

A pass has [1, token] with the tokens of one request after those of another, as many of each as are computed now. Every
request has a `Steering` of its own, whose tables, gates and latches see its own tokens alone; so nothing of one request
can reach another, and what steers one is what would steer it by itself. A pass in which nothing acts is left alone.

Flow of a pass: 1. in front of it, `spans` says which tokens are whose; 2. at each hook point, each request's tokens go
through its own steering; hooks are put on when a hook point is first asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from activations.hook_points import HookPoint
from activations.hooks import edit
from activations.models import LoadedModel
from steer.runtime import Steering


class Span(NamedTuple):
    """The tokens of one request in a pass."""

    start: int
    stop: int
    steered: Steering | None


class PackedSteering:
    """What steers packed passes of a model."""

    def __init__(self, loaded: LoadedModel, spans: Callable[[], Sequence[Span]]):
        """Args: spans: asked in front of every pass whose tokens are where in it."""
        self._loaded, self._spans = loaded, spans
        self._hooks = ExitStack()
        self._points: set[HookPoint] = set()
        self._now: dict[HookPoint, list[Span]] = {}

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
        self._now = {}
        for span in self._spans():
            if span.steered is None or span.steered.rests:
                continue
            at = slice(span.start, span.stop)
            span.steered.begin(positions[:, at], ids[:, at])
            for point in span.steered.points:
                self._now.setdefault(point, []).append(span)
        for point in self._now.keys() - self._points:
            self._hooks.enter_context(edit(self._loaded.model, self._loaded.family, point, partial(self._at, point)))
            self._points.add(point)

    def _at(self, point: HookPoint, value: Tensor) -> Tensor:
        spans = self._now.get(point)
        if not spans:
            return value
        parts, done = [], 0
        for span in spans:
            assert span.steered is not None
            parts += [value[:, done : span.start], span.steered.at(point, value[:, span.start : span.stop])]
            done = span.stop
        return torch.cat([*parts, value[:, done:]], dim=1)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for spans in self._now.values():
            for span in spans:
                assert span.steered is not None
                span.steered.end()
        self._now = {}

"""Steering several requests that lie behind each other in one forward pass, each by what it asked for.

A pass has [1, token] with the tokens of one request after those of another, as many of each as are computed now. What
steers a request sees its own tokens alone, so nothing of one request can reach another, and what steers one is what
would steer it by itself. A pass in which nothing acts is left alone.

Flow of a pass: 1. in front of it, `spans` says which tokens are whose; 2. requests are rows of common tables
(`steer.packed`), whose cost does not grow with their number; those for which these have no room (more than a few gates,
conditions of many alternatives, gates that stay open for long) have a `Steering` of their own each; 3. at each hook
point tokens go through what steers them; hooks are put on when a point is first asked for.
"""

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from activations.errors import ConfigError
from activations.hook_points import HookPoint
from activations.hooks import edit
from activations.models import LoadedModel
from steer.packed.prepared import check_room
from steer.packed.rows import Fired, Rows
from steer.packed.tables import Sizes
from steer.runtime import Steering
from steer.serving.engine import Ticket


class Span(NamedTuple):
    """The tokens of one request in a pass."""

    ticket: Ticket | None
    """none: of one that nobody waits for"""
    n: int


class _Part(NamedTuple):
    """Some tokens of a pass, and what steers them alone."""

    tokens: slice
    steered: Steering


class PackedSteering:
    """What steers packed passes of a model. To be called from several threads."""

    def __init__(self, loaded: LoadedModel, spans: Callable[[], Sequence[Span]], *, max_running: int, n_tokens: int):
        """Args: spans: asked in front of every pass whose tokens are where in it. n_tokens: the most of a pass."""
        self._loaded, self._spans = loaded, spans
        sizes = Sizes(loaded.d_model, n_tokens, max_running, n_slots=0, n_captured=0)
        self._rows = Rows([], sizes).to(loaded.device)
        self._alone: dict[str, Steering] = {}
        self._ended: list[Ticket] = []
        self._lock = threading.Lock()
        self._hooks = ExitStack()
        self._points: set[HookPoint] = set()
        self._now: list[_Part] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks, for as long as the context lasts."""
        base = self._loaded.model.base_model
        with self._hooks:
            self._hooks.callback(base.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            self._hooks.callback(base.register_forward_hook(self._end).remove)
            yield

    def release(self, ticket: Ticket) -> None:
        """Give back what a request has; what is to be told of it is kept with its ticket."""
        with self._lock:
            self._ended.append(ticket)

    # --- a pass ------------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, positions = kwargs["input_ids"].long(), kwargs["position_ids"].long()
        with self._lock:
            spans = self._spans()  # a request that has ended by now is none of them, and so not kept again
            self._give_back()
            for span in spans:
                if span.ticket is not None:
                    self._keep(span.ticket)
            self._rows.prepare(
                ["" if span.ticket is None else span.ticket.job.id for span in spans],
                [span.n for span in spans],
                lambda n: positions[0, :n],
                lambda n: ids[0, :n],
            )
        self._now = self._parts(spans)
        for part in self._now:
            part.steered.begin(positions[:, part.tokens], ids[:, part.tokens])
        alone = {point for part in self._now for point in part.steered.points}
        for point in (alone | {*self._rows.sites}) - self._points:
            self._hooks.enter_context(edit(self._loaded.model, self._loaded.family, point, partial(self._at, point)))
            self._points.add(point)

    def _give_back(self) -> None:
        for ticket in self._ended:
            found = self._fired(ticket)
            ticket.fired_on = partial(dict, found)
            self._rows.release([ticket.job.id], finished=True)
            self._alone.pop(ticket.job.id, None)
        self._ended.clear()

    def _keep(self, ticket: Ticket) -> None:
        id_, planned = ticket.job.id, ticket.planned
        if planned is None or not planned.prepared.steers or id_ in self._rows or id_ in self._alone:
            return
        try:
            check_room(planned.prepared)
        except ConfigError:
            self._alone[id_] = planned.steering(self._loaded)
        else:
            self._rows.keep(id_, lambda: planned.prepared)
        ticket.fired_on = partial(self._asked, ticket)

    def _parts(self, spans: Sequence[Span]) -> list[_Part]:
        found, start = list[_Part](), 0
        for span in spans if self._alone else ():
            steered = None if span.ticket is None else self._alone.get(span.ticket.job.id)
            if steered is not None and not steered.rests:
                found.append(_Part(slice(start, start + span.n), steered))
            start += span.n
        return found

    def _at(self, point: HookPoint, value: Tensor) -> Tensor:
        site = self._rows.sites.get(point)
        steered = value if site is None else site.steered(value)
        parts = [part for part in self._now if point in part.steered.points]
        if parts and steered is value:
            steered = value.clone()
        for part in parts:
            steered[:, part.tokens] = part.steered.at(point, value[:, part.tokens])
        return steered

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for part in self._now:
            part.steered.end()
        self._now = []

    # --- what is told ------------------------------------------------------------------------------------------------

    def _asked(self, ticket: Ticket) -> Fired | Awaitable[Fired]:
        with self._lock:
            if ticket.job.id in self._alone or ticket.job.id in self._rows:
                return self._fired(ticket)
        return ticket.fired_on()  # of one that was given back while the lock was waited for, what was told then

    def _fired(self, ticket: Ticket) -> dict[str, list[int]]:
        """By gate: the tokens on which it was open."""
        alone = self._alone.get(ticket.job.id)
        found = (alone.fired() or [{}])[0] if alone is not None else self._rows.fired(ticket.job.id)
        return found or {}

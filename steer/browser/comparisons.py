"""Two SAEs side by side: compared once, in the background, and then read a page at a time.

Flow: 1. somebody asks for a comparison (`sae.compare`), which one worker computes, as products of all rows with all
rows take a while; 2. the page asks how it stands; 3. pairs of a class are listed, the clearest first. The newest few
are kept in memory. Left out: what the two latents of a pair do (`steer.browser.features`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from activations.errors import ConfigError
from sae.config import CompareConfig
from steer.browser.guard import Viewer
from steer.browser.lists import Named, Offset, SourceName, named
from steer.browser.sources import Opened, Source
from steer.items import Body

if TYPE_CHECKING:
    from sae.compare import Comparison

KEPT, WORDS = 4, 5
ALONE = {"alone": "one", "alone_other": "other"}
"""classes of single latents: those of the one that nothing of the other is like, and the other way"""


class Wanted(Body):
    """Which two are to be compared."""

    one: str = Field(max_length=200)
    other: str = Field(max_length=200)


class State(BaseModel):
    """How a comparison stands."""

    state: Literal["not begun", "running", "done", "failed"]
    problem: str | None = None
    summary: dict[str, Any] | None = None


class Pair(BaseModel):
    """Two latents, or one that is alone; figures that are not known are None."""

    one: Named | None
    other: Named | None
    decoder_cosine: float | None
    encoder_cosine: float | None
    correlation: float | None


class Pairs(BaseModel):
    """A part of a class."""

    total: int
    offset: int
    pairs: list[Pair]


class Comparisons:
    """Comparisons that were asked for."""

    def __init__(self, opened: Opened, config: CompareConfig | None = None):
        self._opened, self._config = opened, config or CompareConfig.parse({}, "CompareConfig")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="compare")
        self._known: OrderedDict[tuple[str, str], Future[Comparison]] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, one: str, other: str) -> State:
        """Compute a comparison unless it is there. Raises: UnknownNameError; ConfigError for a source without SAE."""
        sources = [self._opened.source(name) for name in (one, other)]
        for source in sources:
            if source.sae is None:
                fix = "Put the SAE back where index.yaml says, or build the index again."
                raise ConfigError(source.name, expected="the SAE of the index", got="none at its place", fix=fix)
        with self._lock:
            known = self._known.get((one, other))
            if known is None or (known.done() and known.exception() is not None):
                self._known[one, other] = self._worker.submit(_compare, sources[0], sources[1], self._config)
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)[1].cancel()
        return self.state(one, other)

    def state(self, one: str, other: str) -> State:
        """How it stands. Raises: UnknownNameError."""
        for name in (one, other):
            self._opened.source(name)
        future = self._known.get((one, other))
        if future is None or future.cancelled():
            return State(state="not begun")
        if not future.done():
            return State(state="running")
        if (error := future.exception()) is not None:
            return State(state="failed", problem=str(error))
        return State(state="done", summary=future.result().summary)

    def pairs(self, one: str, other: str, kind: str, offset: int, limit: int) -> Pairs:
        """Pairs of a class, those of the largest cosine or correlation first; of what is alone the loneliest."""
        future = self._known.get((one, other))
        if future is None or not future.done() or future.cancelled() or future.exception() is not None:
            fix = "Ask for the comparison first."
            raise ConfigError("comparison", expected="one that is done", got="none", fix=fix)
        sources = self._opened.source(one), self._opened.source(other)
        return _page(future.result(), sources, kind, offset, limit)

    def close(self) -> None:
        """Begin nothing more."""
        self._worker.shutdown(wait=False, cancel_futures=True)


def comparisons_router(comparisons: Comparisons) -> APIRouter:
    """Routes of comparisons."""
    router = APIRouter(prefix="/api/comparison")

    @router.post("", status_code=202)
    def begin(account: Viewer, wanted: Wanted) -> State:
        return comparisons.begin(wanted.one, wanted.other)

    @router.get("")
    def state(account: Viewer, one: SourceName, other: SourceName) -> State:
        return comparisons.state(one, other)

    @router.get("/pairs")
    def pairs(
        account: Viewer, one: SourceName, other: SourceName, kind: Annotated[str, Query(max_length=20)],
        offset: Offset = 0, limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Pairs:  # fmt: skip
        return comparisons.pairs(one, other, kind, offset, limit)

    return router


def _compare(one: Source, other: Source, config: CompareConfig) -> Comparison:
    from sae.compare import compare_whole

    return compare_whole(one.path, other.path, config)


def _page(result: Comparison, sources: tuple[Source, Source], kind: str, offset: int, limit: int) -> Pairs:
    found = result.found
    if kind not in found.classes and kind not in ALONE:
        known = ", ".join([*found.classes, *ALONE])
        raise ConfigError("kind", expected=f"one of {known}", got=repr(kind), fix="Choose one.")
    if kind in ALONE:
        return _alone(result, sources, list(ALONE).index(kind), offset, limit)
    weight = found.pairs.correlation if kind == "correlated" else found.pairs.decoder_cosine
    chosen = np.flatnonzero(found.classes[kind])
    chosen = chosen[np.argsort(-weight[chosen], kind="stable")]
    shown = chosen[offset : offset + limit]
    numbers = [result.kept[side][part[shown]] for side, part in enumerate((found.pairs.one, found.pairs.other))]
    members = [_members(source, latents) for source, latents in zip(sources, numbers, strict=True)]
    figures = (found.pairs.decoder_cosine, found.pairs.encoder_cosine, found.pairs.correlation)
    columns = [[_figure(value) for value in part[shown].tolist()] for part in figures]
    pairs = [
        Pair(one=one, other=other, decoder_cosine=decoder, encoder_cosine=encoder, correlation=correlation)
        for one, other, decoder, encoder, correlation in zip(*members, *columns, strict=True)
    ]
    return Pairs(total=len(chosen), offset=offset, pairs=pairs)


def _alone(result: Comparison, sources: tuple[Source, Source], side: int, offset: int, limit: int) -> Pairs:
    from sae.compare_summary import members

    nearest = result.found.nearest["decoder_cosine"][side]
    alone = np.flatnonzero(members(result.found)["alone"][side])
    alone = alone[np.argsort(nearest[alone], kind="stable")]
    shown = alone[offset : offset + limit]
    listed = _members(sources[side], result.kept[side][shown])
    pairs = [
        Pair(
            one=None if side else each, other=each if side else None, decoder_cosine=round(float(cosine), 4),
            encoder_cosine=None, correlation=None,
        )
        for each, cosine in zip(listed, nearest[shown], strict=True)
    ]  # fmt: skip
    return Pairs(total=len(alone), offset=offset, pairs=pairs)


def _members(source: Source, latents: np.ndarray) -> list[Named]:
    called = named(source.index, latents.tolist(), WORDS)
    return [Named(**called[latent]) for latent in latents.tolist()]


def _figure(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None

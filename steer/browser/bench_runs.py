"""Runs of the bench: one thread a run writes a batch of texts, and stops when nobody listens any more.

Events, in order: `waiting` if another uses the model; `begin`; `token` with a piece for each row and what gates read on
the token before it, the latest that the model has seen; `doses` where new doses begin, or `refused`; `end` or `error`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from activations.errors import ConfigError, SaekitError, UnknownNameError
from steer.browser.basket import Basket, interventions, random_control
from steer.browser.guard import detail_of
from steer.browser.model import SharedModel
from steer.items import MOST_ITEMS, Body, Dose

if TYPE_CHECKING:
    from steer.chat.state import Steer
    from steer.generate import Stream
    from steer.operations import Intervention
    from steer.runtime import Steering

MOST_RUNS = 8
"""that write or wait at once"""
CLOSING_S = 10.0
"""a token takes less; a model that is being loaded may take more"""
MOST_CHANGES = 100
"""of doses that are known beforehand"""


class Doses(Body):
    """One for each item of the basket."""

    doses: list[Dose | None] = Field(max_length=MOST_ITEMS)


class Change(Doses):
    """Other doses behind a token."""

    at: int = Field(ge=1, le=1024, description="tokens that are written before")


class Asked(Body):
    """What is written."""

    basket: Basket
    prompt: str = Field(min_length=1, max_length=8000)
    chat: bool = True
    max_new_tokens: int = Field(60, ge=1, le=1024)
    temperature: float = Field(0.7, ge=0, le=10, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**31)
    control: bool = False
    force: bool = False
    changes: list[Change] = Field([], max_length=MOST_CHANGES)
    """doses that change while it is written, as they did before; what is asked for meanwhile takes their place"""


@dataclass(eq=False)
class Run:
    """One run."""

    asked: Asked
    steers: list[Steer]
    account: str
    loop: asyncio.AbstractEventLoop
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    stop: threading.Event = field(default_factory=threading.Event)
    events: asyncio.Queue[tuple[str, Any]] = field(default_factory=asyncio.Queue)
    wanted: list[Dose | None] | None = None
    thread: threading.Thread | None = None

    def say(self, event: str, data: Any) -> None:
        """From the worker to whoever listens."""
        if not self.stop.is_set():
            self.loop.call_soon_threadsafe(self.events.put_nowait, (event, data))

    def rows(self, steers: list[Steer]) -> list[list[Intervention]]:
        """Steered, unsteered and, if asked for, the control."""
        rows = [interventions(steers), []]
        return [*rows, random_control(steers, self.asked.seed)] if self.asked.control else rows


class Runs:
    """All runs of a browser."""

    def __init__(self, model: SharedModel):
        self._model, self._runs, self._lock = model, dict[str, Run](), threading.Lock()

    def start(self, run: Run) -> AsyncIterator[str]:
        """Begin to write. Raises: ConfigError if too many do, or for changes of another number of doses."""
        for change in run.asked.changes:
            _check(change, run)
        with self._lock:
            if len(self._runs) >= MOST_RUNS:
                raise ConfigError("bench", expected=f"at most {MOST_RUNS} runs", got="more", fix="Wait for one to end.")
            self._runs[run.id] = run
            run.thread = threading.Thread(target=self._work, args=(run,), daemon=True)
            run.thread.start()
        return _events(run)

    def close(self) -> None:
        """Stop all that write, and wait until each has left the model as it was, for CLOSING_S each at most."""
        with self._lock:
            running = list(self._runs.values())
        for run in running:
            run.stop.set()
        for run in running:
            if run.thread is not None:
                run.thread.join(CLOSING_S)

    def dose(self, id_: str, account: str, doses: Doses) -> None:
        """Other doses from the next token on. Raises: UnknownNameError, ConfigError."""
        run = self._runs.get(id_)
        if run is None or run.account != account:
            raise UnknownNameError("run", expected="one of yours that goes on", got=repr(id_[:40]), fix="Run again.")
        _check(doses, run)
        run.wanted = doses.doses

    def _work(self, run: Run) -> None:
        try:
            if self._model.is_busy:
                run.say("waiting", {"model": self._model.state})
            with self._model.using() as loaded:
                if not run.stop.is_set():
                    _write(run, loaded)
        except SaekitError as error:
            run.say("error", detail_of(error))
        except Exception as error:  # the listener must hear of an end, whatever it was
            got = type(error).__name__
            run.say("error", {"where": "bench", "expected": "a text", "got": got, "fix": "Change the settings."})
        finally:
            with self._lock:
                self._runs.pop(run.id, None)


def _write(run: Run, loaded: Any) -> None:
    from activations.chat import chat_prompt
    from steer.generate import streaming

    asked, rows = run.asked, run.rows(run.steers)
    prompt = chat_prompt(loaded, asked.prompt) if asked.chat else asked.prompt
    largest = run.rows([replace(steer, dose=1.0) for steer in run.steers])
    texts = [""] * len(rows)
    with streaming(
        loaded, [prompt] * len(rows), max_new_tokens=asked.max_new_tokens, temperature=asked.temperature,
        seed=[asked.seed] * len(rows), rows=rows, reserve=[each for row in largest for each in row],
        add_special_tokens=not asked.chat, force=asked.force,
    ) as stream:  # fmt: skip
        names = ["steered", "unsteered", "control"][: len(rows)]
        run.say("begin", {"id": run.id, "rows": names, "prompt_tokens": stream.prompt_lengths})
        planned = {change.at: change.doses for change in asked.changes}
        for n, pieces in enumerate(stream.pieces, 1):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            run.say("token", {"pieces": pieces, "gates": _gates(stream.steered)})
            if run.stop.is_set():
                return
            wanted, run.wanted = run.wanted, None
            if wanted is not None:
                planned = {}
                _change(run, stream, wanted, n, is_planned=False)
            elif n in planned:
                _change(run, stream, planned[n], n, is_planned=True)
        fired = stream.steered.fired()
    run.say("end", {"texts": texts, "fired": fired})  # whoever hears of it finds the model as it was


def _gates(steered: Steering) -> list[dict[str, tuple[float, bool]]]:
    rows = steered.latest()
    return [{name: (round(value, 4), is_open) for name, (value, is_open) in row.items()} for row in rows]


def _change(run: Run, stream: Stream, doses: list[Dose | None], n: int, *, is_planned: bool) -> None:
    steers = [replace(steer, dose=dose) for steer, dose in zip(run.steers, doses, strict=True)]
    try:
        stream.steered.set(rows=run.rows(steers), prompt_lengths=stream.prompt_lengths)
    except SaekitError as error:
        run.say("refused", detail_of(error))
    else:
        run.say("doses", {"at": n, "doses": doses, "planned": is_planned})


def _check(doses: Doses, run: Run) -> None:
    if len(doses.doses) != len(run.steers):
        fix = "Give one for each item."
        raise ConfigError("doses", expected=f"{len(run.steers)} doses", got=len(doses.doses), fix=fix)


async def _events(run: Run) -> AsyncIterator[str]:
    try:
        while True:
            event, data = await run.events.get()
            yield f"event: {event}\ndata: {json.dumps(data)}\n\n"
            if event in ("end", "error"):
                return
    finally:
        run.stop.set()

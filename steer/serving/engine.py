"""What an engine does: it writes the answers that it is given, each steered by its own, and says what it did.

    ticket = engine.submit(job)
    async for step in ticket:                tokens, until the answer has ended
        ...
    ticket.cancel()                          at any time, also when it has ended

An engine runs in a thread or processes of its own and reaches whoever waits through the event loop that it was asked
from. Left out: requests, limits and text (`steer.serving.app`); engines (`one_by_one`, `continuous`, `on_vllm`).
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from activations.errors import ConfigError, SaekitError
from activations.models import LoadedModel
from steer.packed.prepared import Prepared, prepared
from steer.packed.rows import Fired
from steer.plan import Interventions, Plan
from steer.runtime import Steering
from steer.serving.items import Asked
from steer.serving.sampling import Sampler, Sampling, Step

AT_ONCE = 16
"""tokens of an answer that nobody reads before its end, which are told together, behind the first"""


class TooLongError(ConfigError):
    """A prompt that with its answer is longer than the model's context."""


@dataclass(frozen=True)
class Job:
    """One answer to be written."""

    id: str
    ids: list[int]
    """the prompt"""
    sampling: Sampling
    interventions: Interventions = ()
    budget: float | None = None
    asked: Asked = field(default_factory=Asked)
    """interventions and budget in the words of requests, for an engine that finds them itself"""
    is_whole: bool = False
    """whether nobody needs a token before the last one: an engine may hand several over together, or all"""


class Account(NamedTuple):
    """What became of an answer's steering."""

    fired: Fired
    """tokens by their index in prompt and answer"""
    scaled: Mapping[str, float]
    """by hook point: what is left of what was asked for, where the budget is less"""


@dataclass(frozen=True, eq=False)
class Planned:
    """What a job is steered with, checked."""

    plan: Plan
    prepared: Prepared

    def steering(self, loaded: LoadedModel) -> Steering:
        """What steers it by itself, on the model's device."""
        import torch

        with torch.inference_mode(False):
            steered = Steering(loaded, self.plan, 1).to(loaded.device)
            steered.fill(self.prepared.contents)
        return steered


@dataclass(eq=False)
class Ticket:
    """An answer that is being written."""

    job: Job
    loop: asyncio.AbstractEventLoop
    ends: frozenset[int]
    """tokens that end an answer"""
    planned: Planned | None
    """what steers it; none: nothing"""
    scaled: Mapping[str, float] = field(default_factory=dict)
    """by hook point, what a budget left of what was asked for"""
    fired_on: Callable[[], Fired | Awaitable[Fired]] = dict
    """tells by gate on which tokens it was open; an engine's"""
    on_cancel: Callable[[], Any] = lambda: None
    """told when no more tokens are needed"""
    stop: threading.Event = field(default_factory=threading.Event)
    n_written: int = 0
    held: list[Step] = field(default_factory=list)
    """tokens that are written and not told yet"""
    _steps: asyncio.Queue[Step | SaekitError | None] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.job.sampling)

    # --- of the engine -----------------------------------------------------------------------------------------------

    def failed(self, error: SaekitError) -> None:
        """Hand over why there will be no more."""
        _tell(self.loop, [(self, [error])])

    def heard(self, what: Sequence[Step | SaekitError | None]) -> None:
        """In the event loop: what comes next."""
        for each in what:
            self._steps.put_nowait(each)

    def is_last(self, step: Step) -> bool:
        """Whether the answer ends with this token, the newest."""
        return step.token in self.ends or self.n_written >= self.job.sampling.max_tokens

    # --- of whoever waits --------------------------------------------------------------------------------------------

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> Step:
        """The next token. Raises: EngineError and whatever is wrong with the steering."""
        step = await self._steps.get()
        if step is None:
            raise StopAsyncIteration
        if isinstance(step, SaekitError):
            raise step
        return step

    def cancel(self) -> None:
        """No more tokens are needed."""
        self.stop.set()
        self.on_cancel()

    async def account(self) -> Account:
        """What became of the steering so far. Raises: EngineError."""
        found = self.fired_on()
        return Account(await found if isawaitable(found) else found, self.scaled)


_News = tuple[Ticket, Sequence[Step | SaekitError | None]]


def hand_over(steps: Sequence[tuple[Ticket, Step]]) -> None:
    """Hand the tokens of a forward pass over to those who wait, waking each event loop once.

    Of answers that nobody reads before their end AT_ONCE are handed over together: each time two tasks go on.
    """
    news: dict[asyncio.AbstractEventLoop, list[_News]] = {}
    for ticket, step in steps:
        ticket.n_written += 1
        ticket.held.append(step)
        is_last = ticket.is_last(step)
        if ticket.job.is_whole and not is_last and ticket.n_written % AT_ONCE != 1:
            continue
        told, ticket.held = ticket.held, []
        news.setdefault(ticket.loop, []).append((ticket, [*told, None] if is_last else told))
    for loop, told in news.items():
        _tell(loop, told)


def _tell(loop: asyncio.AbstractEventLoop, news: Sequence[_News]) -> None:
    def tell() -> None:
        for ticket, what in news:
            ticket.heard(what)

    try:
        loop.call_soon_threadsafe(tell)
    except RuntimeError:  # the loop is closed: nobody waits any more
        for ticket, _ in news:
            ticket.stop.set()


@runtime_checkable
class Engine(Protocol):
    """What answers requests."""

    loaded: LoadedModel

    def start(self) -> None:
        """Begin to work."""
        ...

    def check(self, job: Job) -> None:
        """Raise for a job that cannot be done: TooLongError for a prompt that does not fit, and as
        `steer.runtime.steering` does."""
        ...

    def submit(self, job: Job) -> Ticket:
        """Write an answer, behind those that were asked for before. To be called from an event loop.

        Raises: as `check` does; EngineError if it no longer works.
        """
        ...

    @property
    def is_alive(self) -> bool:
        """Whether it still works."""
        ...

    @property
    def most_tokens(self) -> int:
        """Prompt and answer together."""
        ...

    def close(self) -> None:
        """Stop, whatever is being written, and also if it was stopped before."""
        ...


def check_length(job: Job, most_tokens: int) -> None:
    """Raise TooLongError for a job that is longer than an engine can do."""
    if len(job.ids) + job.sampling.max_tokens > most_tokens:
        raise TooLongError(
            "prompt",
            expected=f"at most {most_tokens} tokens with the answer, the maximum context length",
            got=f"{len(job.ids)}, and up to {job.sampling.max_tokens} of the answer",
            fix="Shorten the prompt, or ask for fewer tokens.",
        )


def ticket_of(loaded: LoadedModel, job: Job, most_tokens: int) -> Ticket:
    """A ticket for a job that can be done. Raises: as `Engine.check` does."""
    planned = planned_of(loaded, job, most_tokens)
    scaled = {} if planned is None else planned.prepared.scaled
    return Ticket(job, asyncio.get_running_loop(), ends_of(loaded), planned, scaled)


def planned_of(loaded: LoadedModel, job: Job, most_tokens: int) -> Planned | None:
    """What steers one answer that can be written; none: nothing. Raises: as `Engine.check` does."""
    check_length(job, most_tokens)
    if not job.interventions:
        return None
    return Planned(*prepared(loaded, job.interventions, len(job.ids), job.budget))


def ends_of(loaded: LoadedModel) -> frozenset[int]:
    """Tokens that end an answer."""
    found: Any = loaded.model.generation_config.eos_token_id
    if found is None:
        found = loaded.tokenizer.eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def context_of(loaded: LoadedModel) -> int:
    """Tokens that the model can see at once."""
    return int(getattr(loaded.model.config, "max_position_embeddings", None) or 1 << 20)

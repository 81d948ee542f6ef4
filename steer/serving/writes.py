"""The answers of one request while they are written, merged into one stream of pieces.

    async for delta in Answers(engine, jobs, ...).deltas():        whichever answer goes on first
    answers.choices                                               what each has come to

Leaving the stream, or running out of time, cancels what is still being written. Left out: how it is told
(`steer.serving.answers`).
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from activations.errors import EngineError, SaekitError
from steer.serving.engine import Account, Engine, Job, Ticket
from steer.serving.sampling import Step
from steer.serving.writing import Writer


@dataclass(frozen=True)
class Delta:
    """What comes next of one answer."""

    index: int
    text: str
    step: Step | None
    """the token that it comes with; none behind the last"""
    finish: Literal["stop", "length"] | None
    """why nothing follows; none: something does"""


@dataclass
class Choice:
    """One answer so far."""

    ticket: Ticket
    text: str = ""
    steps: list[Step] = field(default_factory=list)
    """its tokens, without the one that ended it"""
    finish: Literal["stop", "length"] | None = None
    account: Account = field(default_factory=lambda: Account({}, {}))
    """what became of its steering, once it has ended"""
    n_read: int = 0
    """tokens that came, the one that ended it included"""

    async def settle(self) -> None:
        """Ask for the account, as it ends here."""
        self.account = await self.ticket.account()

    def record(self) -> dict[str, Any]:
        """Where gates were open, and at how much of what was asked for it was steered.

        Nothing has to be computed from the last token, and what an engine computes beyond it is no part of the answer.
        """
        end = len(self.ticket.job.ids) + self.n_read - 1
        fired = {name: [i for i in at if i < end] for name, at in self.account.fired.items()}
        return {"fired": fired, "scaled": self.account.scaled}


class Answers:
    """See the module docstring."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], stops: Sequence[str], deadline: float):
        """Ask for all of them. Args: deadline: of the event loop's clock. Raises: as `Engine.submit` does."""
        self.choices: list[Choice] = []
        self._engine, self._stops, self._deadline = engine, stops, deadline
        try:
            for job in jobs:
                self.choices.append(Choice(engine.submit(job)))
        except BaseException:  # whoever would cancel them has no answers to do it with
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stop writing."""
        for choice in self.choices:
            choice.ticket.cancel()

    @property
    def n_read(self) -> int:
        """Tokens of all of them, those that ended them included, and not what an engine wrote beyond."""
        return sum(choice.n_read for choice in self.choices)

    async def deltas(self) -> AsyncIterator[Delta]:
        """What comes next, of whichever answer.

        Raises: TimeoutError behind the deadline; EngineError.
        """
        queue: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        tasks = [asyncio.create_task(self._write(index, queue)) for index in range(len(self.choices))]
        late = asyncio.get_running_loop().call_at(self._deadline, queue.put_nowait, TimeoutError())
        try:
            left = len(tasks)
            while left:
                delta = await queue.get()
                if isinstance(delta, BaseException):
                    raise delta
                left -= delta.finish is not None
                yield delta
        finally:
            late.cancel()
            self.cancel()
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task

    async def _write(self, index: int, queue: asyncio.Queue[Delta | BaseException]) -> None:
        choice = self.choices[index]
        ticket = choice.ticket
        writer = Writer(self._engine.loaded.tokenizer, self._stops)

        def say(text: str, step: Step | None, finish: Literal["stop", "length"] | None) -> None:
            choice.text += text
            choice.steps += [] if step is None else [step]
            choice.finish = finish
            queue.put_nowait(Delta(index, text, step, finish))

        try:
            finish: Literal["stop", "length"] = "length"
            async for step in ticket:
                choice.n_read += 1
                if step.token in ticket.ends:
                    finish = "stop"
                    break
                piece = writer.add(step.token)
                if piece.has_stopped:
                    await choice.settle()
                    ticket.cancel()
                    return say(piece.text, step, "stop")
                say(piece.text, step, None)
            await choice.settle()
            piece = writer.end()
            say(piece.text, None, "stop" if piece.has_stopped else finish)
        except SaekitError as error:
            queue.put_nowait(error)
        except Exception as error:  # whoever waits must hear of it, whatever it was
            got = f"{type(error).__name__}: {error}"[:200]
            queue.put_nowait(EngineError("server", expected="an answer", got=got, fix="Tell whoever runs the server."))

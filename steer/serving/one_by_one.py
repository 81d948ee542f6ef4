"""An engine that writes one answer after the other: plain, for every model, and what the other is compared with.

Left out: several answers at once (`steer.serving.continuous`).
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.errors import EngineError, SaekitError
from activations.generate import chosen
from activations.models import LoadedModel
from steer.runtime import running
from steer.serving.engine import Job, Ticket, context_of, hand_over, planned_of, ticket_of
from steer.serving.sampling import Step, pick


class OneByOne:
    """See the module docstring."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self._waiting: queue.Queue[Ticket | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="one-by-one", daemon=True)
        self._is_closing = False

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def most_tokens(self) -> int:
        return context_of(self.loaded)

    def check(self, job: Job) -> None:
        planned_of(self.loaded, job, self.most_tokens)

    def submit(self, job: Job) -> Ticket:
        ticket = ticket_of(self.loaded, job, self.most_tokens)
        ticket.on_cancel = lambda: self._forget(ticket)
        self._waiting.put(ticket)
        return ticket

    def _forget(self, ticket: Ticket) -> None:
        """One that waits: it would lie there until the answers before it have ended."""
        with self._waiting.mutex, suppress(ValueError):
            self._waiting.queue.remove(ticket)

    def close(self) -> None:
        self._is_closing = True
        self._waiting.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while (ticket := self._waiting.get()) is not None and not self._is_closing:
            if ticket.stop.is_set():
                continue
            try:
                self._write(ticket)
            except SaekitError as error:
                ticket.failed(error)
            except Exception as error:  # whoever waits must hear of it, whatever it was
                got, fix = f"{type(error).__name__}: {error}"[:200], "Try again."
                ticket.failed(EngineError("engine", expected="an answer", got=got, fix=fix))

    def _write(self, ticket: Ticket) -> None:
        job = ticket.job
        steps: list[Step] = []

        def choose(scores: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
            steps.extend(pick([ticket.sampler], scores))
            return torch.tensor([steps[-1].token], device=scores.device)

        with self._steering(ticket):
            made = chosen(self.loaded, [job.ids], choose, max_new_tokens=job.sampling.max_tokens, do_sample=False)
            with closing(made) as tokens:  # type: ignore[type-var]
                for _ in tokens:
                    if ticket.stop.is_set() or self._is_closing:
                        return
                    hand_over([(ticket, steps[-1])])
                    if ticket.is_last(steps[-1]):
                        return

    @contextmanager
    def _steering(self, ticket: Ticket) -> Iterator[None]:
        """As the ticket says, and it tells of it afterwards."""
        if ticket.planned is None:
            yield
            return
        steered = ticket.planned.steering(self.loaded)
        ticket.fired_on = lambda: (steered.fired() or [{}])[0]
        with running(steered):
            yield

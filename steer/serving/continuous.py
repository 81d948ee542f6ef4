"""An engine on the continuous batching of transformers: requests join and leave a batch that goes on.

Flow: 1. a job becomes a request of the library's manager, which schedules passes and keeps a paged KV cache; 2. in each
pass `steer.serving.packed` steers every request by its own; 3. `_Picking`, a logits processor of the library's own
kind, draws the next token of each request by its own seed and hands it to its ticket.

Prompts that begin alike share that part of the cache where nothing steers them (`steer.serving.prefixes`). Passes run
eagerly, as hooks ask for. Left out: models that the library cannot batch so (`steer.serving.one_by_one`).
"""

import queue
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from activations.errors import EngineError, ModelError
from activations.models import LoadedModel
from steer.serving.engine import Job, Ticket, context_of, ends_of, hand_over, planned_of, ticket_of
from steer.serving.packed import PackedSteering, Span
from steer.serving.prefixes import share_where_plain
from steer.serving.sampling import pick

PAGE = 64
"""tokens of a page of the cache"""
CLOSING_S = 30.0


class Continuous:
    """See the module docstring."""

    def __init__(self, loaded: LoadedModel, *, max_running: int, batch_tokens: int, cache_tokens: int):
        """Args: max_running: requests of a pass. batch_tokens: tokens of a pass. cache_tokens: those of all requests.

        Raises: ModelError for a model that cannot be batched so.
        """
        self.loaded = loaded
        self._tickets: dict[str, Ticket] = {}
        self._cache_tokens = cache_tokens // PAGE * PAGE
        n_tokens = max(batch_tokens, max_running)
        self._steering = PackedSteering(loaded, self._spans, max_running=max_running, n_tokens=n_tokens)
        self._open = ExitStack()
        settings = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=cache_tokens // PAGE, max_batch_tokens=n_tokens,
            max_requests_per_batch=max_running, allow_block_sharing=True, use_async_batching=False,
            use_cuda_graph=False,
        )  # fmt: skip
        greedy = GenerationConfig(do_sample=False, eos_token_id=[*ends_of(loaded)] or -1, pad_token_id=0)
        try:
            manager = loaded.model.init_continuous_batching(greedy, settings)  # type: ignore[operator]
        except (ValueError, AttributeError, NotImplementedError) as error:
            raise ModelError(
                loaded.spec,
                expected="a model that transformers can batch continuously",
                got=str(error).splitlines()[0][:200],
                fix="Serve it with --set backend=one_by_one",
            ) from error
        share_where_plain(manager, self._is_plain)
        picking = _Picking(self._tickets)
        processors = manager.logit_processor
        processors.logits_processor.append(picking)
        processors.tensors_required += 1
        processors._retrieve_processors_kwargs()
        processors.do_processing = True
        manager.output_router.output_queue = _Nowhere()
        self._manager = manager

    def start(self) -> None:
        self._open.enter_context(self._steering.attached())
        self._manager.start()

    @property
    def is_alive(self) -> bool:
        return self._manager.is_running() and self._manager.background_thread_status.fatal_error is None

    @property
    def most_tokens(self) -> int:
        return min(context_of(self.loaded), self._cache_tokens)

    def check(self, job: Job) -> None:
        planned_of(self.loaded, job, self.most_tokens)

    def submit(self, job: Job) -> Ticket:
        if not self.is_alive:  # of which the library would write to the log, with some of the prompt
            raise _stopped()
        ticket = ticket_of(self.loaded, job, self.most_tokens)
        self._tickets[job.id] = ticket
        self._manager.register_result_handler(job.id, lambda output: self._ended(ticket, output))
        ticket.on_cancel = lambda: self._cancel(ticket)
        added = self._manager.add_request(job.ids, request_id=job.id, max_new_tokens=job.sampling.max_tokens)
        if added is None:
            self._forget(ticket)
            raise _stopped()
        return ticket

    def close(self) -> None:
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=CLOSING_S, hard_stop=True)
        self._open.close()

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.job.id in self._tickets:
            self._manager.cancel_request(ticket.job.id)
            self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.job.id, None) is not None:
            self._steering.release(ticket)
        self._manager.output_router.result_handlers.pop(ticket.job.id, None)

    def _ended(self, ticket: Ticket, output: Any) -> None:
        """In the event loop, of a request that has ended or failed."""
        self._forget(ticket)
        if output.error is not None:
            got = str(output.error).splitlines()[0][:200]
            ticket.failed(EngineError("engine", expected="an answer", got=got, fix="Try again."))

    def _is_plain(self, id_: str) -> bool:
        """Whether nothing steers a request; of one that has ended it is not known."""
        ticket = self._tickets.get(id_)
        return ticket is not None and ticket.planned is None

    def _spans(self) -> list[Span]:
        """Whose tokens are where in the pass that begins."""
        return [
            Span(self._tickets.get(request.state.request_id), request.query_length)
            for request in self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        ]


def _stopped() -> EngineError:
    return EngineError("engine", expected="an engine that works", got="one that has stopped", fix="Restart it.")


class _Nowhere(queue.Queue[Any]):
    """Where the library puts what has ended and nobody waits for any more: it would lie there for good."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Forget it."""


class _Picking(ContinuousBatchingLogitsProcessor):
    """Leaves one token of each request, the one that its own sampler draws."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, tickets: dict[str, Ticket]):
        self._tickets = tickets
        self._rows: list[Ticket | None] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        self._rows = [self._tickets.get(request.state.request_id) for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        rows = [
            (row, ticket) for row, ticket in enumerate(self._rows) if ticket is not None and not ticket.stop.is_set()
        ]
        steps = pick([ticket.sampler for _, ticket in rows], scores[[row for row, _ in rows]]) if rows else []
        hand_over([(ticket, step) for (_, ticket), step in zip(rows, steps, strict=True)])
        chosen = torch.zeros(len(scores), dtype=torch.long)
        for (row, _), step in zip(rows, steps, strict=True):
            chosen[row] = step.token
        return scores.scatter(1, chosen[:, None].to(scores.device), torch.inf)

"""Where vLLM's model runners say which requests come, go, and are in a pass.

vLLM has two model runners, and this module is all that knows of either: the first keeps what it knows of a request and
says the order of a batch itself; the second, which vLLM prefers on a GPU, hands each request over once, also one that
comes back after it was preempted, and makes a batch anew for every pass. One thing is mended on the way, without which
an engine on a CPU ends: `Rewindable`.

Left out: what is done with it (`steer.packed.rows`).
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from steer.packed.prepared import Prepared
from steer.packed.rows import Rows
from steer.vllm.request import NAME

Prepare = Callable[[dict[str, Any], int], Prepared]
"""what a request asks for, and the tokens of its prompt -> what it comes to"""


def follow(runner: Any, rows: Rows, prepare: Prepare) -> None:
    """Let the rows know of every request of a model runner, and of every pass before it begins."""
    (_follow_second if hasattr(runner, "add_requests") else _follow_first)(runner, rows, prepare)


def _follow_first(runner: Any, rows: Rows, prepare: Prepare) -> None:
    update_states, prepare_inputs = runner._update_states, runner._prepare_inputs

    @wraps(update_states)
    def updated(scheduled: Any) -> Any:
        result = update_states(scheduled)
        if runner.device.type == "cpu":
            _mark(runner)
        _release(rows, scheduled)
        rows.release(scheduled.scheduled_cached_reqs.resumed_req_ids, finished=False)
        for request in runner.input_batch.req_ids:
            state = runner.requests[request]
            _keep(rows, request, state.sampling_params, state.num_prompt_tokens, prepare)
        return result

    @wraps(prepare_inputs)
    def filled(scheduled: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
        result = prepare_inputs(scheduled, counts, *args, **kwargs)
        # Tokens that the pass before chose lie on the device by now, and may not be known on the host yet.
        positions, ids = runner.positions, runner.input_ids.gpu
        rows.prepare(runner.input_batch.req_ids, counts, lambda n: positions[:n], lambda n: ids[:n])
        return result

    runner._update_states, runner._prepare_inputs = updated, filled


class Rewindable(torch.Generator):
    """A generator of a CPU that goes back to its mark.

    Behind each part of a prompt vLLM draws a token, which it takes back in a way that only generators of a GPU have.
    """

    mark: Tensor

    def get_offset(self) -> int:
        """Whatever it is, less of it is the mark."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Go back."""
        return self.set_state(self.mark)


def _mark(runner: Any) -> None:
    """Let the next draw of each request that has a seed be taken back."""
    batch = runner.input_batch
    for place, generator in batch.generators.items():
        if not isinstance(generator, Rewindable):
            rewindable = Rewindable().set_state(generator.get_state())
            batch.generators[place] = runner.requests[batch.req_ids[place]].generator = rewindable
        batch.generators[place].mark = batch.generators[place].get_state()


def _follow_second(runner: Any, rows: Rows, prepare: Prepare) -> None:
    add_requests, prepare_inputs = runner.add_requests, runner.prepare_inputs

    @wraps(add_requests)
    def added(scheduled: Any) -> Any:
        _release(rows, scheduled)
        for new in scheduled.scheduled_new_reqs:
            rows.release([new.req_id], finished=False)
            _keep(rows, new.req_id, new.sampling_params, new.prompt_len, prepare)
        return add_requests(scheduled)

    @wraps(prepare_inputs)
    def filled(*args: Any, **kwargs: Any) -> Any:
        batch = prepare_inputs(*args, **kwargs)
        counts, positions, ids = batch.num_scheduled_tokens, batch.positions, batch.input_ids
        rows.prepare(batch.req_ids, counts, lambda n: positions[:n], lambda n: ids[:n])
        return batch

    runner.add_requests, runner.prepare_inputs = added, filled


def _release(rows: Rows, scheduled: Any) -> None:
    rows.release(scheduled.finished_req_ids, finished=True)
    rows.release(scheduled.preempted_req_ids or (), finished=False)


def _keep(rows: Rows, request: str, params: Any, n_prompt: int, prepare: Prepare) -> None:
    steering = (getattr(params, "extra_args", None) or {}).get(NAME)
    if steering is not None:
        rows.keep(request, partial(prepare, steering["request"], n_prompt))

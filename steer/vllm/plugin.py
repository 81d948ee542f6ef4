"""The plugin of vLLM: entry point group `vllm.general_plugins`, which vLLM runs in each of its processes.

Without SAEKIT_VLLM_LIBRARIES it does nothing at all. With it:

1. where the engine's config is made, libraries are opened and checked against the weights, and their hook points go
   into the config, and so into the key of vLLM's compile cache and to all other processes;
2. in front of the engine, a request that steers is checked, and refused with one message, or gets the key of what it
   does (`_admitted`);
3. in the scheduler, the hash of a block of the prefix cache has that key from the first block on that is steered, and
   also where its steering begins and ends in it; blocks before are shared with everybody;
4. in each worker, blocks of the model are steered (`steer.vllm.worker`).

A gate depends on all tokens before, and so does a scope of roles, phases or tool calls; a request with either reads
nothing from the prefix cache. Left out: engines of which parts of one forward pass lie in several places: pipeline and
context parallelism, microbatches.
"""

import json
import logging
import os
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from activations.errors import ConfigError, SaekitError
from steer.vllm.request import NAME, read_request

LIBRARIES = "SAEKIT_VLLM_LIBRARIES"
"""environment variable: a JSON list of folders, or of names of installed libraries"""
SLOTS = "SAEKIT_VLLM_SLOTS"
"""environment variable: operations of one kind that a request may have at one hook point, 1 to 64"""
DEFAULT_SLOTS = 4

log = logging.getLogger("vllm.saekit")
_done: set[str] = set()


def register() -> None:
    """What vLLM calls, once or several times in each process."""
    if not os.environ.get(LIBRARIES) or "registered" in _done:
        return
    _done.add("registered")
    processor = import_module("vllm.v1.engine.input_processor").InputProcessor
    _wrap(import_module("vllm.engine.arg_utils").EngineArgs, "create_engine_config", _configured)
    _wrap(processor, "__init__", _with_catalogue)
    _wrap(processor, "process_inputs", _admitted)
    _wrap(import_module("vllm.v1.worker.worker_base").WorkerWrapperBase, "init_device", _in_worker)
    # Both before either is wrapped: the second takes the function from the first when it is imported.
    for module in [import_module(f"vllm.v1.core.{name}") for name in ("kv_cache_utils", "block_pool")]:
        _wrap(module, "generate_block_hash_extra_keys", _keyed)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapped)


# --- where the engine is made ---------------------------------------------------------------------------------------


def _configured(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    config = original(*args, **kwargs)
    _check(config)
    settings = {"libraries": _libraries(), "slots": _slots(), "fingerprint": _fingerprint(config)}
    catalogue = _catalogue(config, settings)
    settings |= {"hashes": catalogue.hashes, "points": [str(point) for point in catalogue.points]}
    config.additional_config[NAME] = settings
    if not config.parallel_config.worker_extension_cls:
        config.parallel_config.worker_extension_cls = "steer.vllm.worker.Extension"
    log.info("saekit steers with %s at %s", ", ".join(catalogue.hashes), ", ".join(settings["points"]))
    return config


def _libraries() -> list[str]:
    try:
        found = json.loads(os.environ[LIBRARIES])
        if isinstance(found, list) and all(isinstance(each, str) for each in found):
            return found
    except ValueError:
        pass
    fix = f"""Write for example {LIBRARIES}='["smollm2-135m"]'."""
    raise ConfigError(LIBRARIES, expected="a JSON list of folders", got=os.environ[LIBRARIES], fix=fix)


def _slots() -> int:
    given = os.environ.get(SLOTS, str(DEFAULT_SLOTS))
    if not (given.isascii() and given.isdigit() and 0 < int(given) <= 64):
        raise ConfigError(SLOTS, expected="a number from 1 to 64", got=given, fix="Leave it out for 4.")
    return int(given)


def _check(config: Any) -> None:
    parallel, passes = config.parallel_config, config.compilation_config.pass_config
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "microbatches": bool(getattr(parallel, "use_ubatching", False)),
        "sequence parallelism": bool(getattr(passes, "enable_sp", False)),
        "an additional_config that is no dict": not isinstance(config.additional_config, dict),
    }
    found = [name for name, is_on in refused.items() if is_on]
    if found:
        fix = "Switch it off, or serve without the plugin."
        raise ConfigError("vLLM", expected="an engine that saekit can steer", got=found[0], fix=fix)


def _fingerprint(config: Any) -> str:
    from steer.vllm.catalogue import model_of

    told = config.model_config
    return model_of(_source(told.model, told.revision), told.hf_config).fingerprint


def _source(name: str, revision: str | None) -> Any:
    from activations.models import find_source

    spec = name if Path(name).is_dir() or revision is None else f"{name}@{revision}"
    return find_source(spec, log.info)


def _tokenizer_folder(config: Any) -> Path:
    from activations.models import hub_source

    told = config.model_config
    name, revision = told.tokenizer, told.tokenizer_revision
    if name == told.model or Path(name).is_dir():
        return _source(name, revision).folder.resolve()
    return hub_source(name, revision, log.info, unwanted=("*/*", "*.safetensors")).folder


def _catalogue(config: Any, settings: dict[str, Any]) -> Any:
    from activations.families import family_of_config
    from steer.vllm.catalogue import Catalogue, Markers, stand_in

    told = config.model_config
    markers = Markers(partial(_tokenizer_folder, config))
    model = stand_in(family_of_config(told.hf_config), told.hf_config, told.model, settings["fingerprint"], markers)
    return Catalogue(model, settings["libraries"], settings["slots"])


def catalogue_of(config: Any) -> Any:
    """The `steer.vllm.catalogue.Catalogue` of an engine, by its VllmConfig.

    Raises: ConfigError if libraries are others than when the engine was started.
    """
    settings = config.additional_config[NAME]
    catalogue = _catalogue(config, settings)
    if catalogue.hashes != settings["hashes"]:
        fix = "Start the engine again, with the same libraries on every machine."
        raise ConfigError(LIBRARIES, expected="libraries as at the start", got="changed ones", fix=fix)
    return catalogue


# --- in front of the engine -----------------------------------------------------------------------------------------


def _with_catalogue(original: Callable[..., Any], processor: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    original(processor, vllm_config, *args, **kwargs)
    processor.saekit = catalogue_of(vllm_config)


def _admitted(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(processor, *args, **kwargs)
    params = request.sampling_params
    given = (getattr(params, "extra_args", None) or {}).get(NAME)
    if given is None:
        return request
    try:
        steering = _steering(processor, request, given)
    except SaekitError as error:
        raise import_module("vllm.exceptions").VLLMValidationError(str(error)) from error
    params.extra_args = {**params.extra_args, NAME: steering}
    if steering["has_flags"]:
        params.skip_reading_prefix_cache = True
    return request


def _steering(processor: Any, request: Any, given: Any) -> dict[str, Any]:
    """What the scheduler and the workers get to know; a user cannot write it, since `read_request` refuses it."""
    wanted, catalogue = read_request(given), processor.saekit
    ids = request.prompt_token_ids
    if ids is None or request.prompt_embeds is not None:
        fix = "Give tokens or text."
        raise ConfigError("prompt", expected="tokens, where it is steered", got="embeddings", fix=fix)
    prepared = catalogue.prepare(wanted, len(ids))
    if prepared.n_flags and processor.vllm_config.speculative_config is not None:
        where, got = "gates, and scopes of roles, phases or tool calls", "speculative decoding"
        fix = "Leave them out, or start the engine without it."
        raise ConfigError(where, expected="tokens that are computed once", got=got, fix=fix)
    return {
        "request": wanted.model_dump(mode="json"),
        "key": catalogue.key(wanted),
        "bounds": [list(each) for each in prepared.bounds],
        "has_flags": bool(prepared.n_flags),
        "is_gated": bool(prepared.gates),
        "scaled": prepared.scaled,
    }


# --- in the scheduler -----------------------------------------------------------------------------------------------


def _keyed(original: Callable[..., Any], request: Any, start_token_idx: int, end_token_idx: int, *rest: Any) -> Any:
    keys, next_mm_idx = original(request, start_token_idx, end_token_idx, *rest)
    own = block_key(request, end_token_idx)
    return (keys if own is None else (*(keys or ()), (NAME, own))), next_mm_idx


def block_key(request: Any, end: int) -> str | None:
    """What the KV cache of a block that ends at `end` owes to steering; none: nothing, it is everybody's.

    Of where the steering begins and ends, only what lies before `end` counts, so that prompts of different lengths
    share what is steered alike.
    """
    steering = (getattr(request.sampling_params, "extra_args", None) or {}).get(NAME)
    if steering is None:
        return None
    within = [(min(low, end), min(high, end)) for low, high in steering["bounds"]]
    if all(low >= high for low, high in within):
        return None
    return f"{steering['key']} {within}"


# --- in the workers -------------------------------------------------------------------------------------------------


def _in_worker(original: Callable[..., Any], wrapper: Any) -> None:
    original(wrapper)
    worker = wrapper.worker
    load = worker.load_model

    @wraps(load)
    def loaded(*args: Any, **kwargs: Any) -> Any:
        from steer.vllm.worker import attach

        result = load(*args, **kwargs)
        attach(worker.model_runner)
        return result

    worker.load_model = loaded

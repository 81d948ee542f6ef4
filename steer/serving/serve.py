"""`saekit serve`: load a model and libraries, and answer on a port until stopped.

Flow: 1. keys, address and libraries are looked at before anything is loaded that takes long; 2. the model is loaded;
3. listen, and say where; 4. answer. A signal to stop lets answers end for CLOSING_S seconds.
"""

from contextlib import closing, suppress

from activations.errors import ConfigError
from activations.models import LoadedModel, Status, load_model
from steer.listening import LOOPBACK, address_of, is_loopback, listen, say
from steer.manifest import read_manifest
from steer.packs.installed import resolve
from steer.serving.catalogue import Catalogue
from steer.serving.config import ServeConfig
from steer.serving.engine import Engine
from steer.serving.keys import Keys

CLOSING_S = 10


def serve(config: ServeConfig, *, as_json: bool = False, on_status: Status | None = None) -> None:
    """Serve until interrupted.

    Args:
      as_json: say where on standard output, as one JSON object, for programs.
    Raises: ConfigError for an address that is not to be had, or open to others without keys; as `load_model`,
      `Catalogue.open` and `create_app` do.
    """
    import uvicorn

    from steer.serving.app import create_app

    keys = Keys.read(config.keys)
    if not keys.are_needed and not is_loopback(config.host):
        fix = "Leave host as it is and use a tunnel (ssh -L), or give a file of keys."
        raise ConfigError("host", expected="a loopback address without keys", got=config.host, fix=fix)
    for library in config.libraries:
        read_manifest(resolve(library))
    with closing(listen(config.host, config.port)) as listener:
        loaded = _model_of(config, on_status)
        catalogue = Catalogue.open(config.libraries, loaded)
        # A page that reaches the server by a name of its own (DNS rebinding) has no key.
        names = None if keys.are_needed else {*LOOPBACK, config.host, *config.hosts}
        with closing(engine_of(config, loaded)) as engine:  # which the application closes too, if it ever runs
            app = create_app(config, engine, catalogue, keys, names)
            address = f"{address_of(config.host, listener)}/v1"
            server = uvicorn.Server(
                uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=CLOSING_S)
            )
            say(f"saekit serves {loaded.id}", address, "Keys and text", host=config.host, as_json=as_json)
            with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has shut down
                server.run(sockets=[listener])


def _model_of(config: ServeConfig, on_status: Status | None) -> LoadedModel:
    """The model; where the engine loads it itself, a stand-in that has all but the weights."""
    if config.backend == "vllm":
        from steer.serving.on_vllm import model_of

        return model_of(config.model, on_status)
    return load_model(config.model, device=config.device, dtype=config.dtype, on_status=on_status)


def engine_of(config: ServeConfig, loaded: LoadedModel) -> Engine:
    """The engine that a config asks for. Raises: ModelError for a model that it cannot run; as `OnVllm` does."""
    if config.backend == "vllm":
        from steer.serving.on_vllm import OnVllm

        return OnVllm(loaded, config)
    if config.backend == "one_by_one":
        from steer.serving.one_by_one import OneByOne

        return OneByOne(loaded)
    from steer.serving.continuous import Continuous

    return Continuous(
        loaded, max_running=config.max_running, batch_tokens=config.batch_tokens, cache_tokens=config.cache_tokens
    )

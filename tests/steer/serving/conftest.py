"""A tiny model that is served, a library for it, and a server that answers on a port."""

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
import uvicorn
from openai import OpenAI

from activations.models import LoadedModel, load_model
from activations.store_schema import ModelRef
from sae.artefact import SaeArtefact
from steer.config import AddConfig, InitConfig
from steer.gates import Gate, energy
from steer.library import save_library
from steer.library_edit import add, init
from steer.listening import LOOPBACK, listen
from steer.serving.app import create_app
from steer.serving.catalogue import Catalogue
from steer.serving.config import ServeConfig
from steer.serving.engine import Engine, Job
from steer.serving.keys import Keys
from steer.serving.sampling import Step
from steer.serving.serve import engine_of
from steer.vectors import SteeringVector


@pytest.fixture(scope="session")
def served(tiny_llama: Path) -> LoadedModel:
    """The random Llama once more, for engines, which change how it attends."""
    return load_model(str(tiny_llama), dtype="float32")


def vector_of(loaded: LoadedModel, name: str, layer: int, seed: int) -> SteeringVector:
    """A random unit direction."""
    direction = np.random.default_rng(seed).standard_normal(loaded.d_model).astype(np.float32)
    model = ModelRef(id=loaded.id, fingerprint=loaded.fingerprint, n_layers=loaded.n_layers, d_model=loaded.d_model)
    source = {"kind": "contrast", "midpoint": 0.0}
    unit = direction / np.linalg.norm(direction)
    return SteeringVector(name, unit, f"resid_post.{layer}", model, 4.0, source, coefficient=3.0)


@pytest.fixture(scope="session")
def library(served: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Named rivers: vectors at several layers, one gated, a group, a kit, and an SAE with 8 latents."""
    path = tmp_path_factory.mktemp("serving") / "library"
    up, gated = vector_of(served, "up", 1, 0), vector_of(served, "gated", 2, 1)
    gate = Gate(energy(torch.from_numpy(gated.direction), gated.hook_point), 0.15, 0.05, 2, "own", served.fingerprint)
    parts = [replace(vector_of(served, "tone", layer, 5 + layer), name=f"tone@resid_post.{layer}") for layer in (0, 3)]
    save_library(path, [up, replace(gated, gate=gate), *parts])
    init(InitConfig(library=path, name="rivers", version="1.0.0"))
    rng = np.random.default_rng(7)
    enc, dec = rng.standard_normal((2, 8, served.d_model)).astype(np.float32) / 6
    model = {"id": served.id, "fingerprint": served.fingerprint}
    metadata = {"hook_point": "resid_post.1", "model": model, "metrics": {"fvu": 0.2}}
    SaeArtefact("topk", np.ascontiguousarray(enc.T), np.zeros(8, np.float32), dec, np.zeros(served.d_model, np.float32),
                k=2, metadata=metadata).save(path.parent / "sae")  # fmt: skip
    add(AddConfig(library=path, sae=path.parent / "sae", embed=True))
    add(AddConfig(library=path, kit="both", of={"up": 0.5, "tone": -1.0}))
    return path


def written(engine: Engine, jobs: Sequence[Job]) -> list[list[Step]]:
    """The tokens of jobs that are all asked for at once; the engine is started and closed."""

    async def one(job: Job) -> list[Step]:
        return [step async for step in engine.submit(job)]

    async def every() -> list[list[Step]]:
        engine.start()
        try:
            return await asyncio.gather(*(one(job) for job in jobs))
        finally:
            await asyncio.to_thread(engine.close)

    return asyncio.run(every())


@dataclass
class Server:
    """A server that answers."""

    address: str
    engine: Engine
    log: io.StringIO
    open: contextlib.ExitStack

    def client(self, key: str = "none") -> OpenAI:
        """The real client, closed with the server."""
        made = OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60)
        return self.open.enter_context(made)

    def lines(self) -> list[dict[str, Any]]:
        """What was logged."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


Start = Callable[..., Server]


@contextlib.contextmanager
def answering(loaded: LoadedModel, config: ServeConfig, keys: Keys) -> Iterator[Server]:
    """A server on a free port."""
    log, engine = io.StringIO(), engine_of(config, loaded)
    app = create_app(config, engine, Catalogue.open(config.libraries, loaded), keys, LOOPBACK, log.write)
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            httpx.get(f"{address}/health", timeout=60).raise_for_status()  # once its engine has written something
            with contextlib.ExitStack() as clients:
                yield Server(address, engine, log, clients)
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def at_rest(loaded: LoadedModel, behind: int = 0) -> Iterator[None]:
    """Behind so many passes the model waits until the context ends, so that no answer ends before, however slow a
    test goes on."""
    go, left = threading.Event(), iter(range(behind))

    def wait(*given: Any) -> None:
        if next(left, None) is None:
            go.wait()

    handle = loaded.model.base_model.register_forward_pre_hook(wait)
    try:
        yield
    finally:
        handle.remove()
        go.set()


@pytest.fixture(scope="session")
def config(library: Path) -> ServeConfig:
    """Two names, of which one is steered."""
    return ServeConfig.parse(
        {
            "name": "tiny", "libraries": [str(library)], "max_tokens": 64, "max_running": 8, "cache_tokens": 4096,
            "batch_tokens": 64, "presets": {"tiny-up": {"steer": [{"vector": "up"}]}},
        },
        where="test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(served: LoadedModel, config: ServeConfig) -> Iterator[Server]:
    """A server that needs no key."""
    with answering(served, config, Keys(None)) as found:
        yield found

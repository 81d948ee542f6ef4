"""Turns of vLLM, with or without saekit's plugin, whenever they are asked for. Runs in the environment of vLLM.

    vllm_turns.py MODEL OPTIONS           OPTIONS as JSON; SAEKIT_VLLM_LIBRARIES decides about the plugin

Prints {} once the engine runs. A line {"prompts": [[id, ...], ...], "tokens": n, "steer": [request or null, ...]} on
standard input is one turn, all of its requests at once, and is answered with its seconds by the clock, `wall_s`, and of
the processor, `cpu_s`, both of the whole turn. With "gpu": true it is answered with `gpu_s` instead, the seconds of all
that ran on the GPU, as the profiler of torch has it, which slows the turn down.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def main(model: str, options: dict[str, Any]) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CONFIGURE_LOGGING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, distributed_executor_backend="uni", enable_prefix_caching=False, **options)
    say({})
    for line in sys.stdin:
        turn = json.loads(line)
        params = [
            SamplingParams(
                temperature=0, max_tokens=turn["tokens"], ignore_eos=True, detokenize=False,
                extra_args=None if steer is None else {"saekit": steer},
            )
            for steer in turn["steer"]
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in turn["prompts"]]
        wall, cpu = time.perf_counter(), time.process_time()
        if turn.get("gpu"):
            say({"gpu_s": on_gpu(lambda: llm.generate(prompts, params, use_tqdm=False))})  # noqa: B023
            continue
        llm.generate(prompts, params, use_tqdm=False)
        say({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu})


def on_gpu(run: Callable[[], Any]) -> float:
    """Seconds of all kernels and copies."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_time for event in profiler.events() or () if event.device_type.name == "CUDA") / 1e6


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))

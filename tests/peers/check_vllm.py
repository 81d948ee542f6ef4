"""What vLLM answers, with or without saekit's plugin. Runs in the environment of vLLM.

    check_vllm.py JOB.json

A job has a `model`, the `libraries` to steer with, or null for vLLM without the plugin, and `engines`, which are
started one after the other: each has `options` of vLLM, and `batches` of requests {"ids", "steer", "tokens"}, some with
a "bias" by token. One JSON line a batch: `answers`, or why the batch was `refused`, and how often a request was
`preempted` so far; behind those of an engine whether it ran vLLM's `second_runner`. With `processes`, the engine and
its workers have processes of their own, as they do by default.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CONFIGURE_LOGGING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if job["libraries"] is not None:
        os.environ["SAEKIT_VLLM_LIBRARIES"] = json.dumps(job["libraries"])
    if not job.get("processes"):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    common = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 16, "disable_log_stats": False}
    if not job.get("processes"):
        common["distributed_executor_backend"] = "uni"
    for engine in job["engines"]:
        llm = LLM(model=job["model"], **{**common, "enforce_eager": True, **engine["options"]})
        for batch in engine["batches"]:
            found = run(llm, batch, has_plugin=job["libraries"] is not None)
            counts = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
            say({**found, "preempted": sum(counts)})
        say({"second_runner": llm.llm_engine.vllm_config.use_v2_model_runner})
        del llm


def run(llm: Any, batch: list[dict[str, Any]], *, has_plugin: bool) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    params = [
        SamplingParams(
            temperature=0, max_tokens=each["tokens"], logprobs=2, ignore_eos=True,
            logit_bias={int(token): bias for token, bias in each.get("bias", {}).items()} or None,
            extra_args=None if each["steer"] is None else {"saekit": each["steer"]},
        )
        for each in batch
    ]  # fmt: skip
    try:
        found = llm.generate([{"prompt_token_ids": each["ids"]} for each in batch], params, use_tqdm=False)
    except VLLMValidationError as error:
        return {"refused": str(error)}
    return {"answers": [answer(llm, each, has_plugin=has_plugin) for each in found]}


def answer(llm: Any, output: Any, *, has_plugin: bool) -> dict[str, Any]:
    text = output.outputs[0]
    return {
        "ids": list(text.token_ids),
        "logprobs": [row[token].logprob for token, row in zip(text.token_ids, text.logprobs, strict=True)],
        "cached": output.num_cached_tokens,
        "fired": llm.collective_rpc("saekit_fired", args=(output.request_id,)) if has_plugin else None,
    }


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

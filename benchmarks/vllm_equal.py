"""Are steered answers under vLLM those of the transformers backend, on a GPU too?

    python benchmarks/vllm_equal.py                      both of vLLM's model runners, with CUDA graphs and without
    python benchmarks/vllm_equal.py --workers 2          tensor-parallel, on as many GPUs
    python benchmarks/vllm_equal.py --record             also appends the line to results/<device>.csv

A random Llama in float32 answers one batch of requests of all kinds under vLLM: unsteered, added, ablated, rotated,
gated, clamped, limited to the prompt, to the answer, or to roles, thinking and all but tool calls, whose markers a bias
makes likely. Then the transformers backend, on the same device, goes over the same tokens. Prints one JSON line. By
runner and way of execution: the largest difference of the chosen tokens' logprobs, `plain` where nothing is steered,
which is how far the two are apart anyway, and `steered` where something is; how many `tokens` differ, and for how many
requests the places where gates `fired`. Without a GPU it compares the first runner without graphs, as
`tests/peers/test_vllm.py` does in the suite.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import device_name, record
from _vllm import MARKERS, ON_GPU, save_random

from activations.models import LoadedModel, load_model
from sae.artefact import SaeArtefact
from steer.config import AddConfig
from steer.library import Library
from steer.library_edit import add
from steer.pack import About
from steer.runtime import steering
from steer.scopes import ROLES
from steer.vectors import SteeringVector
from steer.vllm.catalogue import Catalogue
from steer.vllm.request import read_request

ROOT = Path(__file__).resolve().parents[1]
NORM = 20.0
GATE = {"on": 0.02, "off": 0.0, "tokens": 2}
KINDS: dict[str, list[dict[str, Any]] | None] = {
    "plain": None,
    "added": [{"vector": "plus"}],
    "ablated": [{"vector": "out"}],
    "rotated": [{"vector": "turn"}],
    "gated": [{"vector": "plus", "gate": GATE}],
    "several": [{"vector": "plus", "dose": 0.4}, {"vector": "out"}, {"vector": "turn"}, {"vector": "late"}],
    "prompt": [{"vector": "early"}],
    "answer": [{"vector": "late"}],
    "clamped": [{"latent": "drawn/3", "clamp": 8.0}],
    "gated latent": [{"latent": "drawn/5", "clamp": 12.0, "gate": {"on": 0.2, "off": 0.1, "tokens": 3}}],
    "encoded": [{"latent": "encoded/3", "clamp": 9.0}, {"vector": "plus", "dose": 0.3}],
    "encoded, scaled": [{"latent": f"encoded/{latent}", "scale": -2.0} for latent in (1, 4, 6)],
    "across": [{"latent": "across/2", "clamp": 9.0, "gate": GATE}, {"latent": "across/5", "scale": -2.0}],
    "role": [{"vector": "plus", "scope": "assistant"}],
    "roles": [{"vector": "plus", "dose": 0.4, "scope": "user"}, {"vector": "turn", "scope": "tool"}],
    "thinking": [{"vector": "plus", "scope": "thinking"}],
    "gated final": [{"vector": "plus", "scope": "final no-tool-calls", "gate": GATE}],
}
OPENS, ENDS, USER, ASSISTANT = 1, 2, 8, 9
BIAS = dict.fromkeys(range(1, 1 + len(MARKERS) + len(ROLES)), 3.0)
"""with which a third of what is written are markers and roles"""
PRECISE = {"TRITON_F32_DEFAULT": "ieee"}
"""or vLLM's attention rounds float32 to TF32, and is 0.02 apart by itself"""
RUNNERS = {"first": "0", "second": "1"}


def made_libraries(model: LoadedModel, folder: Path) -> list[Path]:
    """Random vectors of all kinds with an SAE, at `folder`, and beside it a TopK SAE and a transcoder."""
    rng, d = np.random.default_rng(0), model.d_model
    at = model.n_layers // 2

    def vector(name: str, layer: int, **changes: Any) -> SteeringVector:
        drawn = rng.standard_normal(d).astype(np.float32)
        fields = {"coefficient": 10.0, **changes}
        direction = drawn / np.linalg.norm(drawn)
        return SteeringVector(name, direction, f"resid_post.{layer}", model.ref, NORM, {"kind": "random"}, **fields)

    vectors = [
        vector("plus", at), vector("out", at, operation="ablate", coefficient=1.0),
        vector("turn", at, operation="rotate"), vector("early", 1, scope="prompt"),
        vector("late", at + 1, scope="generated"),
    ]  # fmt: skip
    drawn = put(model, folder, vectors, f"resid_post.{at}", architecture="standard")
    encoded = put(model, folder.with_name("encoded"), [], f"resid_post.{at}", architecture="topk", k=3)
    wiring = f"resid_post.1->resid_post.{at + 1}"
    across = put(model, folder.with_name("across"), [], wiring, architecture="standard", transcodes=True)
    return [drawn, encoded, across]


def put(
    model: LoadedModel, folder: Path, vectors: list[SteeringVector], hook_point: str, *, transcodes: bool = False,
    **changes: Any,
) -> Path:  # fmt: skip
    """A library of that name, with a random SAE of 8 latents."""
    Library(vectors={each.name: each for each in vectors}, about=About(name=folder.name)).save(folder)
    rng, d = np.random.default_rng(1), model.d_model
    enc, dec = (rng.standard_normal(shape).astype(np.float32) / d**0.5 for shape in ((d, 8), (8, d)))
    biases = {"b_enc": np.zeros(8, np.float32), "b_dec": np.zeros(d, np.float32)}
    about = {"hook_point": hook_point, "model": model.ref.model_dump()}
    path = folder.with_name(f"{folder.name} sae")
    SaeArtefact(
        W_enc=enc, W_dec=dec, **biases, transcodes=transcodes, apply_b_dec_to_input=not transcodes, metadata=about,
        **changes,
    ).save(path)  # fmt: skip
    add(AddConfig(library=folder, sae=path, embed=True))
    return folder


def answers(job: dict[str, Any], runner: str, folder: Path) -> list[list[dict[str, Any]]]:
    """What vLLM answers, by engine."""
    path_of_job = folder / f"{runner}.json"
    path_of_job.write_text(json.dumps(job))
    python = os.environ.get("VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
    chosen = {"VLLM_USE_V2_MODEL_RUNNER": RUNNERS[runner]}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [python, str(ROOT / "tests" / "peers" / "check_vllm.py"), str(path_of_job)], capture_output=True,
        text=True, check=False, env={**os.environ, "PYTHONPATH": path, **PRECISE, **chosen},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if {line["second_runner"] for line in lines if "second_runner" in line} != {runner == "second"}:
        raise SystemExit(f"vLLM did not run its {runner} model runner")
    return [line["answers"] for line in lines if "answers" in line]


def compared(
    model: LoadedModel, catalogue: Catalogue, batch: list[dict[str, Any]], found: list[dict[str, Any]]
) -> dict[str, Any]:
    """By how much they differ."""
    line: dict[str, Any] = {"plain": 0.0, "steered": 0.0, "tokens": 0, "fired": 0}
    bias = torch.zeros(model.model.config.vocab_size)
    bias[[*BIAS]] = torch.tensor([*BIAS.values()])
    for given, answer in zip(batch, found, strict=True):
        n, steer = len(given["ids"]), given["steer"]
        interventions = [] if steer is None else catalogue.interventions(read_request(steer))
        ids = torch.tensor([given["ids"] + answer["ids"]], device=model.device)
        with torch.inference_mode(), steering(model, interventions, prompt_lengths=[n]) as steered:
            rows = model.model(input_ids=ids[:, :-1]).logits[0, n - 1 :].float().log_softmax(-1).cpu()
            fired = [each or None for each in steered.fired()] or [None]
        best = (rows + bias).argmax(-1)
        far = (rows.gather(1, best[:, None])[:, 0] - torch.tensor(answer["logprobs"])).abs().max().item()
        name = "plain" if steer is None else "steered"
        line[name] = max(line[name], far)
        line["tokens"] += int((best != torch.tensor(answer["ids"])).sum())
        line["fired"] += any(each != fired[0] for each in answer["fired"])  # each worker tells
    return line


def main() -> None:
    """Read the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=68)
    parser.add_argument("--workers", type=int, default=1, help="GPUs that share the model")
    parser.add_argument("--attention", default="TRITON_ATTN", help="vLLM's attention on a GPU, one that has float32")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    line: dict[str, Any] = {
        "requests": arguments.requests, "answered": arguments.tokens, "workers": arguments.workers
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        line |= compare(arguments, device, Path(folder))
    line["device"] = device_name(device)
    sys.stdout.write(json.dumps(line) + "\n")
    if arguments.record:
        record("vllm_equal", line)


def words(rng: random.Random) -> list[int]:
    """Of one turn."""
    return [rng.randrange(max(BIAS) + 1, 2048) for _ in range(rng.randrange(4, 45))]


def compare(arguments: argparse.Namespace, device: str, folder: Path) -> dict[str, Any]:
    """What is told of each runner and way."""
    source = save_random("checked", folder / "model", torch.float32)
    model = load_model(str(source), device=device, dtype="float32")
    libraries = [str(each) for each in made_libraries(model, folder / "drawn")]
    catalogue = Catalogue(model, libraries, 4)
    rng, kinds = random.Random(0), [*KINDS.values()]
    batch = [
        {"ids": [OPENS, USER, *words(rng), ENDS, OPENS, ASSISTANT, *words(rng)], "tokens": arguments.tokens,
         "steer": None if (items := kinds[i % len(kinds)]) is None else {"steer": items}, "bias": BIAS}
        for i in range(arguments.requests)
    ]  # fmt: skip
    on_gpu = {"attention_backend": arguments.attention, **ON_GPU} if device == "cuda" else {}
    if arguments.workers > 1:
        on_gpu["tensor_parallel_size"] = arguments.workers
    ways = {"eager": True, "graphs": False} if device == "cuda" else {"eager": True}
    engines = [
        {"options": {**on_gpu, "max_num_seqs": 64, "enforce_eager": is_eager}, "batches": [batch]}
        for is_eager in ways.values()
    ]
    job = {"model": str(source), "libraries": libraries, "engines": engines, "processes": arguments.workers > 1}
    runners = [*RUNNERS] if device == "cuda" else ["first"]
    with ThreadPoolExecutor() as pool:
        several = [*pool.map(lambda runner: answers(job, runner, folder), runners)]
    return {
        f"{runner} {way}": compared(model, catalogue, batch, found)
        for runner, by_way in zip(runners, several, strict=True)
        for way, found in zip(ways, by_way, strict=True)
    }


if __name__ == "__main__":
    main()

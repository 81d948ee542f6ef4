"""What does indexing cost beside encoding the same tokens?

    python benchmarks/index.py                                        the demo's size, on a CPU
    python benchmarks/index.py --device cuda --d-model 2304 --d-sae 65536 --k 64 --tokens 10000000

Both encode every token and find its active latents, which is `encode_s`; `index_s` is the whole pass of `saekit index`
over them: counts, histograms, contexts, near misses and the codes for co-activation (`sae.index_pass`). `ratio` is
index_s / encode_s. Activations are random and made on the device, block by block, at a cost that is measured alone and
taken off both. Latents have a threshold each, so that their densities are log-normal (a factor of e^1.5) around
k / d_sae, as those of trained SAEs are. Prints one JSON line; `--record` keeps it.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _results import device_name, record

from sae import coactivation
from sae.artefact import SaeArtefact
from sae.codes import select
from sae.config import IndexConfig
from sae.index import pass_settings
from sae.index_pass import Block, Statistics, block_tokens, tensor_cores
from sae.torch_view import TorchSae

CTX, VOCABULARY, SEQUENCES_A_DOCUMENT = 128, 49_152, 2
SPREAD = 1.5


def random_sae(architecture: str, d_model: int, d_sae: int, k: int) -> TorchSae:
    """An SAE whose pre-activations on normal inputs are normal."""
    rng = np.random.default_rng(0)
    W_enc = rng.standard_normal((d_model, d_sae), dtype=np.float32)
    W_enc /= np.linalg.norm(W_enc, axis=0)
    zeros = np.zeros(d_sae, np.float32), np.zeros(d_model, np.float32)
    rule: dict[str, Any] = {"k": k}
    if architecture == "jumprelu":
        density = np.exp(SPREAD * rng.standard_normal(d_sae))
        density = np.minimum(density * k / density.sum(), 0.5)
        normal = torch.distributions.Normal(0.0, 1.0)
        rule = {"threshold": normal.icdf(torch.from_numpy(1 - density)).float().numpy()}
    return TorchSae(SaeArtefact(architecture, W_enc, zeros[0], W_enc.T.copy(), zeros[1], **rule))  # type: ignore[arg-type]


def blocks(n_tokens: int, d_model: int, d_sae: int, device: torch.device) -> Iterator[Block]:
    """Random blocks; the same ones each time."""
    generator = torch.Generator(device).manual_seed(0)
    rows = max(1, block_tokens(d_sae, device) // CTX)
    for first in range(0, max(1, n_tokens // CTX), rows):
        tokens = torch.randint(VOCABULARY, (rows, CTX), generator=generator, device=device, dtype=torch.int32)
        documents = torch.arange(first, first + rows, device=device, dtype=torch.int32) // SEQUENCES_A_DOCUMENT
        mask = torch.ones(rows, CTX, dtype=torch.bool, device=device)
        x = torch.randn(rows * CTX, d_model, generator=generator, device=device)
        yield Block(0, 1, first, tokens, mask, documents, x)


def seconds(work: Callable[[Block], object], stream: Iterator[Block], device: torch.device) -> float:
    """Wall time of doing something with every block."""
    start = time.perf_counter()
    for block in stream:
        work(block)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time making the blocks, encoding them, and indexing them."""
    device = torch.device(arguments.device)
    sae = random_sae(arguments.architecture, arguments.d_model, arguments.d_sae, arguments.k).to(device)
    settings = pass_settings(IndexConfig.parse({}, where="defaults"))
    found, active = Statistics(settings, sae.d_sae, device), 0

    def encode(block: Block) -> None:
        nonlocal active
        with torch.inference_mode(), tensor_cores():
            active += len(select(sae, sae.preactivations(block.x)).row)

    def run(work: Callable[[Block], object], n_tokens: int = arguments.tokens) -> float:
        return seconds(work, blocks(n_tokens, arguments.d_model, sae.d_sae, device), device)

    for work in (encode, lambda block: Statistics(settings, sae.d_sae, device).add(sae, block)):
        run(work, 1)  # warm
    active = 0
    making = run(lambda block: None)
    encode_s = run(encode) - making
    index_s = run(lambda block: found.add(sae, block)) - making
    start = time.perf_counter()
    coactivation.partners(coactivation.first(found.sample, settings.coactivation_tokens), sae.d_sae, 8)
    state = sum(value.numel() * value.element_size() for value in found.tensors().values())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * _max_rss_kb()
    return {
        "device": device_name(device.type),
        "architecture": arguments.architecture,
        "d_model": arguments.d_model,
        "d_sae": arguments.d_sae,
        "tokens": found.n_tokens,
        "l0": round(active / found.n_tokens, 1),
        "encode_s": round(encode_s, 2),
        "index_s": round(index_s, 2),
        "ratio": round(index_s / encode_s, 3),
        "tok_s": round(found.n_tokens / index_s),
        "coactivation_s": round(time.perf_counter() - start, 2),
        "state_kb_a_latent": round(state / sae.d_sae / 1e3, 2),
        "peak_mb": round(peak / 1e6),
    }


def _max_rss_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description="Time indexing beside encoding.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--architecture", choices=("jumprelu", "topk"), default="jumprelu")
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32, help="active latents a token, of jumprelu on average")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    arguments = parser.parse_args()
    line = measure(arguments)
    if arguments.record:
        record("index", line)
    print(json.dumps(line))  # noqa: T201


if __name__ == "__main__":
    main()

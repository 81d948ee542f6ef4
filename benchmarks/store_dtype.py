"""What does storing activations with fewer bits cost an SAE?

    python benchmarks/store_dtype.py [--tokens 60000] [--train-tokens 400000] [--seeds 2]

Harvests SmolLM2-135M once in float32, keeps the same activations again in each other dtype, trains the same SAE on
each, and scores all of them on the float32 store's held-out tokens. `rounding_fvu` is the share of variance that the
dtype alone loses. Prints one JSON line; `--record` keeps it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import device_name, record

from activations.config import HarvestConfig
from activations.forward import quantise
from activations.harvest import harvest
from activations.store import ActivationStore
from activations.store_schema import StoreState, scale_name, to_bfloat16_bits
from activations.store_writer import Group, StoreWriter
from sae.config import SaeConfig, TrainConfig
from sae.data import held_out
from sae.evaluation.core import reconstruction
from sae.torch_view import TorchSae
from sae.train import train
from sae.wiring import Wiring

HOOK = "resid_post.12"
HOLDOUT = 0.1
DTYPES = ("float32", "bfloat16", "float16", "int8")


def encode(x: np.ndarray, dtype: str, name: str) -> dict[str, np.ndarray]:
    """Float32 activations in their stored form."""
    if dtype == "bfloat16":
        return {name: to_bfloat16_bits(x)}
    if dtype == "int8":
        steps, scale = quantise(torch.from_numpy(x))
        return {name: steps.numpy(), scale_name(name): scale.numpy()}
    return {name: x.astype(dtype)}


def copy(source: ActivationStore, where: Path, dtype: str) -> ActivationStore:
    """The same store in another dtype."""
    meta = source.meta.model_copy(update={"store_dtype": dtype})
    rows = meta.commit_sequences
    with StoreWriter.open(where, meta) as writer:
        for start in range(0, source.n_sequences, rows):
            stop = min(start + rows, source.n_sequences)
            parts = source.tokens(start, stop), source.mask(start, stop), source.documents(start, stop)
            group = Group(*parts, encode(source.activations(HOOK, start, stop), dtype, HOOK))
            writer.append(group, StoreState(hooks=source.state.hooks, tokens=source.state.tokens))
        writer.finish(complete=True)
    return ActivationStore.open(where)


def rounding_fvu(exact: ActivationStore, stored: ActivationStore) -> float:
    """Sum of squared rounding errors over the sum of squared distances from the mean, unmasked tokens only."""
    error = total = 0.0
    mean = exact.stats(HOOK).mean
    for start in range(0, exact.n_sequences, 64):
        mask = exact.mask(start, start + 64)
        x, y = (store.activations(HOOK, start, start + 64)[mask] for store in (exact, stored))
        error += float(np.square(x - y, dtype=np.float64).sum())
        total += float(np.square(x - mean).sum())
    return error / total


def main() -> None:
    """Compare the dtypes."""
    parser = argparse.ArgumentParser(description="Compare SAEs that were trained on stores of different dtypes.")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--train-tokens", type=int, default=400_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = HarvestConfig(
            hook_points=(HOOK,), out=str(folder / "exact"), max_tokens=arguments.tokens, store_dtype="float32",
            compute_dtype="float32", outlier_norm=2.0,
        )  # fmt: skip
        exact = ActivationStore.open(harvest(config).path)
        for dtype in DTYPES:
            store = copy(exact, folder / dtype, dtype)
            scores = []
            for seed in range(arguments.seeds):
                run = TrainConfig(
                    store=store.path, hook_points=(HOOK,), out=folder / f"{dtype}-{seed}", seed=seed,
                    sae=SaeConfig(architecture="batchtopk"), train_tokens=arguments.train_tokens,
                    holdout_fraction=HOLDOUT, checkpoint_every=10**6, eval_every=10**6,
                )  # fmt: skip
                sae = TorchSae(train(run).saes[HOOK].artefact)
                scores.append(reconstruction(exact, Wiring.parse(HOOK), sae, *held_out(exact, HOLDOUT)))
            size = sum(store.storage.sizes().values())
            rows.append(
                {
                    "store_dtype": dtype,
                    "bytes_per_position": round(size / (store.n_sequences * store.ctx), 1),
                    "rounding_fvu": rounding_fvu(exact, store),
                    "heldout_fvu": [round(score.fvu, 5) for score in scores],
                    "heldout_l0": [round(score.l0, 2) for score in scores],
                }
            )
    line = {"device": device_name("cpu"), "tokens": exact.state.tokens, "hook_point": HOOK, "dtypes": rows}
    if arguments.record:
        record("store_dtype", line)
    print(json.dumps(line))  # noqa: T201


if __name__ == "__main__":
    main()

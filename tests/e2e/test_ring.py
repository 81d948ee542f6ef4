"""Ring mode with real processes: a harvest and a training share a store smaller than what passes through it.

Both are killed again and again and started anew; what is trained must be, bit for bit, what an undisturbed pair trains.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from activations.config import HarvestConfig
from activations.errors import MissingArtefactError
from activations.store import ActivationStore
from sae.config import SaeConfig, TrainConfig

ROOT = Path(__file__).parents[2]
HOOK = "resid_post.1"
CTX, ROWS, KEEP = 32, 8, 64 * 32
TOKENS, STEPS, BATCH = 16_000, 220, 64
DEADLINE_S = 240


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = ["the", "river", "ran", "past", "mill", "on", "cat", "sat", "mat", "dog", "looked", "digits", "numbers"]
    rows = [{"text": " ".join(rng.choices(words, k=rng.randint(5, 90)))} for _ in range(600)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


class Pair:
    """A harvest and a training on one ring, as a user would start them in two terminals."""

    def __init__(self, folder: Path, model: Path, text: Path):
        self.store, self.out = folder / "store", folder / "sae"
        harvest = HarvestConfig(
            model=str(model), text=str(text), hook_points=(HOOK,), out=str(self.store), max_tokens=TOKENS, ctx=CTX,
            keep_tokens=KEEP, commit_sequences=ROWS, batch_tokens=256, store_dtype="float32",
        )  # fmt: skip
        train = TrainConfig(
            store=str(self.store), hook_points=(HOOK,), out=self.out, sae=SaeConfig(d_sae=64, k=4), batch_size=BATCH,
            train_tokens=STEPS * BATCH, checkpoint_every=1000, eval_every=1000, eval_tokens=128, memory_mb=1,
        )  # fmt: skip
        harvest.save(folder / "harvest.yaml")
        train.save(folder / "train.yaml")
        self.commands = {verb: (verb, str(folder / f"{verb}.yaml")) for verb in ("harvest", "train")}
        self.log = folder / "log.txt"

    def start(self, verb: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "from steer.cli import main; main()", *self.commands[verb]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def most_on_disk(self) -> int:
        """Positions on disk now."""
        return len(list((self.store / HOOK).glob("c.*"))) * ROWS * CTX

    def weights(self) -> dict[str, np.ndarray]:
        return load_file(self.out / "sae" / "sae_weights.safetensors")


def run_to_the_end(pair: Pair, kills: int, seed: int) -> int:
    """Keep both sides running until both have ended by themselves; returns the most positions that were on disk."""
    rng, most = random.Random(seed), 0
    deadline = time.monotonic() + DEADLINE_S
    running = {"harvest": pair.start("harvest")}
    while not (pair.store / "zarr.json").exists():
        assert time.monotonic() < deadline, pair.log.read_text()[-3000:]
        time.sleep(0.02)
    running["train"] = pair.start("train")
    next_kill = time.monotonic() + rng.uniform(2, 6)
    while running:
        assert time.monotonic() < deadline, pair.log.read_text()[-3000:]
        most = max(most, pair.most_on_disk())
        for verb, process in list(running.items()):
            code = process.poll()
            if code == -signal.SIGKILL:
                running[verb] = pair.start(verb)
            elif code is not None:
                assert code == 0, pair.log.read_text()[-3000:]
                del running[verb]
        if kills and running and time.monotonic() > next_kill:
            rng.choice(list(running.values())).kill()
            kills, next_kill = kills - 1, time.monotonic() + rng.uniform(1, 6)
        time.sleep(0.02)
    return most


@pytest.mark.parametrize("kills", [0, 6])
def test_a_ring_trains_the_same_whatever_is_killed(
    kills: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text: Path
) -> None:
    calm = Pair(tmp_path_factory.mktemp("calm"), tiny_llama, text)
    assert run_to_the_end(calm, kills=0, seed=0) <= KEEP
    store = ActivationStore.open(calm.store)
    assert store.is_complete
    assert store.n_sequences * CTX > 5 * KEEP, "much more passed through than was kept"
    assert not any(damage for _, damage in store.verify())
    with pytest.raises(MissingArtefactError, match="released"):
        store.activations(HOOK)
    metrics = json.loads((calm.out / "sae" / "saekit.json").read_text())["metrics"]
    assert metrics["train_tokens"] == STEPS * BATCH
    assert metrics["fvu"] < 0.9, "it learned something"
    if kills:
        wild = Pair(tmp_path, tiny_llama, text)
        assert run_to_the_end(wild, kills, seed=kills) <= KEEP
        for name, values in calm.weights().items():
            np.testing.assert_array_equal(wild.weights()[name], values, err_msg=name)

"""A training process that is killed, for real and at any step, ends with the bits of one that was left alone."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from activations.store import ActivationStore
from sae.architectures import ARCHITECTURES
from sae.config import SaeConfig, SweepConfig, TrainConfig
from sae.log import read_log
from sae.sweep import points
from sae.train import train

N_KILLS, STEPS, BATCH = 3, 150, 32
HOOKS = ("resid_post.1", "mlp_out.1", "resid_post.0")
WIRINGS = {
    "one": ("resid_post.1", "resid_post.0"),
    "pair": ("resid_post.1->mlp_out.1",),
    "several": ("resid_post.1+resid_post.0",),
}


@pytest.fixture
def store(make_store: Callable[..., ActivationStore]) -> ActivationStore:
    return make_store(hook_points=HOOKS)


def config_of(name: str, store: ActivationStore, out: Path) -> TrainConfig:
    if name == "sweep":
        alone = config_of("jumprelu", store, out)
        sae, sweep = alone.sae.model_copy(update={"orthogonality": 0.0}), SweepConfig(k=(3, 5), d_sae=(32, 48))
        return alone.model_copy(update={"sae": sae, "sweep": sweep})
    sae = SaeConfig(architecture=name, d_sae=48, k=4, aux_k=8, groups=(0.25, 0.75), orthogonality=0.1)
    return TrainConfig(
        store=store.path,
        hook_points=WIRINGS[ARCHITECTURES[name].reads],
        out=out,
        sae=sae,
        train_tokens=STEPS * BATCH,
        batch_size=BATCH,
        lr=0.01,
        dead_fraction=0.05,
        holdout_fraction=0.2,
        eval_every=40,
        log_every=1,
        checkpoint_every=9,
    )


def made(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Weights of every SAE, and the log without what depends on the clock."""
    files = sorted((out / "sae").rglob("sae_weights.safetensors"))
    weights = {str(file.relative_to(out)): file.read_bytes() for file in files}
    clock = ("tok_s", "eta_s")
    return weights, [{k: v for k, v in row.items() if k not in clock} for row in read_log(out / "train.jsonl")]


def logged(out: Path) -> int:
    rows = read_log(out / "train.jsonl")
    return rows[-1]["step"] if rows else 0


@pytest.mark.parametrize("name", [*ARCHITECTURES, "sweep"])
def test_killed_runs_end_with_the_same_bits(
    name: str, store: ActivationStore, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    calm, wild = (config_of(name, store, tmp_path / out) for out in ("calm", "wild"))
    process = start_process(train, calm)
    process.join()
    assert process.exitcode == 0
    rng, kills = random.Random(name), []
    while len(kills) < N_KILLS:
        goal = logged(wild.out) + rng.randrange(2, STEPS // N_KILLS)
        process = start_process(train, wild)
        while process.is_alive() and logged(wild.out) < goal:
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        if process.exitcode == 0:
            shutil.rmtree(wild.out)
        else:
            kills.append(logged(wild.out))
    process = start_process(train, wild)
    process.join()
    assert process.exitcode == 0
    assert kills == sorted(set(kills)), kills
    weights, rows = made(calm.out)
    assert len(weights) == len(wild.hook_points) * len(points(wild))
    assert made(wild.out) == (weights, rows)
    assert len(rows) == STEPS * len(weights)

"""What does a sweep of N SAEs cost, next to one of them?

    python benchmarks/sweep.py                                         1 and 8 SAEs of width 4,096 at d_model 576
    python benchmarks/sweep.py --n 1,4,16 --d-sae 16384 --arch topk

1. Times the training step of one SAE as `sae.train` compiles it. 2. For each N, times the step of a sweep of N learning
rates, which `sae.sweep` compiles, on the same batch; both in the middle of a run, where k is no longer annealed. Prints
one JSON line an N: `ms_step` is of the whole sweep, `tok_s` are tokens of the stream a second, each of which trains N
SAEs, and `ratio_to_one` is over `ms_step` of the one SAE. `--record` keeps them. Batches are random and on the device
already; left out is reading them, which a sweep does once for all of its SAEs.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _results import device_name, record
from _steps import Settings, figures
from _steps import measure as clocked

from activations.store_schema import HookStats
from sae.architectures.base import Scaling
from sae.config import SaeConfig, SweepConfig, TrainConfig
from sae.step import Plan, Step, TrainState, create, make_step, scaling_on_device, start
from sae.sweep import make_sweep_step, owned, points, stack, widest
from sae.wiring import Wiring

HOOK_POINT = "resid_post.0"
LR, SPREAD = 1e-3, 0.1
"""smallest learning rate of a sweep, and by what part of it each is above the one before"""


def plan_of(config: TrainConfig, d_model: int) -> Plan:
    """Of activations that vary by 1 a dimension around 0."""
    stats = HookStats(config.train_tokens, np.zeros(d_model), d_model**0.5, float(d_model), {})
    return Plan.make(config, Wiring.parse(HOOK_POINT), {HOOK_POINT: stats})


def midway(config: TrainConfig, plan: Plan) -> TrainState:
    """An SAE that has learnt nothing in half of its steps."""
    state = start(config, plan, create(config, plan))
    return state._replace(step=state.step + plan.n_steps // 2)


def milliseconds(step: Step, state: TrainState, x: jax.Array, scaling: Scaling, steps: int) -> float:
    """Median time of a step in five runs of `steps` each, after one that compiles."""

    def run(n: int) -> None:
        nonlocal state
        for _ in range(n):
            state, _ = step(state, x, x, scaling)
        jax.block_until_ready(state)

    settings = Settings(batch=len(x), steps=steps, warm=1)
    return figures(settings, clocked(run, settings))["ms_step"]


def measure(config: TrainConfig, ns: list[int], d_model: int, steps: int) -> list[dict[str, Any]]:
    """A line an N."""
    plan = plan_of(config, d_model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(config.batch_size, d_model)), jnp.float32)
    scaling = scaling_on_device(config, plan)
    one = milliseconds(make_step(config, plan), midway(config, plan), x, scaling, steps)
    name = device_name("cuda" if jax.default_backend() == "gpu" else "cpu")
    lines = []
    for n in ns:
        swept = config.model_copy(update={"sweep": SweepConfig(lr=tuple(LR * (1 + SPREAD * i) for i in range(n)))})
        own = list(points(swept).values())
        plans = [plan_of(point, d_model) for point in own]
        state = stack([midway(point, its) for point, its in zip(own, plans, strict=True)])
        ms = milliseconds(make_sweep_step(widest(swept), plans[0], owned(own, plans)), state, x, scaling, steps)
        lines.append(
            {
                "device": name,
                "arch": config.sae.architecture,
                "n": n,
                "d_model": d_model,
                "d_sae": config.sae.d_sae,
                "k": config.sae.k,
                "batch": config.batch_size,
                "ms_step": round(ms, 3),
                "ms_one": round(one, 3),
                "ratio_to_one": round(ms / one, 3),
                "tok_s": round(1000 * config.batch_size / ms),
            }
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description="Time a sweep next to one SAE.")
    parser.add_argument("--n", default="1,8", help="numbers of SAEs, with commas between them")
    parser.add_argument("--arch", default="batchtopk")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed together")
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    given = parser.parse_args(arguments)
    config = TrainConfig(
        sae=SaeConfig(architecture=given.arch, d_sae=given.d_sae, k=given.k), batch_size=given.batch,
        train_tokens=10**7, lr=LR,
    )  # fmt: skip
    for line in measure(config, [int(n) for n in given.n.split(",")], given.d_model, given.steps):
        if given.record:
            record("sweep", line)
        print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

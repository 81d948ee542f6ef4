"""One training step: the schedule, the decoder's norm, idle counts, what the plan derives, and how XLA compiles it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activations.store_schema import HookStats
from sae.config import SaeConfig, TrainConfig
from sae.step import Plan, TrainState, assemble, automatic_lr, create, make_step, scaling_on_device, schedule, start
from sae.wiring import Wiring

D_MODEL, BATCH, HOOK = 8, 16, "resid_post.1"


@pytest.fixture
def stats() -> HookStats:
    mean = np.full(D_MODEL, 3.0)
    return HookStats(100, mean, 9.0, mean_sq_norm=float(mean @ mean) + 4 * D_MODEL, norm_quantiles={})


def config_with(**changes: Any) -> TrainConfig:
    sae = SaeConfig(architecture="batchtopk", d_sae=24, k=3, k_anneal=0)
    return TrainConfig(**{"sae": sae, "batch_size": BATCH, "train_tokens": 100 * BATCH} | changes)


def plan_of(config: TrainConfig, stats: HookStats) -> Plan:
    return Plan.make(config, Wiring.parse(HOOK), {HOOK: stats})


def begin(config: TrainConfig, plan: Plan) -> TrainState:
    return start(config, plan, create(config, plan))


def batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, (BATCH, D_MODEL)).astype(np.float32)


def test_plan_scales_to_unit_variance_a_dimension(stats: HookStats) -> None:
    plan = plan_of(config_with(), stats)
    for scale, mean in zip(plan.scaling, plan.means, strict=True):
        np.testing.assert_allclose(scale, 0.5)
        np.testing.assert_allclose(mean, 1.5)
    assert (plan.n_steps, plan.dead_after) == (100, 160)


def test_lr_is_automatic_unless_given(stats: HookStats) -> None:
    assert plan_of(config_with(lr=0.1), stats).lr == 0.1
    assert plan_of(config_with(), stats).lr == automatic_lr(24, 100)
    assert automatic_lr(4 * 2304, 1200) == pytest.approx(automatic_lr(2304, 1) / 2)
    assert automatic_lr(2304, 32 * 1200) == pytest.approx(automatic_lr(2304, 1) / 2)


def test_schedule_rises_holds_and_falls_to_zero(stats: HookStats) -> None:
    config = config_with(lr=1.0, warmup_fraction=0.1, decay_fraction=0.5)
    lr = schedule(config, plan_of(config, stats))
    assert float(lr(0)) == pytest.approx(0.1)
    assert [float(lr(step)) for step in (10, 30, 50)] == [1, 1, 1]
    assert float(lr(75)) == pytest.approx(0.5)
    assert 0 < float(lr(99)) == pytest.approx(0.02)


@pytest.mark.parametrize("fractions", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.6, 0.6)])
def test_schedule_is_finite_at_its_limits(stats: HookStats, fractions: tuple[float, float]) -> None:
    config = config_with(lr=1.0, warmup_fraction=fractions[0], decay_fraction=fractions[1])
    lr = schedule(config, plan_of(config, stats))
    assert all(0 < float(lr(step)) <= 1 for step in range(100))


def test_a_step_keeps_decoder_rows_at_norm_1_and_moves_every_parameter(stats: HookStats) -> None:
    config = config_with(lr=0.05, warmup_fraction=0.0)
    plan = plan_of(config, stats)
    before, state, step = begin(config, plan), begin(config, plan), make_step(config, plan)
    for seed in range(3):
        state, metrics = step(state, batch(seed), batch(seed), plan.scaling)
    np.testing.assert_allclose(jnp.linalg.norm(state.params["W_dec"][...], axis=1), 1, atol=1e-6)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, state.params)
    assert all(jax.tree.leaves(moved))
    assert float(metrics.l0) == 3
    assert float(assemble(config.sae, state).threshold[...]) > 0  # type: ignore[attr-defined]


def test_a_step_copies_nothing_from_the_host(stats: HookStats) -> None:
    config = config_with()
    plan = plan_of(config, stats)
    state, step, scaling = begin(config, plan), make_step(config, plan), scaling_on_device(config, plan)
    x = jnp.asarray(batch(0))
    state, _ = step(state, x, x, scaling)
    with jax.transfer_guard_host_to_device("disallow"):
        state, _ = step(state, x, x, scaling)
        with pytest.raises(Exception, match="host-to-device"):
            step(state, x, x, plan.scaling)


def test_idle_latents_are_counted_in_tokens(stats: HookStats) -> None:
    config = config_with(dead_fraction=0.02)  # dead after 2 batches
    plan = plan_of(config, stats)
    state, step = begin(config, plan), make_step(config, plan)
    state.params["b_enc"][...] = state.params["b_enc"][...].at[5].set(-1e3)
    seen = []
    for seed in range(3):
        state, metrics = step(state, batch(seed), batch(seed), plan.scaling)
        seen.append((int(state.idle[5]), float(metrics.dead_fraction)))
    assert [idle for idle, _ in seen] == [BATCH, 2 * BATCH, 3 * BATCH]
    assert [dead > 0 for _, dead in seen] == [False, True, True]


def test_clipping_bounds_the_first_moment(stats: HookStats) -> None:
    config = config_with(grad_clip=1e-3)
    plan = plan_of(config, stats)
    state, metrics = make_step(config, plan)(begin(config, plan), batch(0), batch(0), plan.scaling)
    moments = [leaf for leaf in jax.tree.leaves(state.moments) if leaf.ndim]
    first = sum(float((m**2).sum()) for m in moments[: len(moments) // 2]) ** 0.5
    assert float(metrics.grad_norm) > 1e-3
    assert first == pytest.approx(0.1 * 1e-3, rel=1e-3)


def three_steps(architecture: str, stats: HookStats) -> list[np.ndarray]:
    """Weights, Adam's moments and the last step's numbers, with a latent that dies."""
    config = config_with(sae=SaeConfig(architecture=architecture, d_sae=24, k=3, aux_k=4), dead_fraction=0.02)
    plan = plan_of(config, stats)
    state, step = begin(config, plan), make_step(config, plan)
    state.params["b_enc"][...] = state.params["b_enc"][...].at[5].set(-1e3)
    for seed in range(3):
        state, metrics = step(state, batch(seed), batch(seed), plan.scaling)
    assert float(metrics.dead_fraction) > 0
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state, metrics))]


def save_steps_of_a_user(path: Path, architecture: str, stats: HookStats) -> None:
    del os.environ["XLA_FLAGS"]
    assert jax.device_count() == 1
    np.savez(path, *three_steps(architecture, stats))


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_programs_that_xla_optimises_compute_what_those_of_tests_do(
    architecture: str, stats: HookStats, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    """All other tests compile without optimising (tests/conftest.py)."""
    process = start_process(save_steps_of_a_user, tmp_path / "user.npz", architecture, stats)
    process.join()
    assert process.exitcode == 0
    with np.load(tmp_path / "user.npz") as users:
        for got, wanted in zip(users.values(), three_steps(architecture, stats), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)

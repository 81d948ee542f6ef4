"""One training step: the schedule, the decoder's norm, idle counts, and what the plan derives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activations.store_schema import HookStats
from sae.config import SaeConfig, TrainConfig
from sae.step import Plan, assemble, automatic_lr, make_step, schedule, start

D_MODEL, BATCH = 8, 16


@pytest.fixture
def stats() -> HookStats:
    mean = np.full(D_MODEL, 3.0)
    return HookStats(100, mean, 9.0, mean_sq_norm=float(mean @ mean) + 4 * D_MODEL, norm_quantiles={})


def config_with(**changes: Any) -> TrainConfig:
    sae = SaeConfig(architecture="batchtopk", d_sae=24, k=3)
    return TrainConfig(**{"sae": sae, "batch_size": BATCH, "train_tokens": 100 * BATCH} | changes)


def batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, (BATCH, D_MODEL)).astype(np.float32)


def test_plan_scales_to_unit_variance_a_dimension(stats: HookStats) -> None:
    plan = Plan.make(config_with(), stats)
    assert plan.scale == pytest.approx(0.5)
    assert plan.variance == D_MODEL
    np.testing.assert_allclose(plan.mean, 1.5)
    assert (plan.n_steps, plan.dead_after) == (100, 160)


def test_lr_is_automatic_unless_given(stats: HookStats) -> None:
    assert Plan.make(config_with(lr=0.1), stats).lr == 0.1
    assert Plan.make(config_with(), stats).lr == automatic_lr(24)
    assert automatic_lr(4 * 2304) == pytest.approx(automatic_lr(2304) / 2)


def test_schedule_rises_holds_and_falls_to_zero(stats: HookStats) -> None:
    config = config_with(lr=1.0, warmup_fraction=0.1, decay_fraction=0.5)
    lr = schedule(config, Plan.make(config, stats))
    assert float(lr(0)) == pytest.approx(0.1)
    assert [float(lr(step)) for step in (10, 30, 50)] == [1, 1, 1]
    assert float(lr(75)) == pytest.approx(0.5)
    assert 0 < float(lr(99)) == pytest.approx(0.02)


@pytest.mark.parametrize("fractions", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.6, 0.6)])
def test_schedule_is_finite_at_its_limits(stats: HookStats, fractions: tuple[float, float]) -> None:
    config = config_with(lr=1.0, warmup_fraction=fractions[0], decay_fraction=fractions[1])
    lr = schedule(config, Plan.make(config, stats))
    assert all(0 < float(lr(step)) <= 1 for step in range(100))


def test_a_step_keeps_decoder_rows_at_norm_1_and_moves_every_parameter(stats: HookStats) -> None:
    config = config_with(lr=0.05, warmup_fraction=0.0)
    plan = Plan.make(config, stats)
    before, state, step = start(config, plan), start(config, plan), make_step(config, plan)
    for seed in range(3):
        state, metrics = step(state, batch(seed))
    np.testing.assert_allclose(jnp.linalg.norm(state.params["W_dec"][...], axis=1), 1, atol=1e-6)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, state.params)
    assert all(jax.tree.leaves(moved))
    assert float(metrics.l0) == 3
    assert float(assemble(config, plan, state).threshold[...]) > 0  # type: ignore[attr-defined]


def test_idle_latents_are_counted_in_tokens(stats: HookStats) -> None:
    config = config_with(dead_fraction=0.02)  # dead after 2 batches
    plan = Plan.make(config, stats)
    state, step = start(config, plan), make_step(config, plan)
    state.params["b_enc"][...] = state.params["b_enc"][...].at[5].set(-1e3)
    seen = []
    for seed in range(3):
        state, metrics = step(state, batch(seed))
        seen.append((int(state.idle[5]), float(metrics.dead_fraction)))
    assert [idle for idle, _ in seen] == [BATCH, 2 * BATCH, 3 * BATCH]
    assert [dead > 0 for _, dead in seen] == [False, True, True]


def test_clipping_bounds_the_first_moment(stats: HookStats) -> None:
    config = config_with(grad_clip=1e-3)
    plan = Plan.make(config, stats)
    state, metrics = make_step(config, plan)(start(config, plan), batch(0))
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    first = sum(float((m**2).sum()) for m in moments[: len(moments) // 2]) ** 0.5
    assert float(metrics.grad_norm) > 1e-3
    assert first == pytest.approx(0.1 * 1e-3, rel=1e-3)

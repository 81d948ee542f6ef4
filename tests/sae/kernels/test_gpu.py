"""A training step through Triton's programs equals the plain one: here with the programs interpreted on a CPU."""

from collections.abc import Callable
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sae import kernels
from sae.architectures.base import Means, Scaling
from sae.config import ComputeConfig, SaeConfig, TrainConfig
from sae.kernels import choice, gpu
from sae.step import Own, Plan, StepMetrics, TrainState, create, make_step, start
from sae.sweep import make_sweep_step, stack
from tests.sae.kernels.test_triton_programs import triton_programs

BATCH, D, D_SAE, K, N_STEPS = 16, 20, 48, 4, 4
SCHEDULING = {"num_warps"}
INTERPRETER = Lock()
"""it can run one program at a time, and XLA may call back on several threads"""
ONE = ComputeConfig()


def interpret(
    program: str,
    *inputs: jax.Array,
    out: Any,
    grid: Any,
    zeroed_outputs: tuple[int, ...] = (),
    input_output_aliases: dict[int, int] | None = None,
    **sizes: Any,
) -> Any:
    """As `sae.kernels.gpu._call`, by the interpreter; outputs hold rubbish where jax-triton leaves them as they are."""
    shapes, tree = jax.tree.flatten(out)
    aliases = {to: of for of, to in (input_output_aliases or {}).items()}
    constants = {name: value for name, value in sizes.items() if name not in SCHEDULING}

    def run(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        given = [torch.from_numpy(np.array(array, dtype=_exact(array.dtype))) for array in arrays]
        made = []
        for i, shape in enumerate(shapes):
            rubbish = np.full(shape.shape, 0 if i in zeroed_outputs else -99, shape.dtype)
            made.append(given[aliases[i]] if i in aliases else torch.from_numpy(rubbish))
        with INTERPRETER:
            getattr(triton_programs, program)[grid](*given, *made, **constants)
        return tuple(tensor.numpy() for tensor in made)

    results = jax.pure_callback(run, tuple(shapes), *inputs)
    return jax.tree.unflatten(tree, results)


def _exact(dtype: np.dtype) -> np.dtype:
    """NumPy and PyTorch share no bfloat16, and float32 holds its values."""
    return np.dtype(np.float32) if dtype == jnp.bfloat16 else dtype


@pytest.fixture
def take_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, steps are traced through Triton's programs; a row of latents takes several chunks.

    The interpreter takes as long for many rows as for one.
    """

    def take() -> None:
        monkeypatch.setattr(gpu, "_call", interpret)
        monkeypatch.setattr(gpu, "LEAST_CHUNK", 16)
        monkeypatch.setattr(gpu, "ROWS", 8)
        monkeypatch.setattr(choice, "why_not_triton", lambda: None)

    return take


def steps(architecture: str, compute: ComputeConfig = ONE, **settings: Any) -> tuple[TrainState, list[StepMetrics]]:
    settings = {"d_sae": D_SAE, "k": K, "aux_k": 6, "groups": (0.25, 0.75)} | settings
    config = TrainConfig(
        sae=SaeConfig(architecture=architecture, **settings),
        batch_size=BATCH,
        train_tokens=BATCH * N_STEPS,
        lr=0.01,
        grad_clip=0.2,
        compute=compute,
    )
    one, zero = np.ones(D, np.float32), np.zeros(D, np.float32)
    plan = Plan(N_STEPS, 0.01, Scaling(one, one), Means(zero, zero), dead_after=2 * BATCH)
    sae = create(config, plan)
    sae.b_enc[...] = sae.b_enc[...].at[:3].set(-9)  # never active, and soon dead
    state, step, metrics = start(config, plan, sae), make_step(config, plan), []
    for i in range(N_STEPS):
        x = jax.random.normal(jax.random.key(i), (BATCH, D))
        state, found = step(state, x, x @ jnp.eye(D)[::-1] if "coder" in architecture else x, plan.scaling)
        metrics.append(found)
    return state, metrics


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("topk", {}),
        ("topk", {"k_anneal": 0.0, "frozen": "decoder"}),
        ("batchtopk", {}),
        ("matryoshka", {}),
        ("matryoshka", {"groups": (0.125, 0.25, 0.125, 0.5)}),
        ("matryoshka", {"groups": (1.0,)}),
        ("skip_transcoder", {}),
        ("jumprelu", {}),
    ],
)
def test_steps_equal_the_plain_ones(
    take_triton: Callable[[], None], architecture: str, settings: dict[str, Any]
) -> None:
    plain, expected = steps(architecture, **settings)
    take_triton()
    state, metrics = steps(architecture, **settings)
    for got, wanted in zip(metrics, expected, strict=True):
        assert float(got.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
        assert float(got.l0) == pytest.approx(float(wanted.l0))
        assert float(got.grad_norm) == pytest.approx(float(wanted.grad_norm), rel=1e-4)
    assert float(metrics[-1].dead_fraction) > 0, "so that AuxK has worked"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), state, plain)


def test_a_sweep_takes_one_call_of_a_program_for_all_its_saes(
    take_triton: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Matryoshka, which takes most of the programs."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, default, **_: default(*arguments))
    sae = SaeConfig(architecture="matryoshka", d_sae=D_SAE, k=K, aux_k=6, groups=(0.25, 0.75))
    config = TrainConfig(sae=sae, batch_size=BATCH, train_tokens=BATCH * N_STEPS, grad_clip=0.2)
    one, zero = np.ones(D, np.float32), np.zeros(D, np.float32)
    plan = Plan(N_STEPS, 0.01, Scaling(one, one), Means(zero, zero), dead_after=2 * BATCH)
    own = Own(k=jnp.array([2.0, 4.0, 3.0]), lr=jnp.array([0.005, 0.01, 0.002]))

    def run() -> tuple[TrainState, list[StepMetrics]]:
        saes = [create(config.model_copy(update={"seed": seed}), plan) for seed in range(3)]
        for sae in saes:
            sae.b_enc[...] = sae.b_enc[...].at[:3].set(-9)
        state, step = stack([start(config, plan, sae) for sae in saes]), make_sweep_step(config, plan, own)
        metrics = []
        for i in range(N_STEPS):
            x = jax.random.normal(jax.random.key(i), (BATCH, D))
            state, found = step(state, x, x, plan.scaling)
            metrics.append(found)
        return state, metrics

    plain, expected = run()
    take_triton()
    rows = []

    def note(program: str, *inputs: jax.Array, **settings: Any) -> Any:
        rows.extend([len(inputs[0])] if program == "keep_largest" else [])
        return interpret(program, *inputs, **settings)

    monkeypatch.setattr(gpu, "_call", note)
    state, metrics = run()
    assert rows == [BATCH, 3 * BATCH], "traced for one SAE, and then for all of them at once"
    assert (metrics[-1].dead_fraction > 0).all(), "so that AuxK has worked"
    for got, wanted in zip(metrics, expected, strict=True):
        np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-5)
        np.testing.assert_allclose(got.l0, wanted.l0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state, plain)


def test_products_are_rounded_only_where_products_are_low(take_triton: Callable[[], None]) -> None:
    take_triton()
    x, W, b = (
        jax.random.normal(jax.random.key(0), (BATCH, D)),
        jax.random.normal(jax.random.key(1), (D, D_SAE)),
        jnp.zeros(D_SAE),
    )
    exact = jnp.sort(x @ W, axis=1)[:, ::-1][:, :K]

    def error(precision: str) -> float:
        with jax.default_matmul_precision(precision), kernels.using("auto"):
            codes, _ = kernels.largest(x, W, b, K, K)
        return float(jnp.abs(jnp.sort(codes.values, axis=1)[:, ::-1] / exact - 1).max())

    assert error("float32") < 1e-5
    assert 1e-5 < error(kernels.LOW) < 0.01

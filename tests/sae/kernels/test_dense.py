"""Products with all latents: gradients equal autodiff's of the plain ones, and nothing large is stored in float32."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sae.architectures import ARCHITECTURES
from sae.architectures.base import Context, Means, Output, Scaling, SparseCoder
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.penalised import Penalised
from sae.config import SaeConfig, TrainConfig
from sae.kernels import LOW, project, reconstruct
from sae.step import Plan, create, make_step, start

STEP_TOKENS = 151
BATCH, D, D_SAE, K = 601, 24, 64, 5  # a count of tokens that bfloat16 does not hold
PENALISED = [name for name, kind in ARCHITECTURES.items() if issubclass(kind, Penalised)]
JUMPING = [name for name in PENALISED if issubclass(ARCHITECTURES[name], JumpReLU)]
ROUNDING = 2.0**-8
"""of a product of two numbers, each rounded to bfloat16"""


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def plain_project(x: jax.Array, W_enc: jax.Array, centre: jax.Array) -> jax.Array:
    return (jax.lax.stop_gradient(x) - centre) @ W_enc


def plain_reconstruct(latents: jax.Array, W_dec: jax.Array) -> jax.Array:
    return latents @ W_dec


CASES = {
    "project": (project, plain_project, (normal(0, BATCH, D), normal(1, D, D_SAE), normal(2, D))),
    "reconstruct": (reconstruct, plain_reconstruct, (jax.nn.relu(normal(0, BATCH, D_SAE)), normal(1, D_SAE, D))),
}


def off(got: jax.Array, wanted: jax.Array) -> float:
    """By how much, as a share of the norm."""
    return float(jnp.linalg.norm(got - wanted) / jnp.maximum(jnp.linalg.norm(wanted), 1e-30))


def value_and_gradients(product: Callable[..., jax.Array], arguments: tuple[jax.Array, ...]) -> list[jax.Array]:
    value, back = jax.vjp(product, *arguments)
    return [value, *back(normal(3, *value.shape))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-6), (LOW, ROUNDING)])
def test_values_and_gradients_equal_autodiff_of_the_plain_product(case: str, precision: str, most: float) -> None:
    fast, plain, arguments = CASES[case]
    expected = value_and_gradients(plain, arguments)
    with jax.default_matmul_precision(precision):
        found = value_and_gradients(fast, arguments)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == jnp.float32
        assert off(got, wanted) < most
    worst = max(off(got, wanted) for got, wanted in zip(found, expected, strict=True))
    assert (worst > 1e-4) == (precision == LOW), "rounded where products are low, and nowhere else"


def loss_and_gradients(name: str, precision: str) -> tuple[Output, dict[str, jax.Array]]:
    config = SaeConfig(architecture=name, d_sae=D_SAE, k=K, aux_k=8)
    sae: SparseCoder = ARCHITECTURES[name](config, Means(jnp.ones(D) / 2, jnp.ones(D) / 2), jax.random.key(0))
    for bias in ("b_enc", "b_mag"):
        if isinstance(param := getattr(sae, bias, None), nnx.Param):
            param[...] = (0.1 * normal(1, D_SAE)).at[3].set(8)  # active on every token
    x = normal(2, BATCH, D) + 0.5
    context = Context(float(D), jnp.zeros(D_SAE, jnp.int32), 1, 0, 100)
    graph, params, rest = nnx.split(sae, nnx.Param, ...)

    def loss(params: Any) -> tuple[jax.Array, Output]:
        out = nnx.merge(graph, params, rest).loss(x, x, context)
        return out.loss, out

    with jax.default_matmul_precision(precision):
        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return out, {str(key): value[...] for key, value in grads.items()}


@pytest.mark.parametrize("name", PENALISED)
def test_low_products_change_a_loss_and_its_gradients_by_their_rounding_alone(name: str) -> None:
    (exact, wanted), (out, grads) = (loss_and_gradients(name, precision) for precision in ("float32", LOW))
    assert float(out.loss) == pytest.approx(float(exact.loss), rel=4 * ROUNDING)
    for tensor, gradient in grads.items():
        assert gradient.dtype == jnp.float32
        assert off(gradient, wanted[tensor]) < 6 * ROUNDING, tensor  # some latents cross their threshold
    for each in (exact, out):
        assert int(each.active.max()) == BATCH, "counted one by one"
        assert float(each.l0) == pytest.approx(int(each.active.sum()) / BATCH)


def a_step(name: str, matmul: str) -> tuple[Any, tuple[Any, ...]]:
    """A step, and what to call it with."""
    sae = SaeConfig(architecture=name, d_sae=D_SAE, k=K, aux_k=8, step_tokens=STEP_TOKENS)
    config = TrainConfig.model_validate(
        {"sae": sae, "batch_size": BATCH, "train_tokens": 10 * BATCH, "compute": {"matmul": matmul}}
    )
    one, zero = np.ones(D, np.float32), np.zeros(D, np.float32)
    plan = Plan(10, 1e-3, Scaling(one, one), Means(zero, zero), dead_after=BATCH)
    x, state = np.zeros((BATCH, D), np.float32), start(config, plan, create(config, plan))
    return make_step(config, plan), (state, x, x, plan.scaling)


def products_as_large_as_the_latents(name: str, matmul: str, tokens: int = BATCH) -> list[str]:
    """Types of what is multiplied and of what comes out, in a step for an NVIDIA GPU."""
    step, arguments = a_step(name, matmul)
    text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    large = rf"tensor<({tokens}x{D_SAE}|{D_SAE}x{tokens})x"
    return [line for line in re.findall(r"stablehlo\.dot_general.* : (.*)", text) if re.search(large, line)]


@pytest.mark.parametrize("name", [name for name in PENALISED if name not in JUMPING])
def test_a_step_has_five_products_and_stores_nothing_large_in_float32(name: str) -> None:
    found = products_as_large_as_the_latents(name, "bfloat16")
    assert len(found) == (7 if name == "gated" else 5), "gates are decoded on their own, and that has one gradient"
    for product in found:
        assert not re.search(rf"x{D_SAE}xf32|{D_SAE}x{BATCH}xf32", product)
    assert all("bf16" not in product for product in products_as_large_as_the_latents(name, "float32"))


@pytest.mark.parametrize("name", JUMPING)
def test_gradients_of_steps_take_three_products_with_every_fourth_token(name: str) -> None:
    found = products_as_large_as_the_latents(name, "bfloat16", BATCH // 4)
    assert len(found) == 3, "the encoder's, and the gradients of latents and encoder"
    for product in found:
        assert not re.search(rf"x{D_SAE}xf32|{D_SAE}x{BATCH // 4}xf32", product)


def test_a_cpu_takes_low_products_too() -> None:
    step, arguments = a_step("jumprelu", "bfloat16")
    assert np.isfinite(float(step(*arguments)[1].grad_norm))

"""The penalty on decoder rows that are alike, against all pairs compared one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae.config import SaeConfig
from sae.kernels import unit_rows
from sae.orthogonality import alikeness, closest

D_SAE, D = 24, 6


@pytest.fixture
def rows() -> jax.Array:
    return unit_rows(jax.random.normal(jax.random.key(0), (D_SAE, D)))


def brute_force(rows: np.ndarray) -> float:
    largest = [max(float(a @ b) for j, b in enumerate(rows) if i != j) for i, a in enumerate(rows)]
    return float(np.mean(np.square(largest)))


def penalty(rows: jax.Array, step: int, **changes: int) -> float:
    return float(alikeness(rows, jnp.int32(step), SaeConfig(orthogonality=0.25, **changes), seed=3))


def test_it_is_the_mean_squared_largest_cosine(rows: jax.Array) -> None:
    assert float(closest(rows)) == pytest.approx(brute_force(np.asarray(rows)), rel=1e-5)
    assert penalty(rows, 0) == pytest.approx(5 * brute_force(np.asarray(rows)), rel=1e-5)


def test_it_comes_every_few_steps_and_then_weighs_more(rows: jax.Array) -> None:
    assert [penalty(rows, step) > 0 for step in range(11)] == [step % 5 == 0 for step in range(11)]
    assert penalty(rows, 0, orthogonality_every=1) == pytest.approx(penalty(rows, 0) / 5)


def test_chunks_differ_between_steps_and_repeat_with_the_seed(rows: jax.Array) -> None:
    seen = [penalty(rows, step, orthogonality_chunk=7) for step in (0, 5, 10)]
    assert len(set(seen)) == 3
    assert penalty(rows, 5, orthogonality_chunk=7) == seen[1]
    assert all(value < penalty(rows, 0) for value in seen), "fewer others, smaller largest cosines"


def test_its_gradient_parts_rows_that_are_alike() -> None:
    rows = unit_rows(jnp.array([[1.0, 0.1, 0.0], [1.0, -0.1, 0.0], [0.0, 0.0, 1.0]]))
    grad = jax.grad(closest)(rows)
    assert float(closest(unit_rows(rows - 0.1 * grad))) < float(closest(rows))
    assert not np.asarray(grad[2]).any() or float(jnp.abs(grad[2]).max()) < 1e-6

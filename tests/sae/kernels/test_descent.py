"""A step of Adam equals optax's, and holds rows on the sphere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sae.kernels import Rates, descend, project_gradient, squared_norm, unit_rows

RATE, BETA1, BETA2, CLIP = 0.01, 0.9, 0.99, 0.5


def normal(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (6, 4))


@pytest.mark.parametrize("on_sphere", [False, True])
def test_steps_equal_those_of_optax(on_sphere: bool) -> None:
    W = expected = unit_rows(normal(0))
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(RATE, BETA1, BETA2))
    state, mean, square = optimizer.init(W), jnp.zeros_like(W), jnp.zeros_like(W)
    for step in range(5):
        g = normal(step + 1)
        norm = jnp.sqrt(squared_norm(W, g, on_sphere))
        rates = Rates(jnp.minimum(1, CLIP / norm), jnp.float32(RATE), BETA1, BETA2, jnp.int32(step + 1))
        W, mean, square = descend(W, g, mean, square, rates, on_sphere)
        projected = project_gradient(expected, g) if on_sphere else g
        assert float(norm) == pytest.approx(float(jnp.linalg.norm(projected)), rel=1e-5)
        updates, state = optimizer.update(projected, state)
        expected = optax.apply_updates(expected, updates)
        expected = unit_rows(expected) if on_sphere else expected
        np.testing.assert_allclose(W, expected, rtol=1e-5, atol=1e-6)


def test_nan_reaches_the_weights() -> None:
    W, zero = normal(0), jnp.zeros((6, 4))
    rates = Rates(jnp.float32(jnp.nan), jnp.float32(RATE), BETA1, BETA2, jnp.int32(1))
    assert bool(jnp.isnan(descend(W, normal(1), zero, zero, rates)[0]).all())

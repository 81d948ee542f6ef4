"""Nested dictionaries decode as dense products do, in value and gradient, plainly and through interpreted programs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae import kernels
from sae.kernels import Codes, choice, decode_nested, densify, gpu
from tests.sae.kernels.test_gpu import interpret

BATCH, WIDTH, D_SAE, D_MODEL = 9, 4, 15, 5


@pytest.fixture
def codes() -> Codes:
    """Row i has i % (WIDTH + 1) active latents, which so miss some groups; unused slots are out of range."""
    rng = np.random.default_rng(0)
    unused = np.arange(WIDTH) >= (np.arange(BATCH) % (WIDTH + 1))[:, None]
    values = np.where(unused, 0, rng.uniform(0.1, 2, (BATCH, WIDTH)))
    indices = np.where(unused, D_SAE, np.stack([rng.permutation(D_SAE)[:WIDTH] for _ in range(BATCH)]))
    return Codes(jnp.asarray(values, jnp.float32), jnp.asarray(indices, jnp.int32))


def dense(codes: Codes, W_dec: jax.Array, bounds: tuple[int, ...]) -> jax.Array:
    latents = densify(codes, D_SAE)
    return jnp.stack([latents[:, :stop] @ W_dec[:stop] for stop in bounds[1:]], axis=1)


@pytest.mark.parametrize("bounds", [(0, D_SAE), (0, 4, D_SAE), (0, 1, 3, D_SAE), (0, 2, 3, 6, 10, D_SAE)])
@pytest.mark.parametrize("triton", [False, True])
def test_values_and_gradients_are_those_of_dense_products(
    codes: Codes, monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, ...], triton: bool
) -> None:
    monkeypatch.setattr(gpu, "_call", interpret)
    monkeypatch.setattr(choice, "why_not_triton", lambda: None)
    W_dec = jax.random.normal(jax.random.key(0), (D_SAE, D_MODEL))
    target = jax.random.normal(jax.random.key(1), (BATCH, len(bounds) - 1, D_MODEL))

    def loss(decoding: Callable[..., jax.Array], values: jax.Array, W_dec: jax.Array) -> jax.Array:
        return ((decoding(codes._replace(values=values), W_dec, bounds) - target) ** 2).sum()

    with kernels.using("triton" if triton else "xla"):
        found = decode_nested(codes, W_dec, bounds)
        to_values, to_W_dec = jax.grad(loss, (1, 2))(decode_nested, codes.values, W_dec)
    expected_values, expected_W_dec = jax.grad(loss, (1, 2))(dense, codes.values, W_dec)
    np.testing.assert_allclose(found, dense(codes, W_dec, bounds), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jnp.where(codes.values > 0, to_values, 0), expected_values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_W_dec, expected_W_dec, rtol=1e-4, atol=1e-5)

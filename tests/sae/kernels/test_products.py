"""Row-by-row kernels equal the dense products that they replace, in value and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.kernels import Codes, attach, decode, densify, kth_largest, products, sum_rows

BATCH, WIDTH, D_SAE, D_MODEL = 7, 4, 11, 5


@pytest.fixture
def codes() -> Codes:
    """Row i has i % (WIDTH + 1) active latents; the others are zeros at the end."""
    rng = np.random.default_rng(0)
    values = -np.sort(-rng.uniform(0.1, 2, (BATCH, WIDTH)), axis=1)
    values[np.arange(WIDTH) >= (np.arange(BATCH) % (WIDTH + 1))[:, None]] = 0
    indices = np.stack([rng.permutation(D_SAE)[:WIDTH] for _ in range(BATCH)])
    return Codes(jnp.asarray(values, jnp.float32), jnp.asarray(indices))


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def close(a: jax.Array, b: jax.Array) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_decode_equals_the_dense_product(codes: Codes) -> None:
    W_dec = normal(0, D_SAE, D_MODEL)
    close(decode(codes, W_dec), densify(codes, D_SAE) @ W_dec)


def test_decode_gradients_equal_autodiff_of_the_dense_product(codes: Codes) -> None:
    W_dec, target = normal(0, D_SAE, D_MODEL), normal(1, BATCH, D_MODEL)

    def fast(values: jax.Array, W_dec: jax.Array) -> jax.Array:
        return ((decode(Codes(values, codes.indices), W_dec) - target) ** 2).sum()

    def dense(values: jax.Array, W_dec: jax.Array) -> jax.Array:
        return ((densify(Codes(values, codes.indices), D_SAE) @ W_dec - target) ** 2).sum()

    for got, expected in zip(
        jax.grad(fast, (0, 1))(codes.values, W_dec), jax.grad(dense, (0, 1))(codes.values, W_dec), strict=True
    ):
        close(got, expected)


def test_attach_gradients_equal_autodiff_of_the_encoder(codes: Codes) -> None:
    x, W_enc, b_enc, b_dec = normal(0, BATCH, D_MODEL), normal(1, D_MODEL, D_SAE), normal(2, D_SAE), normal(3, D_MODEL)
    upstream = normal(4, BATCH, WIDTH)
    rows = jnp.arange(BATCH)[:, None]

    def dense(W_enc: jax.Array, b_enc: jax.Array, b_dec: jax.Array) -> jax.Array:
        pre = jax.nn.relu((x - b_dec) @ W_enc + b_enc)
        return (pre[rows, codes.indices] * upstream)[codes.values > 0].sum()

    positive = jax.nn.relu((x - b_dec) @ W_enc + b_enc)[rows, codes.indices] * (codes.values > 0)
    order = jnp.argsort(positive == 0, axis=1)  # positive ones first, as Codes promises
    sorted_codes = Codes(*(jnp.take_along_axis(part, order, axis=1) for part in (positive, codes.indices)))
    sorted_upstream = jnp.take_along_axis(upstream, order, axis=1)

    def fast(W_enc: jax.Array, b_enc: jax.Array, b_dec: jax.Array) -> jax.Array:
        return (attach(sorted_codes, x, W_enc, b_enc, b_dec).values * sorted_upstream).sum()

    weights = W_enc, b_enc, b_dec
    for got, expected in zip(jax.grad(fast, (0, 1, 2))(*weights), jax.grad(dense, (0, 1, 2))(*weights), strict=True):
        close(got, expected)


def test_cpu_and_accelerator_variants_agree(codes: Codes) -> None:
    W_dec, g, weights = normal(0, D_SAE, D_MODEL), normal(1, BATCH, D_MODEL), normal(2, BATCH, WIDTH)
    weights = weights * (codes.values > 0)
    active = (codes.values > 0).sum(axis=1)
    start = jnp.zeros((D_SAE, D_MODEL))
    close(products._decode_rows(*codes, W_dec), products._decode_dense(*codes, W_dec))
    close(products._dot_rows(codes.indices, W_dec, g), products._dot_dense(codes.indices, W_dec, g))
    arguments = start, codes.indices, active, weights, g
    close(products._sum_rows_one_by_one(*arguments), products._sum_rows_dense(*arguments))


def test_sum_rows_adds_repeats_across_tokens() -> None:
    codes = Codes(jnp.ones((3, 1)), jnp.array([[2], [0], [2]]))
    sums, totals = sum_rows(codes, jnp.array([[1.0], [10.0], [100.0]]), jnp.ones((3, 2)), 4)
    assert sums.tolist() == [[10, 10], [0, 0], [101, 101], [0, 0]]
    assert totals.tolist() == [10, 0, 101, 0]


KTH_LARGEST = {k: jax.jit(partial(kth_largest, k=k)) for k in (1, 5, 40)}


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(0, 2.0**100, width=32), min_size=40, max_size=40),
    k=st.sampled_from([1, 5, 40]),
)
def test_kth_largest_is_exact(values: list[float], k: int) -> None:
    assert float(KTH_LARGEST[k](jnp.array(values, jnp.float32))) == sorted(values, reverse=True)[k - 1]


def test_totals_of_an_accelerator_equal_those_of_a_cpu(codes: Codes) -> None:
    for weights in (codes.values, (codes.values > 0).astype(jnp.int32)):
        expected = np.zeros(D_SAE, weights.dtype)
        np.add.at(expected, np.asarray(codes.indices), np.asarray(weights))
        for of_totals in (products._total_rows, products._total_dense):
            close(of_totals(D_SAE, codes.indices, weights), jnp.asarray(expected))

"""Each measure against its formula, on few numbers and in batches."""

import numpy as np
import pytest

from sae.metrics import DENSE, Evaluation, dead_fraction, dense_fraction, density_histogram


def evaluate(x: np.ndarray, reconstruction: np.ndarray, latents: np.ndarray, mean: np.ndarray, size: int) -> Evaluation:
    evaluation = Evaluation(mean, latents.shape[1])
    for i in range(0, len(x), size):
        evaluation.add(x[i : i + size], reconstruction[i : i + size], latents[i : i + size])
    return evaluation


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, error = rng.normal(5, 2, (300, 8)), rng.normal(0, 1, (300, 8))
    latents = rng.normal(size=(300, 20)) * (rng.random((300, 20)) < 0.2)
    latents[:, 3] = 0
    return x.astype(np.float32), (x + error).astype(np.float32), latents.astype(np.float32), np.full(8, 5.0)


@pytest.mark.parametrize("size", [300, 128, 1])
def test_sums_over_batches_equal_the_formulas(case: tuple[np.ndarray, ...], size: int) -> None:
    x, reconstruction, latents, mean = case
    evaluation = evaluate(*case, size)
    wide = x.astype(np.float64)
    assert evaluation.fvu == pytest.approx(((wide - reconstruction) ** 2).sum() / ((wide - mean) ** 2).sum(), rel=1e-12)
    assert evaluation.l0 == (latents > 0).sum() / 300
    np.testing.assert_array_equal(evaluation.density, (latents > 0).mean(axis=0))
    assert evaluation.dead_fraction == pytest.approx(1 / 20)
    assert evaluation.dense_fraction == ((latents > 0).mean(axis=0) > 0.1).mean() == 0.3
    assert evaluation.n_tokens == 300
    assert list(evaluation.summary()) == ["fvu", "l0", "dead_fraction", "dense_fraction"]


def test_fvu_of_the_dataset_mean_is_1_whatever_the_batch(case: tuple[np.ndarray, ...]) -> None:
    x, _, latents, _ = case
    mean = x.mean(axis=0, dtype=np.float64)
    mean_only = np.broadcast_to(mean.astype(np.float32), x.shape)
    assert evaluate(x[:7], mean_only[:7], latents[:7], mean, 2).fvu == pytest.approx(1, rel=1e-6)


def test_fvu_keeps_precision_far_from_the_origin() -> None:
    rng = np.random.default_rng(1)
    x = (1e4 + rng.normal(0, 1, (4000, 4))).astype(np.float32)
    evaluation = evaluate(x, x + np.float32(0.5), np.ones((4000, 2), np.float32), x.mean(axis=0, dtype=np.float64), 64)
    assert evaluation.fvu == pytest.approx(0.25 / x.var(axis=0, dtype=np.float64).mean(), rel=1e-9)


def test_dead_fraction_counts_latents_that_never_fired() -> None:
    assert dead_fraction(np.zeros(4, bool)) == 1
    assert dead_fraction(np.ones(4, bool)) == 0


def test_a_latent_on_a_tenth_of_the_tokens_is_not_dense_yet() -> None:
    assert dense_fraction(np.array([0.0, DENSE, np.nextafter(DENSE, 1), 1.0])) == 0.5


def test_histogram_counts_each_latent_once() -> None:
    density = np.concatenate([np.zeros(7), [1e-12, 1e-6, 1 / 3, 1.0], np.random.default_rng(0).random(500) ** 8])
    histogram = density_histogram(density)
    edges, counts = histogram["log10_edges"], histogram["counts"]
    assert edges == [-6 + i / 4 for i in range(25)]
    assert len(counts) == 25
    assert sum(counts) == 511
    assert counts[0] == 7
    for i in range(1, 25):
        low = 0 if i == 1 else 10 ** edges[i - 1]
        high = np.inf if i == 24 else 10 ** edges[i]
        assert counts[i] == ((density > 0) & (density >= low) & (density < high)).sum(), edges[i]


def test_histogram_of_latents_that_never_fired_and_of_latents_that_always_do() -> None:
    assert density_histogram(np.zeros(3))["counts"] == [3] + [0] * 24
    assert density_histogram(np.ones(3))["counts"] == [0] * 24 + [3]

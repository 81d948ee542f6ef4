"""Each measure against its formula, on few numbers and in batches."""

import subprocess
import sys

import numpy as np
import pytest

from sae.metrics import Evaluation, dead_fraction


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
    assert evaluation.n_tokens == 300


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


def test_metrics_import_no_framework() -> None:
    code = "import sys, sae.metrics; assert not {'torch', 'jax', 'flax'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)

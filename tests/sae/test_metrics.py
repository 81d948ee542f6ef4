"""Each measure against its formula, on few numbers and in batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from sae.metrics import DENSE, Evaluation, auroc, dead_fraction, dense_fraction, density_histogram, means


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


def test_means_quantiles_and_histograms_are_those_of_the_tokens(case: tuple[np.ndarray, ...]) -> None:
    x, reconstruction, latents, mean = case
    evaluation = evaluate(*case, 77)
    wide, given = x.astype(np.float64), reconstruction.astype(np.float64)
    error, variance = ((wide - given) ** 2), ((wide - mean) ** 2)
    explained = 1 - error.sum(1) / variance.sum(1)
    norms = np.linalg.norm(wide, axis=1), np.linalg.norm(given, axis=1)
    expected = {
        "explained_variance_token": np.clip(explained, -1, 1).mean(),
        "l1": np.where(latents > 0, latents, 0).sum(1).mean(),
        "cosine": ((wide * given).sum(1) / norms[0] / norms[1]).mean(),
        "shrinkage": (norms[1] / norms[0]).mean(),
        "reconstruction_bias": (norms[1] ** 2).sum() / (wide * given).sum(),
        "squared_error": error.sum(1).mean(),
    }
    got = evaluation.means()
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert (got["fvu"], got["l0"]) == pytest.approx((evaluation.fvu, evaluation.l0))
    quantiles, counts = evaluation.quantiles(), (latents > 0).sum(1)
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        name = f"{q:.0%}"
        assert quantiles["l0"][name] == np.quantile(counts, q, method="inverted_cdf")
        at = np.quantile(np.clip(explained, -1, 1), q, method="inverted_cdf")
        assert quantiles["explained_variance_token"][name] == pytest.approx(at, abs=0.01)
        dimension = np.quantile(1 - error.sum(0) / variance.sum(0), q)
        assert quantiles["explained_variance_dimension"][name] == pytest.approx(dimension, abs=1e-4)
    histograms = evaluation.histograms()
    assert sum(histograms["activation"]["counts"]) == (latents > 0).sum()
    assert sum(histograms["explained_variance_token"]["counts"]) == 300


def test_intervals_are_wider_where_documents_are_few(case: tuple[np.ndarray, ...]) -> None:
    x, reconstruction, latents, mean = case
    widths = []
    for n in (1, 5, 100):
        evaluation = Evaluation(mean, latents.shape[1])
        shift = 1 + 0.5 * (np.arange(300) % n)[:, None].astype(np.float32) / n
        evaluation.add(x, x + shift * (reconstruction - x), latents, np.arange(300) % n)
        intervals = evaluation.intervals(0)
        assert evaluation.intervals(0) == intervals
        widths.append(intervals.get("fvu"))
    assert widths[0] is None
    assert widths[1][1] - widths[1][0] > 1.2 * (widths[2][1] - widths[2][0])


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(0), 0
    for seed in range(100):
        low, high = means({"x": rng.exponential(2, 60)}, seed)["x_ci95"]
        held += low <= 2 <= high
    assert 0.87 < held / 100 < 0.99


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=4, max_size=30).filter(
        lambda rows: len({is_up for _, is_up, n in rows if n}) == 2
    )
)
def test_auroc_is_that_of_scikit_learn_with_weights_and_ties(rows: list[tuple[int, bool, int]]) -> None:
    scores, positive, weights = (np.array(column) for column in zip(*rows, strict=True))
    expected = roc_auc_score(np.repeat(positive, weights), np.repeat(scores, weights))
    got = auroc(scores.astype(float), positive, np.stack([weights, weights]).astype(float))
    np.testing.assert_allclose(got, [expected, expected], rtol=1e-12, atol=1e-12)

"""Latents as places in a plane."""

import sys

import numpy as np
import pytest

from activations.errors import ConfigError
from sae.index_map import LAYOUTS, layout


def clusters(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows about four random directions, of any length, and which each is about."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((4, 24))
    group = np.repeat(np.arange(4), 30)
    rows = centres[group] + 0.3 * rng.standard_normal((len(group), 24))
    return (rows * rng.uniform(0.1, 5, (len(group), 1))).astype(np.float32), group


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_is_alike_lies_together_inside_the_frame(kind: str) -> None:
    rows, group = clusters()
    places = layout(rows, kind, 0)
    assert (places.shape, places.dtype) == ((120, 2), np.float32)
    assert np.abs(places).max() == pytest.approx(1, abs=1e-5)
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (group[distance.argmin(axis=1)] == group).mean() > 0.9
    np.testing.assert_array_equal(layout(rows, kind, 0), places)


def test_principal_components_are_those_of_the_unit_rows() -> None:
    from sklearn.decomposition import PCA

    rows, _ = clusters(1)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = PCA(2, svd_solver="full").fit_transform(unit.astype(np.float64))
    found = LAYOUTS["pca"](unit, 0)
    for axis in range(2):
        assert abs(np.corrcoef(found[:, axis], expected[:, axis])[0, 1]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_latents_and_zero_rows(n: int) -> None:
    rows = np.zeros((n, 8), np.float32)
    assert np.isfinite(layout(rows, "pca", 0)).all()
    rows[:, 0] = 1
    assert np.isfinite(layout(rows, "pca", 0)).all()


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match=r"saekit\[umap\]"):
        layout(clusters()[0], "umap", 0)

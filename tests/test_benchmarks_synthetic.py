"""benchmarks/synthetic.py: what it draws is what it says, and its measures see what they are made to see."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from activations.store import ActivationStore


@pytest.fixture(scope="module")
def synthetic(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("synthetic")


@pytest.mark.parametrize("name", ["plain", "correlated", "hierarchical"])
def test_features_fire_as_often_as_they_should(synthetic: ModuleType, name: str) -> None:
    world = synthetic.world(name)
    x, fires = synthetic.draw(world, 20_000, seed=5)
    np.testing.assert_allclose(np.linalg.norm(world.directions, axis=1), 1)
    assert world.rates.sum() == pytest.approx(synthetic.TRUE_L0)
    np.testing.assert_allclose(fires.mean(axis=0), world.rates, atol=5 * np.sqrt(world.rates.max() / len(x)))
    expected = world.mean + (world.rates * np.exp(synthetic.SPREAD**2 / 2)) @ world.directions
    np.testing.assert_allclose(x.mean(axis=0), expected, atol=0.05)
    again = synthetic.draw(synthetic.world(name), 20_000, seed=5)
    np.testing.assert_array_equal(again.x, x)
    assert (synthetic.draw(world, 20_000, seed=6).x != x).any()


def test_features_of_the_plain_set_are_independent_and_those_of_the_correlated_one_are_not(
    synthetic: ModuleType,
) -> None:
    def strongest(name: str) -> tuple[float, float]:
        fires = synthetic.draw(synthetic.world(name), 20_000, seed=0).fires.astype(float)
        correlations = np.corrcoef(fires[:, :60].T) - np.eye(60)
        return float(correlations.max()), float(correlations.min())

    assert strongest("plain") == pytest.approx((0, 0), abs=0.05)
    together, apart = strongest("correlated")
    assert together > 0.15
    assert apart < -0.05


def test_a_child_fires_only_with_its_parent_and_no_other_child(synthetic: ModuleType) -> None:
    world = synthetic.world("hierarchical")
    fires = synthetic.draw(world, 20_000, seed=0).fires
    parents = np.unique(world.parent[world.parent >= 0])
    assert len(parents) * (1 + synthetic.CHILDREN) == synthetic.N_FEATURES
    for parent in parents:
        children = fires[:, world.parent == parent]
        assert children.shape[1] == synthetic.CHILDREN
        assert not (children.any(axis=1) & ~fires[:, parent]).any()
        assert children.sum(axis=1).max() == 1
        assert (fires[:, parent] & ~children.any(axis=1)).any(), "parents fire alone too"


def test_the_store_holds_the_tokens_and_their_statistics(
    synthetic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "COMMIT", 8)
    x = synthetic.draw(synthetic.world("plain"), 20 * synthetic.CTX, seed=0).x
    synthetic.write_store(tmp_path / "store", x)
    store = ActivationStore.open(tmp_path / "store")
    assert store.is_complete
    np.testing.assert_array_equal(store.activations(synthetic.HOOK_POINT, 0, 20).reshape(x.shape), x)
    assert store.mask(0, 20).all()
    stats = store.stats(synthetic.HOOK_POINT)
    np.testing.assert_allclose(stats.mean, x.mean(axis=0), atol=1e-5)
    assert stats.mean_sq_norm == pytest.approx(float((x**2).sum(axis=1).mean()), rel=1e-5)


def test_recovery_by_hand(synthetic: ModuleType) -> None:
    """The second latent is nearest to two features, of which one has to take the third when each needs its own."""
    directions = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.8]])
    W_dec = np.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert synthetic.recovery(W_dec, directions) == pytest.approx(
        {"mean_max_cosine": (1 + 1 + 0.6) / 3, "recovered": 2 / 3, "mcc": 2 / 3}
    )
    assert synthetic.recovery(directions * 3, directions)["mcc"] == pytest.approx(1)


def test_absorption_by_hand(synthetic: ModuleType) -> None:
    """Two parents with three children each; the first loses its latent to one child on three of four tokens."""
    directions = np.eye(8)
    parent = np.array([-1, -1, 0, 0, 0, 1, 1, 1])
    world = synthetic.World(directions, np.full(8, 0.1), np.zeros(8), np.zeros((8, 1)), parent)
    rows = [
        [0],
        [0],
        [0],
        [0],
        [0, 2],
        [0, 2],
        [0, 2],
        [0, 2],
        [0, 3],
        [0, 3],
        [0, 4],
        [1],
        [1],
        [1, 5],
        [1, 6],
        [1, 7],
    ]
    fires = np.zeros((len(rows), 8), bool)
    for token, features in enumerate(rows):
        fires[token, features] = True
    active = fires.copy()
    active[[3, 4, 5, 6], 0] = False
    expected = {"absorption": (3 / 4 + 0 + 0 + 0 + 0 + 0) / 6, "missed_alone": 3 * 0.25 / 6, "pairs": 6}
    assert synthetic.absorption(directions, active, fires, world) == pytest.approx(expected)
    assert synthetic.absorption(directions, fires, fires, world)["absorption"] == 0

    asleep = active.copy()
    asleep[:3, 0] = False  # off wherever its parent fires alone, so that a child cannot be why
    assert synthetic.absorption(directions, asleep, fires, world) == {"absorption": 0, "missed_alone": 0, "pairs": 3}
    assert synthetic.absorption(directions, fires & False, fires, world) == {"pairs": 0}

    turned = directions.copy()
    turned[0, 1] = 1.0  # a latent between two parents is neither's
    assert synthetic.absorption(turned, active, fires, world) == {"absorption": 0, "missed_alone": 0, "pairs": 3}


def test_agreement_by_hand(load_benchmark: Callable[[str], ModuleType]) -> None:
    matching = load_benchmark("_matching")
    a = matching.unit_rows(np.array([[1.0, 0.0], [0.0, 3.0]], np.float32))
    b = matching.unit_rows(np.array([[2.0, 0.0], [0.8, 0.6], [1.0, 0.0]], np.float32))
    np.testing.assert_allclose(torch.linalg.norm(a, dim=1), 1)
    found = matching.agreement([a, b], cosine=0.9)
    assert found["matched"] == pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-4)
    assert found["mean_best_cosine"] == pytest.approx((1.6 / 2 + 2.8 / 3) / 2, abs=1e-4)


def test_one_run_gives_a_line_with_all_figures(
    synthetic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "STORED", 4096)
    monkeypatch.setattr(synthetic, "HELD_OUT", 1024)
    monkeypatch.setattr(synthetic, "COMMIT", 8)
    bench = synthetic.Bench("hierarchical", tmp_path)
    line, rows = bench.run("batchtopk", 0, 20_480, ["batch_size=256"])
    assert {"mean_max_cosine", "recovered", "mcc", "fvu", "l0", "true_l0", "never_fired", "absorption"} <= line.keys()
    assert 0.3 < line["mean_max_cosine"] <= 1
    assert line["fvu"] < 0.9
    assert line["true_l0"] == pytest.approx(synthetic.TRUE_L0, abs=0.5)
    assert rows.shape[1] == synthetic.D_MODEL

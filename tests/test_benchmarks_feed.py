"""benchmarks/feed.py: its store is what it says, it times whole blocks, and it names what binds."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from sae.data import TokenOrder


@pytest.fixture(scope="module")
def bench(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("feed")


def test_its_store_has_the_statistics_of_what_it_holds(bench: ModuleType, tmp_path: Path) -> None:
    store = bench.write_store(tmp_path / "store", d_model=8, tokens=40_000)
    assert store.mask().sum() >= 40_000
    assert store.meta.store_dtype == "bfloat16"
    used = store.activations(bench.HOOK_POINT)[store.mask()]
    stats = store.stats(bench.HOOK_POINT)
    assert stats.n_tokens == len(used)
    np.testing.assert_allclose(stats.mean, used.mean(axis=0, dtype=np.float64), rtol=1e-9, atol=1e-9)
    assert len(np.unique(used, axis=0)) == bench.ROWS * (bench.CTX - 1)
    n_bytes = sum(path.stat().st_size for path in bench.shards(store))
    assert 2 * 8 * store.n_sequences * store.ctx < n_bytes < 2.2 * 8 * store.n_sequences * store.ctx
    assert bench.read_files(bench.shards(store)) > 0
    assert bench.read_store(store) > 0


def test_the_time_is_that_of_whole_blocks(bench: ModuleType, tmp_path: Path) -> None:
    store = bench.write_store(tmp_path / "store", d_model=16, tokens=60_000)
    order = TokenOrder(store, (bench.HOOK_POINT,), stop=store.n_sequences, batch_size=512, seed=0, memory_mb=1)
    blocks = [block.n_batches for epoch in (0, 1) for block in order.epoch(epoch)]
    assert len(blocks) == 8
    assert bench.stretch(order, 2) == sum(blocks[:-1]) + 1
    used: list[jax.Array] = []
    assert bench.time_batches(order, 2, 512, lambda batch: used.append(batch) or batch, on_device=False) > 0
    assert len(used) == sum(blocks[:-1]) + 1
    np.testing.assert_array_equal(used[-1], order.batch(len(used) - 1)[bench.HOOK_POINT])
    assert order.locate(len(used) - 1)[1:] == (3, 0), "the first batch of the last block"


@pytest.mark.parametrize(
    ("disk", "train", "bound", "ratio"),
    [(100, 95, "disk", 0.95), (100, 80, "feed", 0.8), (300, 185, "step", 0.925), (300, 95, "feed", 0.475)],
)
def test_what_binds(bench: ModuleType, disk: float, train: float, bound: str, ratio: float) -> None:
    found = bench.judged({"disk_tok_s": disk, "train_tok_s": train}, 200)
    assert found == {"bound": bound, "ratio_to_bound": ratio}


@pytest.mark.parametrize("blocks", ["host", "device"])
def test_a_line_has_all_rates_and_leaves_nothing(
    blocks: str, bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("_steps.REPEAT_S", 0.01)
    monkeypatch.setattr("_steps.PROBE_S", 0.01)
    words = ["--d-model", "16", "--d-sae", "64", "--k", "4", "--batch", "512", "--tokens", "60000", "--memory-mb", "1"]
    bench.main([*words, "--where", str(tmp_path), "--blocks", blocks])
    line = json.loads(capsys.readouterr().out)
    assert line["blocks"] == blocks
    for heat in ("cold", "warm"):
        assert line[f"bound_{heat}"] in ("step", "disk", "feed")
        slower = min(line["step_tok_s"], line[f"disk_tok_s_{heat}"])
        assert line[f"ratio_to_bound_{heat}"] == pytest.approx(line[f"train_tok_s_{heat}"] / slower, abs=1e-3)
        assert line[f"reader_tok_s_{heat}"] > 0
    assert line["feed_tok_s_warm"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match="expected less than --d-sae, 64, got 64"):
        bench.main(["--d-sae", "64", "--k", "64"])

"""evaluation.json, its tables and its page: the same numbers everywhere, escaped, and nothing loaded from elsewhere."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.config import EvaluateConfig
from sae.evaluate import evaluate
from sae.evaluation.core import activity_on_device, reconstruction
from sae.evaluation.report import tables, write_report
from sae.metrics import activity
from sae.torch_view import TorchSae
from sae.wiring import Wiring

HOOK, CTX, WIDTH = "resid_post.1", 24, 32


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32")


@pytest.fixture(scope="module")
def store(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    from activations.config import HarvestConfig
    from activations.harvest import harvest

    folder = tmp_path_factory.mktemp("report")
    rows = [{"text": f"Text {i} has {'la ' * (5 * i % 8)}{i * 37}."} for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = HarvestConfig(
        model=loaded.spec, text=str(folder / "text.jsonl"), hook_points=(HOOK,), out=folder / "store", ctx=CTX,
        commit_sequences=8, store_dtype="float32",
    )  # fmt: skip
    return ActivationStore.open(harvest(config, loaded).path)


def topk(loaded: LoadedModel, seed: int, mean: np.ndarray) -> SaeArtefact:
    rows = np.random.default_rng(seed).standard_normal((64, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    about = {"hook_point": HOOK, "model": {"id": loaded.id, "fingerprint": loaded.fingerprint}}
    mean = mean.astype(np.float32)
    return SaeArtefact("topk", rows.T.copy(), np.zeros(64, np.float32), rows, mean, k=5, metadata=about)


@pytest.fixture(scope="module")
def result(store: ActivationStore, loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("evaluated")
    for seed in (0, 1):
        topk(loaded, seed, store.stats(HOOK).mean).save(folder / f"sae{seed}")
    config = EvaluateConfig(
        store=store.path, sae=folder / "sae0", model=loaded.spec, holdout_fraction=0.4, compare_to=(folder / "sae1",)
    )
    return {"folder": folder / "sae0", **evaluate(config, loaded)}


class Page(HTMLParser):
    """Addresses that a page would load, and its table cells."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        self._in_cell = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells.append(data)


def test_the_file_holds_the_result_and_every_interval_its_measure(result: dict[str, Any]) -> None:
    written = json.loads((result["folder"] / "evaluation.json").read_text())
    assert written == {key: value for key, value in result.items() if key != "folder"}
    measured = 0
    for row in (written, *written["baselines"].values()):
        for name, both in row.items():
            if name.endswith("_ci95"):
                measured += 1
                assert both[0] <= row[name.removesuffix("_ci95")] <= both[1], name
    assert measured > 40


def test_baselines_are_worse_than_what_is_perfect_and_as_sparse_as_the_sae(result: dict[str, Any]) -> None:
    rows = result["baselines"]
    assert rows["pca"]["l0"] == 5 == result["l0"]
    assert rows["random_sae"]["l0"] == pytest.approx(5, rel=0.2)
    assert 0 < rows["pca"]["fvu"] < 1
    assert result["ce_random_error"] != result["ce_sae"]
    share = 1 - (result["ce_random_error"] - result["ce_clean"]) / (result["ce_sae"] - result["ce_clean"])
    assert result["directed_error_share"] == pytest.approx(share)
    assert list(result["stability"]) == [str(result["folder"].parent / "sae1")]


def test_the_page_loads_nothing_and_shows_the_numbers_of_the_file(result: dict[str, Any]) -> None:
    text = (result["folder"] / "evaluation.html").read_text()
    page = Page(text)
    assert all(link.startswith("#") for link in page.links), page.links
    assert "default-src 'none'" in text
    for table in tables(result):
        for row in table.rows.values():
            assert {cell for cell in row.values() if cell} <= set(page.cells)
    assert text.count("<svg") == 1


def test_families_have_their_tables_and_charts_and_names_are_escaped(result: dict[str, Any], tmp_path: Path) -> None:
    rows = {f"sae k={k}": {"accuracy": 0.6 + k / 10, "accuracy_ci95": [0.5, 0.9]} for k in (1, 2)}
    score = {"auroc": 0.75, "auroc_ci95": [0.7, 0.8]}
    more = {
        "probing": {"<b>news": {"rows": rows | {"dense": {"accuracy": 0.9}, "majority": {"accuracy": 0.5}}}},
        "concepts": {"rows": {"sae": score, "always_negative": {"auroc": 0.5}}},
    }
    write_report(tmp_path / "page.html", {**result, **more})
    text = (tmp_path / "page.html").read_text()
    assert "<b>news" not in text
    assert "&lt;b&gt;news" in text
    assert "0.75 [0.7, 0.8]" in Page(text).cells
    assert text.count("<svg") == 3


def test_latents_counted_on_the_device_are_those_counted_plainly() -> None:
    latents = (
        torch.relu(torch.randn(40, 30, generator=torch.Generator().manual_seed(0)))
        * 10.0 ** torch.arange(-6, 9)[torch.arange(30) // 2]
    )
    fast, plain = activity_on_device(latents), activity(latents.numpy())
    for got, expected in zip(fast, plain, strict=True):
        np.testing.assert_allclose(got, expected)


def test_small_parts_give_the_same_as_large_ones(
    store: ActivationStore, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, place = TorchSae(topk(loaded, 0, store.stats(HOOK).mean)), Wiring.parse(HOOK)
    whole = reconstruction(store, place, sae, 3, 20)
    monkeypatch.setattr("sae.evaluation.core.LATENTS_AT_ONCE", 7 * 64)
    parts = reconstruction(store, place, sae, 3, 20)
    assert parts.means() == pytest.approx(whole.means())
    assert parts.intervals(0) == {name: pytest.approx(both) for name, both in whole.intervals(0).items()}
    assert parts.quantiles() == whole.quantiles()
    assert parts.histograms() == whole.histograms()

"""Two SAEs side by side: the routes, and the page."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, expect

from sae.artefact import SaeArtefact
from sae.compare import compare_whole
from sae.config import CompareConfig, IndexConfig
from sae.index_db import write_index
from steer.browser.app import create_app
from steer.browser.guard import Account
from steer.browser.model import SharedModel
from steer.browser.people import single
from steer.browser.sources import open_paths
from steer.listening import LOOPBACK

from .conftest import TOKEN, VOCABULARY, latent_row, serving

D, SAME, NAMES = 16, 12, ("resid_post.1@one", "resid_post.1@other")


def make(folder: Path, name: str, seed: int, n_own: int) -> Path:
    """An index whose SAE shares its first SAME latents with all others."""
    parts = [np.random.default_rng(s).standard_normal((n, D)) for s, n in ((99, SAME), (seed, n_own))]
    W_dec = np.concatenate(parts).astype(np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    metadata = {"hook_point": "resid_post.1", "model": {"id": "tiny", "fingerprint": "f00d"}}
    zeros = np.zeros(len(W_dec), np.float32), np.zeros(D, np.float32)
    artefact = SaeArtefact("topk", W_dec.T.copy(), zeros[0], W_dec, zeros[1], k=4, metadata=metadata)
    artefact.save(folder / "saes" / name)
    sha256 = SaeArtefact.load(folder / "saes" / name).sha256
    info = {"d_sae": len(W_dec), "hook_point": "resid_post.1", "sae_sha256": sha256, "n_tokens": 1000,
            "model": {"id": "tiny", "fingerprint": "f00d"}, "sources": []}  # fmt: skip
    rng = np.random.default_rng(seed)
    write_index(folder / "indexes" / name, info, (latent_row(i, rng) for i in range(len(W_dec))), VOCABULARY)
    IndexConfig(sae=folder / "saes" / name).save(folder / "indexes" / name / "index.yaml")
    return folder / "indexes" / name


@pytest.fixture
def two(tmp_path: Path) -> Path:
    make(tmp_path, "one", 0, 10)
    make(tmp_path, "other", 5, 14)
    return tmp_path / "indexes"


@pytest.fixture
def where(two: Path) -> Iterator[str]:
    ada = single(Account("ada", "admin"), TOKEN)
    with (
        contextlib.closing(open_paths([two])) as opened,
        serving(create_app(opened, ada, LOOPBACK, SharedModel(None))) as where,
    ):
        yield where


@pytest.fixture
def client(where: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=where, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        yield client


def done(client: httpx.Client, one: str = NAMES[0], other: str = NAMES[1]) -> dict[str, Any]:
    answer = client.post("/api/comparison", json={"one": one, "other": other}).json()
    deadline = time.monotonic() + 60
    while answer["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
        answer = client.get("/api/comparison", params={"one": one, "other": other}).json()
    return answer


def pairs(client: httpx.Client, **asked: Any) -> httpx.Response:
    return client.get("/api/comparison/pairs", params={"one": NAMES[0], "other": NAMES[1], **asked})


def test_all_pages_together_are_what_the_comparison_found(client: httpx.Client, two: Path) -> None:
    expected = compare_whole(two / "one", two / "other", CompareConfig())
    answer = done(client)
    assert (answer["state"], answer["summary"]) == ("done", expected.summary)
    for kind, chosen in expected.found.classes.items():
        found: list[dict[str, Any]] = []
        while (page := pairs(client, kind=kind, offset=len(found), limit=5).json())["pairs"]:
            found += page["pairs"]
        assert page["total"] == len(found) == chosen.sum()
        numbers = {(each["one"]["latent"], each["other"]["latent"]) for each in found}
        every = zip(
            expected.kept[0][expected.found.pairs.one], expected.kept[1][expected.found.pairs.other], strict=True
        )
        assert numbers == {pair for pair, is_in in zip(every, chosen, strict=True) if is_in}
        cosines = [each["decoder_cosine"] for each in found]
        assert cosines == sorted(cosines, reverse=True)
    same = [(each["one"]["latent"], each["other"]["latent"]) for each in pairs(client, kind="matched").json()["pairs"]]
    assert sorted(same) == [(i, i) for i in range(SAME)]


def test_what_one_has_alone(client: httpx.Client) -> None:
    done(client)
    here, there = (pairs(client, kind=kind).json() for kind in ("alone", "alone_other"))
    assert {each["one"]["latent"] for each in here["pairs"]} <= set(range(SAME, SAME + 10))
    assert {each["other"]["latent"] for each in there["pairs"]} <= set(range(SAME, SAME + 14))
    assert here["total"] > 0
    assert all(each["other"] is None for each in here["pairs"])


def test_what_cannot_be_compared(client: httpx.Client, two: Path) -> None:
    assert pairs(client, kind="matched").status_code == 400
    assert client.post("/api/comparison", json={"one": "no", "other": NAMES[1]}).status_code == 404
    done(client)
    assert pairs(client, kind="nonsense").json()["detail"]["expected"].startswith("one of matched")
    assert pairs(client, kind="matched", limit=0).status_code == 422
    saved = two.parent / "saes" / "other" / "sae_weights.safetensors"
    saved.write_bytes(saved.read_bytes()[:100])
    answer = done(client, NAMES[1], NAMES[0])
    assert answer["state"] == "failed"
    assert "sae_weights" in answer["problem"]


def test_the_page_shows_pairs_and_their_contexts(chromium: Browser, where: str) -> None:
    page = chromium.new_page(base_url=where)
    page.goto(f"/compare#token={TOKEN}")
    expect(page.get_by_role("row", name="matched 12")).to_be_visible()
    expect(page.locator("tr.pair")).to_have_count(SAME)
    page.get_by_role("button", name="contexts").first.click()
    expect(page.locator("td.side .tokens").first).to_be_visible()
    page.get_by_role("tab", name="alone here").click()
    assert "kind=alone" in page.url
    page.reload()
    expect(page.get_by_role("tab", name="alone here")).to_have_attribute("aria-selected", "true")
    page.get_by_label("Second").select_option(NAMES[0])
    expect(page.get_by_text("One and the same")).to_be_visible()
    page.close()

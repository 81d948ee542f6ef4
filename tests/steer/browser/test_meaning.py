"""Search by meaning, over HTTP and in Chromium, with the real embedding model."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from activations.sentences import SentenceModel
from sae.labels.store import LabelStore, NewLabel
from steer.browser.app import create_app
from steer.browser.guard import Account
from steer.browser.meaning import Meaning
from steer.browser.model import SharedModel
from steer.browser.people import single
from steer.browser.sources import Opened
from steer.listening import LOOPBACK

from .conftest import TOKEN, serving

SOURCE = "resid_post.1"
SAYS = {3: "court rulings, lawsuits", 7: "cooking recipes", 11: "the weather in winter"}


class Counting:
    """The real model, which waits where it is told to."""

    def __init__(self, model: SentenceModel):
        self.fingerprint, self.width, self.query = model.fingerprint, model.width, model.query
        self._model, self.go = model, threading.Event()
        self.go.set()

    def documents(self, texts: Any) -> Any:
        assert self.go.wait(60)
        return self._model.documents(texts)


@pytest.fixture
def model(minilm: SentenceModel) -> Counting:
    return Counting(minilm)


@pytest.fixture
def address(opened: Opened, own_index: Path, model: Any) -> Iterator[str]:
    """A browser with an embedding model, in place of the one without."""
    with LabelStore.open(own_index, "0" * 64, write=True) as store:
        store.add_labels(NewLabel(latent, "explanation", text, "ann") for latent, text in SAYS.items())
    meaning = Meaning(opened, "the real one", "cpu", model)
    own = single(Account("ada", "admin"), TOKEN)
    with serving(create_app(opened, own, LOOPBACK, SharedModel(None), meaning=meaning)) as where:
        yield where
    model.go.set()


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        yield client


@pytest.fixture
def ask(client: httpx.Client) -> Callable[..., Any]:
    def asked(path: str = "/api/latents", **values: Any) -> Any:
        given = {"source": SOURCE, "q": "legal proceedings", "how": "meaning", **values}
        answer = client.get(path, params=given)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return asked


def ready(client: httpx.Client) -> dict[str, Any]:
    state = client.post("/api/meaning", json={"source": SOURCE}).json()
    while state["state"] == "running":
        time.sleep(0.05)
        state = client.get("/api/meaning", params={"source": SOURCE}).json()
    return state


def test_labels_are_ranked_by_what_they_mean(client: httpx.Client, ask: Callable[..., Any]) -> None:
    state = ready(client)
    assert (state["state"], state["n_done"]) == ("ready", state["n_texts"])
    page = ask()
    assert page["rows"][0]["latent"] == 3
    cosines = [row["cosine"] for row in page["rows"]]
    assert cosines == sorted(cosines, reverse=True)
    order = [row["latent"] for row in page["rows"]]
    everywhere = ask(offset=100)["rows"] + page["rows"]
    assert {row["latent"] for row in everywhere} == {*range(0, 300, 2), *range(0, 300, 5), *SAYS}
    assert ask(descending=True, limit=1, offset=page["total"] - 1)["rows"][0]["latent"] == 3
    assert ask("/api/latents/around", latent=3, reach=2)["latents"] == order[:3]
    assert ask(q="how to bake a cake")["rows"][0]["latent"] == 7
    live = ask(show="live", sort="density")
    assert {row["latent"] for row in live["rows"]} <= {latent for latent in range(300) if latent % 10 != 9}
    assert ask(q=" ")["total"] == 300
    assert ask(how="words", q="lawsuits")["rows"][0]["cosine"] is None


def test_a_new_label_is_found_once_it_is_asked_for(
    client: httpx.Client, ask: Callable[..., Any], own_index: Path
) -> None:
    ready(client)
    assert ask(q="violins and cellos")["rows"][0]["latent"] != 20
    with LabelStore.open(own_index, "0" * 64, write=True) as store:
        store.add_labels([NewLabel(20, "explanation", "string instruments of an orchestra", "ann")])
    assert ready(client)["state"] == "ready"
    assert ask(q="violins and cellos")["rows"][0]["latent"] == 20


def test_before_labels_are_read_it_says_so(client: httpx.Client) -> None:
    answer = client.get("/api/latents", params={"source": SOURCE, "q": "law", "how": "meaning"})
    assert answer.status_code == 400
    assert answer.json()["detail"]["fix"] == "Ask for it first: POST /api/meaning."
    assert client.get("/api/meaning", params={"source": SOURCE}).json()["state"] == "not begun"
    assert client.get("/api/meaning", params={"source": "none"}).status_code == 404
    assert client.post("/api/meaning", json={"source": "none"}).status_code == 404


def test_a_model_that_is_not_there_is_one_line(opened: Opened) -> None:
    meaning = Meaning(opened, "wheel:no-such-thing", "cpu")
    own = single(Account("ada", "admin"), TOKEN)
    headers = {"authorization": f"Bearer {TOKEN}"}
    with (
        serving(create_app(opened, own, LOOPBACK, SharedModel(None), meaning=meaning)) as address,
        httpx.Client(base_url=address, headers=headers, timeout=60) as client,
    ):
        state = ready(client)
    assert state["state"] == "failed"
    assert "pip install --no-deps no-such-thing" in state["problem"]
    assert "\n" not in state["problem"]


def test_a_search_by_meaning_in_the_page(page: Page, model: Counting) -> None:
    model.go.clear()
    page.goto("/features")
    page.get_by_label("Search by").select_option("meaning")
    page.get_by_label("Search labels by meaning").fill("legal proceedings")
    expect(page.get_by_role("status").filter(has_text="Reading labels: 0 of")).to_be_visible()
    model.go.set()
    first = page.locator("#row-0")
    expect(first).to_contain_text("court rulings, lawsuits")
    expect(first.locator(".likeness")).to_have_text("0.60")
    assert "how=meaning" in page.url
    page.reload()
    expect(page.locator("#row-0")).to_contain_text("court rulings, lawsuits")
    expect(page.get_by_label("Search by")).to_have_value("meaning")
    page.locator("#row-0 a").click()
    expect(page.locator("article h1")).to_contain_text("3")
    expect(page.get_by_role("link", name="Next latent")).to_be_visible()
    page.keyboard.press("j")
    expect(page).to_have_url(re.compile(r"/(?!3\?)\d+\?.*how=meaning"))
    page.goto("/features?how=meaning&q=legal+proceedings")
    page.get_by_label("Search by").select_option("words")
    expect(page.get_by_text("No latent is like that")).to_be_visible()


def test_a_model_that_fails_is_told_in_the_page(page: Page, model: Counting) -> None:
    def broken(texts: Any) -> Any:
        raise RuntimeError("out of memory")

    model.documents = broken  # type: ignore[method-assign]
    page.goto("/features?how=meaning&q=law")
    expect(page.get_by_role("alert")).to_contain_text("out of memory")
    expect(page.get_by_label("Search labels by meaning")).to_be_visible()

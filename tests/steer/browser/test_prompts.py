"""Running a text: the latents on its tokens are those of the model and the SAE, whoever asks for what."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect

from activations.errors import MismatchError
from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from sae.torch_view import TorchSae
from steer.browser.app import create_app
from steer.browser.guard import Account
from steer.browser.lists import Listing
from steer.browser.model import SharedModel
from steer.browser.people import single
from steer.browser.prompts import ROWS, Prompt, encode, run_prompt
from steer.browser.saes import Saes
from steer.browser.sources import Opened, open_paths
from steer.listening import LOOPBACK
from steer.making.find import read_text

from .conftest import D_SAE, DENSITY, TOKEN, serving, write_run

TEXT = "the cat sat on the mat by 12"


@pytest.fixture(scope="module")
def run(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an SAE of the tiny model and an index that says it is of it."""
    return write_run(tmp_path_factory.mktemp("prompts"), tiny)


@pytest.fixture
def found(run: Path) -> Iterator[Opened]:
    with contextlib.closing(open_paths([run])) as found:
        yield found


@pytest.fixture
def where(found: Opened, tiny: LoadedModel) -> Iterator[str]:
    app = create_app(found, single(Account("ada", "admin"), TOKEN), LOOPBACK, SharedModel("tiny", "cpu", tiny))
    with serving(app) as where:
        yield where


def ran(found: Opened, tiny: LoadedModel, **asked: Any) -> Any:
    source = found.sources["resid_post.1"]
    prompt = Prompt(source=source.name, **{"text": TEXT, **asked})
    return run_prompt(Listing(source.index), source, SharedModel("tiny", "cpu", tiny), Saes(), prompt)


def test_tokens_have_the_latents_that_the_sae_has_there(found: Opened, tiny: LoadedModel, run: Path) -> None:
    answer = ran(found, tiny, a_token=64)
    read = read_text(tiny, SaeArtefact.load(run / "sae"), TEXT)
    counting = [token for token in answer.tokens if token.counts]
    assert not answer.tokens[0].counts
    assert len(counting) == len(read.latents)
    for token, latents in zip(counting, read.latents, strict=True):
        assert token.n_active == int((latents > 0).sum())
        assert [each.latent for each in token.active] == [
            i for i in latents.argsort(descending=True).tolist() if latents[i] > 0
        ]
        assert [each.value for each in token.active] == pytest.approx([float(latents[e.latent]) for e in token.active])
    assert "".join(token.text for token in answer.tokens).strip().endswith("12")
    assert set(answer.names) == {each.latent for token in answer.tokens for each in token.active}


def test_what_is_strong_here_and_rare_elsewhere_comes_first(found: Opened, tiny: LoadedModel, run: Path) -> None:
    answer = ran(found, tiny)
    latents = read_text(tiny, SaeArtefact.load(run / "sae"), TEXT).latents
    score = {i: float(latents[:, i].max()) / (1 + i) * -np.log(DENSITY[i]) for i in range(D_SAE)}
    candidates = [i for i in range(D_SAE) if latents[:, i].max() > 0 and DENSITY[i] <= 0.05]
    assert [each.latent for each in answer.latents] == sorted(candidates, key=lambda i: -score[i])
    assert [each.score for each in answer.latents] == pytest.approx(
        [score[each.latent] for each in answer.latents], rel=1e-4
    )
    assert ran(found, tiny, n=1).latents == answer.latents[:1]


def test_a_few_tokens_at_a_time_are_all_tokens(run: Path) -> None:
    view = TorchSae(SaeArtefact.load(run / "sae"))
    x = torch.randn(3 * ROWS + 1, view.d_model, generator=torch.Generator().manual_seed(0))
    found, latents = encode(view, x, 3), view.encode(x)
    np.testing.assert_allclose(found.peak, latents.max(0).values.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(found.n_tokens, (latents > 0).sum(0).numpy())
    assert len(found.strongest) == len(found.n_active) == len(x)
    assert all(len(each) <= 3 for each in found.strongest)


def test_an_sae_of_another_model_is_refused(found: Opened, tiny: LoadedModel) -> None:
    found.sources["resid_post.1"].index.info["sae_sha256"] = "f" * 64
    with pytest.raises(MismatchError):
        ran(found, tiny)


@pytest.mark.parametrize(
    "body",
    [{}, [], "x", {"text": ""}, {"text": "a" * 9000}, {"text": "x"}, {"text": "\ud800 a b"}, {"text": "word " * 1500},
     {"text": ["a"]}, {"text": None}, *({"text": "a b", **more} for more in (
         {"a_token": 0}, {"n": 10**9}, {"max_density": "NaN"}, {"max_density": 0}, {"source": "../x"}))],
)  # fmt: skip
def test_hostile_bodies_are_refused_with_a_reason(where: str, body: Any) -> None:
    whole = {"source": "resid_post.1", **body} if isinstance(body, dict) else body
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    answer = httpx.post(f"{where}/api/prompt", content=json.dumps(whole), headers=headers, timeout=60)
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()["detail"]) == {"where", "expected", "got", "fix"}


def test_hostile_texts_are_run(where: str) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    for text in ("<script>alert(1)</script>", "a\u202e b\u0000 c", "\x1b[31m red", "e\u0301 \U0001f600 x"):
        body = {"source": "resid_post.1", "text": text}
        answer = httpx.post(f"{where}/api/prompt", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert all(token["text"].isprintable() for token in answer.json()["tokens"])


@pytest.fixture
def own_page(chromium: Browser, where: str) -> Iterator[Page]:
    context = chromium.new_context(base_url=where, viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(f"/#token={TOKEN}")
    page.locator(".who").wait_for()
    yield page
    context.close()


def test_a_text_is_run_a_token_chosen_and_a_latent_opened(own_page: Page) -> None:
    page = own_page
    page.goto("/prompt")
    page.get_by_label("Text to run").fill(TEXT)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Strong here, rare elsewhere")).to_be_visible()
    expect(page).to_have_url(re.compile(r"text=the\+cat"))
    page.get_by_role("heading", name="Tokens").click()
    page.keyboard.press("j")
    expect(page.get_by_role("heading", name="Active on")).to_be_visible()
    expect(page.locator(".piece.at")).to_have_count(1)
    page.reload()
    expect(page.get_by_role("heading", name="Active on")).to_be_visible()
    page.locator(".others a").first.click()
    expect(page.locator("h1")).to_contain_text("resid_post.1")
    page.go_back()
    expect(page.get_by_role("heading", name="Active on")).to_be_visible()
    page.get_by_role("heading", name="Tokens").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("heading", name="Strong here, rare elsewhere")).to_be_visible()


def test_a_text_that_is_too_short_is_explained(own_page: Page) -> None:
    own_page.goto("/prompt?text=a")
    expect(own_page.get_by_role("alert")).to_contain_text("a token beyond the first")


def test_without_a_model_it_says_what_to_do(page: Page) -> None:
    page.goto("/prompt")
    expect(page.get_by_role("heading", name="There is no model to run a text through")).to_be_visible()

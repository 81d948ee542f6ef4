"""The bench in Chromium: add, slide, write, change mid-way, open the link again, save."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from activations.models import LoadedModel
from steer.browser.app import create_app
from steer.browser.guard import Account
from steer.browser.model import SharedModel
from steer.browser.people import single
from steer.browser.serve import LOOPBACK
from steer.browser.sources import Opened
from steer.library import load_library, save_library
from steer.vectors import SteeringVector
from tests.steer.browser.conftest import SCREENSHOTS, TOKEN, serving


@pytest.fixture
def library(tmp_path: Path, pushing: SteeringVector) -> Path:
    save_library(tmp_path / "library", [pushing])
    return tmp_path / "library"


@pytest.fixture
def address(library: Path, tiny: LoadedModel) -> Iterator[str]:
    shared = SharedModel(tiny.id, "cpu", tiny)
    with serving(create_app(Opened({}, (library,)), single(Account("ada", "admin"), TOKEN), LOOPBACK, shared)) as where:
        yield where


def written(page: Page) -> str:
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".bench [role=status]").first).to_contain_text("done", timeout=30_000)
    return page.locator("[data-row=steered]").text_content() or ""


def test_a_basket_is_written_changed_shared_and_saved(page: Page, library: Path) -> None:
    page.goto("/bench")
    page.get_by_label("Add a vector").fill("push")
    page.get_by_role("button", name="Add", exact=True).click()
    slider = page.get_by_label("Dose of 0/push")
    slider.fill("0.5")
    page.get_by_label("Prompt").fill("the river")
    page.get_by_label("chat").uncheck()
    page.get_by_label("Tokens").fill("20")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Seed").blur()
    first, link = written(page), page.url
    assert first
    page.goto("/features")
    page.goto(link)
    assert written(page) == first
    page.get_by_label("Tokens").fill("400")
    page.get_by_label("Tokens").blur()
    page.get_by_role("button", name="Run").click()
    page.locator("[data-row=steered]").wait_for()
    slider.fill("1.25")
    page.locator("[data-row=steered] mark").first.wait_for(state="attached", timeout=10_000)
    page.keyboard.press("Escape")
    expect(page.locator(".bench [role=status]").first).to_contain_text("stopped")
    page.get_by_label("Name to save as").fill("found")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved found.").wait_for()
    assert load_library(library)["found"].coefficient == pytest.approx(10.0)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for theme in ("light", "dark"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
        page.screenshot(path=SCREENSHOTS / f"bench-{theme}.png")

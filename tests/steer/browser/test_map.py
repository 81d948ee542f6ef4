"""The picture of all latents: its bytes, and how it is used."""

import re

import httpx
import numpy as np
import pytest
from playwright.sync_api import Page, expect

from steer.browser.sources import Opened

from .conftest import N_LATENTS, TOKEN

HEADERS = {"authorization": f"Bearer {TOKEN}"}


def test_places_and_densities_are_those_of_the_index(address: str, opened: Opened) -> None:
    answer = httpx.get(f"{address}/api/map", params={"source": "resid_post.1"}, headers=HEADERS)
    values = np.frombuffer(answer.content, "<f4")
    index = opened.source("resid_post.1").index
    np.testing.assert_array_equal(values[: 2 * N_LATENTS].reshape(-1, 2), index.map())
    np.testing.assert_array_equal(values[2 * N_LATENTS :], index.columns()["density"])
    assert answer.headers["x-saekit-map"] == "pca"
    assert len(np.unique(index.map())) > N_LATENTS


@pytest.mark.parametrize("source", ["nothing", "../x", ""])
def test_another_source_is_not_found(address: str, source: str) -> None:
    answer = httpx.get(f"{address}/api/map", params={"source": source}, headers=HEADERS)
    assert (answer.status_code, answer.json()["detail"]["where"]) == (404, "source")


def lie(page: Page, opened: Opened, latent: int) -> tuple[float, float]:
    """Where a latent is on the canvas, as map.js lays them out."""
    box = page.locator("canvas").bounding_box()
    assert box is not None
    scale = 0.94 * min(round(box["width"]), round(box["height"])) / 2
    x, y = opened.source("resid_post.1").index.map()[latent]
    return round(box["width"]) / 2 + float(x) * scale, round(box["height"]) / 2 + float(y) * scale


def lonely(opened: Opened) -> int:
    """The latent that is farthest from all others."""
    places = opened.source("resid_post.1").index.map()
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    return int(distance.min(axis=1).argmax())


def test_a_click_opens_what_lies_there_and_a_drag_does_not(page: Page, opened: Opened) -> None:
    page.get_by_role("link", name="Map").click()
    canvas = page.locator("canvas")
    expect(page.get_by_text(f"{N_LATENTS} latents, laid out by principal components")).to_be_visible()
    latent = lonely(opened)
    x, y = lie(page, opened, latent)
    canvas.hover(position={"x": x + 1, "y": y})
    expect(page.locator(".map-tip strong")).to_have_text(str(latent))
    before = canvas.screenshot()
    page.mouse.down()
    page.mouse.move(600, 500, steps=4)
    page.mouse.up()
    assert page.url.endswith("/map")
    assert canvas.screenshot() != before
    canvas.focus()
    page.keyboard.press("0")
    canvas.click(position={"x": x + 1, "y": y})
    page.wait_for_url(f"**/feature/resid_post.1/{latent}")


def test_zooming_keeps_what_is_under_the_pointer(page: Page, opened: Opened) -> None:
    page.goto("/map")
    page.locator("canvas").wait_for()
    latent = lonely(opened)
    x, y = lie(page, opened, latent)
    page.locator("canvas").hover(position={"x": x, "y": y})
    page.mouse.wheel(0, -300)
    page.locator("canvas").hover(position={"x": x + 2, "y": y})
    expect(page.locator(".map-tip strong")).to_have_text(str(latent))


def test_keys_alone_find_and_open_a_latent(page: Page, opened: Opened) -> None:
    page.goto("/map")
    places = opened.source("resid_post.1").index.map()
    page.locator("canvas").focus()
    page.keyboard.press("0")
    middle = page.locator(".map-tip strong")
    expect(middle).to_have_text(str(int(np.linalg.norm(places, axis=1).argmin())))
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    latent = int(np.linalg.norm(places - np.array([0.6, 0]), axis=1).argmin())
    expect(middle).to_have_text(str(latent))
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(f"/feature/resid_post.1/{latent}$"))

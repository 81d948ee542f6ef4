"""Whether the page can be read and used by everybody: contrast of both themes, names and roles, order of focus."""

import re
from itertools import product

import pytest
from playwright.sync_api import Page, expect

from steer.browser.app import STATIC

CSS = (STATIC / "style.css").read_text()
WORDS, GROUNDS = ("ink", "faint", "accent", "good", "bad", "warn"), ("ground", "raised")
LEAST = 4.5
"""contrast of text, WCAG 2.2 AA"""


def themes() -> dict[str, dict[str, str]]:
    """Variables by theme; the dark ones are written twice, which has to be the same."""
    light, system, dark = (dict(re.findall(r"--([\w-]+):\s*([^;]+);", block)) for block in re.findall(
        r"^\s*:root[^{]*\{(.*?)\}", CSS, re.S | re.M))  # fmt: skip
    assert system == dark
    return {"light": light, "dark": {**light, **dark}}


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def rgb(value: str) -> tuple[float, ...]:
    return tuple(int(value.lstrip("#")[i : i + 2], 16) for i in (0, 2, 4))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_told_from_its_ground(theme: str) -> None:
    colours = themes()[theme]
    for word, ground in product(WORDS, GROUNDS):
        assert contrast(rgb(colours[word]), rgb(colours[ground])) >= LEAST, (word, ground)
    assert contrast(rgb(colours["accent-ink"]), rgb(colours["accent"])) >= LEAST
    heat = [float(part) for part in colours["heat-colour"].split(",")]
    most = float(colours["heat-most"])
    marked = tuple(most * h + (1 - most) * g for h, g in zip(heat, rgb(colours["ground"]), strict=True))
    assert contrast(rgb(colours["ink"]), marked) >= LEAST


NAMED = "button, a[href], input, select, textarea, summary, [role=img], [role=grid]"
NAMELESS = """(named) => [...document.querySelectorAll(named)].filter((e) => e.checkVisibility()
  && !(e.getAttribute('aria-label') ?? '').trim() && !e.textContent.trim() && !e.labels?.length)
  .map((e) => e.outerHTML)"""
ORPHANS = """() => {
  const all = (which) => [...document.querySelectorAll(which)];
  return [...all('[role=row]').filter((e) => !e.closest('[role=grid]')),
    ...all('[role=gridcell], [role=columnheader]').filter((e) => !e.closest('[role=row]')),
    ...all('[role=listitem]').filter((e) => !e.parentElement.matches('[role=list]'))].map((e) => e.outerHTML);
}"""
FOCUSED = """() => document.activeElement.getAttribute('aria-label')
  ?? document.activeElement.textContent.trim().slice(0, 12)"""


@pytest.mark.parametrize(
    "path",
    ["/features", "/feature/resid_post.1/15", "/feature/resid_post.1/9", "/map", "/compare", "/label", "/prompt",
     "/bench"],
)  # fmt: skip
def test_everything_has_a_name_and_a_place(page: Page, path: str) -> None:
    page.goto(path)
    expect(page.locator("#row-5, article.feature .panel, main h1, main h2, main canvas").first).to_be_visible()
    page.wait_for_load_state("networkidle")
    assert page.evaluate(NAMELESS, NAMED) == []
    assert page.evaluate(ORPHANS) == []
    assert page.locator("main").count() == 1
    ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_the_grid_says_which_row_is_chosen(page: Page) -> None:
    page.goto("/features")
    grid = page.get_by_role("grid", name="Latents")
    expect(page.locator("#row-0")).to_be_visible()
    page.keyboard.press("j")
    expect(grid).to_have_attribute("aria-activedescendant", "row-1")
    expect(grid).to_have_attribute("aria-rowcount", "301")
    expect(page.locator("#row-1")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#row-1")).to_have_attribute("aria-rowindex", "3")


def test_focus_goes_from_the_top_to_the_list(page: Page) -> None:
    page.goto("/features")
    expect(page.locator("#row-0")).to_be_visible()
    seen: list[str] = []
    for _ in range(25):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUSED))
        if seen[-1] == "Latents":
            break
    assert seen[-1] == "Latents"
    assert seen.index("saekit") < seen.index("Features") < seen.index("Search labels and words") < seen.index("Latents")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_nothing_is_wider_than_a_narrow_window(page: Page) -> None:
    page.set_viewport_size({"width": 800, "height": 900})
    for path in ("/features", "/feature/resid_post.1/10", "/prompt"):
        page.goto(path)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 800

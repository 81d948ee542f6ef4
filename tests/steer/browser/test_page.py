"""The page as a whole, in Chromium."""

import re

from playwright.sync_api import Browser, Page, expect

from steer.browser.app import STATIC

from .conftest import TOKEN


def test_the_token_leaves_the_address(page: Page) -> None:
    expect(page.locator(".who")).to_have_text("ada")
    assert TOKEN not in page.url
    page.reload()
    expect(page.locator(".who")).to_have_text("ada")


def test_without_a_token_it_asks_for_one(chromium: Browser, address: str) -> None:
    context = chromium.new_context(base_url=address)
    page = context.new_page()
    page.goto("/feature/resid_post.1/3")
    page.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("expected a token that is known")
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator(".who")).to_have_text("ada")
    context.close()


def test_a_theme_is_kept(page: Page) -> None:
    page.get_by_title("Light or dark").click()
    page.get_by_title("Light or dark").click()
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(20, 23, 28)"


def test_the_modules_of_the_first_page_are_asked_for_at_once() -> None:
    """Else each waits for the one that imports it: a round trip a step."""
    found, todo = set[str](), ["main.js", "features.js"]
    while todo:
        name = todo.pop()
        found.add(name)
        imported = re.findall(r'^import .* from "\./(.+)";$', (STATIC / name).read_text(), re.M)
        todo += [each for each in imported if each not in found]
    named = re.findall(r'(?:modulepreload" href|src)="/static/(.+\.js)"', (STATIC / "index.html").read_text())
    assert sorted(named) == sorted(found)

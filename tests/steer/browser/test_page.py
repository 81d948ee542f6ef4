"""The page as a whole, in Chromium."""

from playwright.sync_api import Browser, Page, expect

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

"""A folder of pages that opens without a server."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from activations.errors import ConfigError, UnknownNameError
from steer.browser.export import export_site
from steer.browser.sources import Opened

from .conftest import HOSTILE


def test_it_opens_from_the_disk_and_its_links_lead_somewhere(chromium: Browser, opened: Opened, tmp_path: Path) -> None:
    done = export_site(opened, tmp_path / "site")
    pages = list((tmp_path / "site").rglob("*.html"))
    assert done == {"out": str(tmp_path / "site"), "pages": len(pages)}
    assert len(pages) == 1 + 60, "every fifth of 300 is explained"
    page = chromium.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: request.url.startswith("file://") or problems.append(request.url))
    page.goto((tmp_path / "site" / "index.html").as_uri())
    assert page.evaluate("getComputedStyle(document.querySelector('table')).borderTopStyle") == "solid"
    page.get_by_role("link", name="10", exact=True).click()
    expect(page.locator("h1")).to_contain_text("10")
    expect(page.get_by_text(HOSTILE[:20]).first).to_be_visible()
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.token.peak')).backgroundColor") != "rgba(0, 0, 0, 0)"
    )
    page.get_by_role("link", name="All features").click()
    expect(page.locator("tbody tr")).to_have_count(60)
    page.close()
    assert problems == []


def test_latents_by_number(opened: Opened, tmp_path: Path) -> None:
    assert export_site(opened, tmp_path / "site", [3, 9])["pages"] == 3
    text = (tmp_path / "site" / "resid_post.1" / "9.html").read_text()
    assert "never active" in text
    assert "<script" not in text
    with pytest.raises(UnknownNameError, match="latent 300"):
        export_site(opened, tmp_path / "other", [300])
    assert [each.name for each in tmp_path.glob("*other*")] + [each.name for each in tmp_path.glob(".*")] == []


def test_nothing_is_overwritten(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    with pytest.raises(ConfigError, match="not there yet"):
        export_site(opened, tmp_path / "site")
    with pytest.raises(ConfigError, match="libraries alone"):
        export_site(Opened({}, ()), tmp_path / "other")

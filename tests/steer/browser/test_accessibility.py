"""Every page for everybody: the rules of axe-core (WCAG 2.2 AA and best practice), light and dark, and keys alone."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from activations.models import LoadedModel
from steer.browser.app import create_app
from steer.browser.export import export_site
from steer.browser.guard import Account
from steer.browser.meaning import Meaning
from steer.browser.model import SharedModel
from steer.browser.sources import open_paths
from steer.browser.team import Team, sqlite_url
from steer.library import save_library
from steer.listening import LOOPBACK
from steer.vectors import SteeringVector

from .conftest import SCREENSHOTS, TOKEN, serving, write_run
from .test_comparisons import NAMES, make

INDEX, RUN = "resid_post.1@index", "resid_post.1@run"
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
REACHED = (
    "a[href], button:not(:disabled), input:not([type=hidden]):not(:disabled), select, textarea, summary, [tabindex]"
)
UNREACHED = """(which) => [...document.querySelectorAll(which)].filter((e) => e.checkVisibility() && e.tabIndex >= 0
  && !e.closest("details:not([open]) > :not(summary)") && !e.dataset.reached).map((e) => e.outerHTML.slice(0, 200))"""
STEP = """() => {
  const at = document.activeElement;
  if (at === document.body) return "";
  if (at.dataset.reached) return null;
  at.dataset.reached = "1";
  const { outlineStyle, outlineWidth } = getComputedStyle(at);
  return outlineStyle !== "none" && parseFloat(outlineWidth) >= 2 ? "" : at.outerHTML.slice(0, 200);
}"""


def answered(page: Page) -> None:
    page.get_by_label("Text to run").fill("the river and the mill")
    page.get_by_role("button", name="Run").click()
    page.locator(".pieces button").first.click()
    expect(page.get_by_role("heading", name="Active on")).to_be_visible()


def compared(page: Page) -> None:
    page.get_by_role("button", name="contexts").first.click()
    expect(page.locator(".side").first).to_be_visible()


def steered(page: Page) -> None:
    for name in ("push", "up"):
        page.get_by_label("Add a vector").fill(f"0/{name}")
        page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_label("Prompt").fill("the river")
    page.get_by_label("Tokens").fill("4")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator(".bench > .panel:last-child [role=status]")).to_contain_text("done", timeout=30_000)
    expect(page.get_by_role("heading", name="Together")).to_be_visible()


def opened_bounds(page: Page) -> None:
    page.get_by_text("Bounds").click()


def asked_number(page: Page) -> None:
    expect(page.locator("#row-0")).to_be_visible()
    page.keyboard.press("g")
    expect(page.get_by_role("dialog")).to_be_visible()


def added_person(page: Page) -> None:
    page.get_by_label("Name").fill(f"grace {page.locator('tbody tr').count()}")
    page.get_by_role("button", name="Add").click()
    expect(page.get_by_text("It is shown once")).to_be_visible()


def nothing(page: Page) -> None:
    pass


PAGES: dict[str, tuple[str, str, Callable[[Page], None]]] = {
    "list": (f"/features?source={INDEX}&where=density:0:0.5", "#row-5", opened_bounds),
    "search": (f"/features?source={INDEX}&q=zebra", ".empty", nothing),
    "number": (f"/features?source={INDEX}", "#row-5", asked_number),
    "feature": (f"/feature/{INDEX}/15", "article .panel", nothing),
    "dead": (f"/feature/{INDEX}/9", "article .panel", nothing),
    "map": (f"/map?source={INDEX}", "main canvas", nothing),
    "compare": (f"/compare?one={NAMES[0]}&other={NAMES[1]}", "table.pairs", compared),
    "same": (f"/compare?one={INDEX}&other={INDEX}", ".empty", nothing),
    "sessions": (f"/label?source={INDEX}", "table.sessions", nothing),
    "desk": (f"/label/{INDEX}/1", ".label-box textarea", nothing),
    "agreement": (f"/label/{INDEX}/1/agreement", ".case", nothing),
    "prompt": (f"/prompt?source={RUN}", "textarea", answered),
    "bench": ("/bench", "textarea", steered),
    "people": ("/people", "h1", added_person),
    "lost": ("/nothing/here", ".empty", nothing),
    "refused": ("/features?where=x", "[role=alert]", nothing),
}


@pytest.fixture(scope="module")
def where_all(
    index_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny: LoadedModel, pushing: SteeringVector
) -> Iterator[str]:
    """A browser with something on every page."""
    folder = tmp_path_factory.mktemp("everything")
    shutil.copytree(index_path, folder / "index")
    write_run(folder / "run", tiny)
    (folder / "run" / "index").rename(folder / "run" / "run")
    make(folder, "one", 0, 10)
    make(folder, "other", 5, 14)
    save_library(folder / "library", [pushing, replace(pushing, name="up", hook_point="resid_post.1")])
    accounts = sqlite_url(folder / "accounts.sqlite")
    paths = [folder / "index", folder / "run", folder / "indexes", folder / "library"]
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(contextlib.closing(Team(accounts, Account("ada", "admin"), TOKEN)))
        found = stack.enter_context(contextlib.closing(open_paths(paths)))
        model, meaning = SharedModel(tiny.id, "cpu", tiny), Meaning(found, "none")
        app = create_app(found, team.account_of, LOOPBACK, model, team, meaning=meaning)
        where = stack.enter_context(serving(app))
        disagree(where, team.add("bob", "annotator"))
        yield where


def disagree(where: str, token: str) -> None:
    """Two people label latent 3 of a session, each in words of their own."""
    session = {"source": INDEX, "name": "first look", "kind": "random", "annotators_per_latent": 2}
    for who, text in ((TOKEN, "weirs"), (token, "mills")):
        with httpx.Client(base_url=where, headers={"authorization": f"Bearer {who}"}) as client:
            if who == TOKEN:
                assert client.post("/api/label/sessions", json=session).status_code == 201
            event = {"source": INDEX, "session": 1, "latent": 3, "action": "edit", "text": text, "key": text}
            answer = client.post("/api/label/events", json=event)
            assert answer.status_code < 300, answer.text


@pytest.fixture(scope="module", params=["light", "dark"])
def themed(request: pytest.FixtureRequest, chromium: Browser, where_all: str) -> Iterator[tuple[str, Page]]:
    """A page that is logged in, in a theme."""
    context = chromium.new_context(
        base_url=where_all, color_scheme=request.param, viewport={"width": 1280, "height": 800}
    )
    page = context.new_page()
    page.goto(f"/#token={TOKEN}")
    page.locator(".who").wait_for()
    yield request.param, page
    context.close()


def visit(page: Page, name: str) -> None:
    path, there, act = PAGES[name]
    page.goto(path)
    expect(page.locator(there).first).to_be_visible(timeout=30_000)
    page.wait_for_load_state("networkidle")
    act(page)


def broken(page: Page) -> list[str]:
    """Rules that do not hold, and of what."""
    found: Any = Axe().run(page, options=RULES).response["violations"]
    return [f"{each['id']}: {node['target']} {node['html'][:150]} {node['failureSummary']}"
            for each in found for node in each["nodes"]]  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_no_rule_is_broken(themed: tuple[str, Page], name: str) -> None:
    theme, page = themed
    visit(page, name)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"page-{name}-{theme}.png")
    assert broken(page) == []


@pytest.mark.parametrize("themed", ["light"], indirect=True)
@pytest.mark.parametrize("name", PAGES)
def test_everything_is_reached_with_the_tab_key_and_shows_it(themed: tuple[str, Page], name: str) -> None:
    _, page = themed
    visit(page, name)
    page.evaluate("document.activeElement.blur()")
    unmarked = []
    for _ in range(400):
        page.keyboard.press("Tab")
        if (said := page.evaluate(STEP)) is None:
            break
        unmarked += [said] if said else []
    assert unmarked == []
    assert page.evaluate(UNREACHED, REACHED) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_that_need_no_server(chromium: Browser, index_path: Path, tmp_path: Path, theme: Any) -> None:
    with contextlib.closing(open_paths([index_path])) as opened:
        export_site(opened, tmp_path / "site", [9, 10, 15])
    context = chromium.new_context(color_scheme=theme)
    page = context.new_page()
    for name in ("index", "resid_post.1/10", "resid_post.1/9"):
        page.goto((tmp_path / "site" / f"{name}.html").as_uri())
        page.screenshot(path=SCREENSHOTS / f"page-site-{name.replace('/', '-')}-{theme}.png")
        assert broken(page) == []
    context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_way_in(chromium: Browser, where_all: str, theme: Any) -> None:
    context = chromium.new_context(base_url=where_all, color_scheme=theme)
    page = context.new_page()
    page.goto("/")
    expect(page.get_by_label("Token")).to_be_focused()
    page.screenshot(path=SCREENSHOTS / f"page-login-{theme}.png")
    assert broken(page) == []
    context.close()

"""The bench in Chromium: what is in the basket, texts that are written under it, links that write them again."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from activations.models import LoadedModel
from steer.browser import bench_runs
from steer.browser.app import create_app
from steer.browser.guard import Account
from steer.browser.model import SharedModel
from steer.browser.people import single
from steer.browser.sources import Opened, open_paths
from steer.generate import generate
from steer.library import find_vectors, load_library, save_library
from steer.listening import LOOPBACK
from steer.operations import Intervention
from steer.vectors import SteeringVector
from tests.steer.browser.conftest import SCREENSHOTS, TOKEN, serving, write_run


@pytest.fixture
def library(tmp_path: Path, tiny: LoadedModel, pushing: SteeringVector, vector: SteeringVector) -> Path:
    """In a folder with an index and its SAE, another library, and one that is damaged."""
    write_run(tmp_path, tiny)
    bounded = replace(pushing, name="bounded", coefficient=2.0, window=(1.0, 3.0))
    save_library(tmp_path / "library", [pushing, vector, bounded])
    save_library(tmp_path / "second", [])
    save_library(tmp_path / "broken", [])
    (tmp_path / "broken" / "manifest.json").write_text("{")
    return tmp_path / "library"


@pytest.fixture
def address(library: Path, tiny: LoadedModel) -> Iterator[str]:
    shared = SharedModel(tiny.id, "cpu", tiny)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(contextlib.closing(open_paths([library.parent])))
        app = create_app(opened, single(Account("ada", "admin"), TOKEN), LOOPBACK, shared)
        yield stack.enter_context(serving(app))


@pytest.fixture
def bench(page: Page) -> Page:
    """The bench, with a prompt of few tokens."""
    page.goto("/bench")
    page.get_by_label("Prompt").fill("the river")
    page.get_by_label("chat").uncheck()
    page.get_by_label("Tokens").fill("20")
    page.get_by_label("Seed").fill("3")
    return page


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts take a while, as those of a larger model, so that something can be done meanwhile."""
    gates = bench_runs._gates

    def slow(steered: Any) -> Any:
        time.sleep(0.01)
        return gates(steered)

    monkeypatch.setattr(bench_runs, "_gates", slow)


def add(page: Page, name: str) -> Locator:
    """Put it into the basket; gives its item."""
    before = page.locator(".item").count()
    page.get_by_label("Add a vector").fill(name)
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator(".item")).to_have_count(before + 1)
    return page.locator(".item").nth(before)


def status(page: Page) -> Locator:
    return page.locator(".bench > .panel:last-child [role=status]")


def written(page: Page, button: str = "Run") -> str:
    page.get_by_role("button", name=button, exact=True).click()
    expect(status(page)).to_contain_text("done", timeout=30_000)
    return page.locator("[data-row=steered]").text_content() or ""


def begin(page: Page, tokens: int = 400) -> None:
    """Write a text that is long enough to do something meanwhile."""
    page.get_by_label("Tokens").fill(str(tokens))
    page.get_by_role("button", name="Run").click()
    page.locator("[data-row=steered]").wait_for()


def look(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for theme in ("light", "dark"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
        page.screenshot(path=SCREENSHOTS / f"{name}-{theme}.png", full_page=True)


def test_a_basket_is_written_changed_shared_and_saved(bench: Page, library: Path) -> None:
    add(bench, "push")
    slider = bench.get_by_label("Dose of 1/push")
    slider.fill("0.5")
    bench.wait_for_url(lambda url: "push" in url and "0.5" in url)  # it is told with a delay
    first, link = written(bench), bench.url
    assert first
    bench.goto("/features")
    bench.goto(link)
    assert written(bench) == first
    begin(bench)
    slider.fill("1.25")
    bench.locator("[data-row=steered] mark").first.wait_for(state="attached", timeout=10_000)
    bench.keyboard.press("Escape")
    expect(status(bench)).to_contain_text("stopped")
    bench.get_by_label("Library").select_option("1")
    bench.get_by_label("Name to save as").fill("found")
    bench.get_by_role("button", name="Save").click()
    bench.get_by_text("Saved found.").wait_for()
    assert load_library(library)["found"].coefficient == pytest.approx(10.0)
    add(bench, "found")
    look(bench, "bench")


def test_a_link_writes_a_text_again_with_its_changes(bench: Page) -> None:
    add(bench, "push")
    bench.get_by_label("Dose of 1/push").fill("0")
    begin(bench, 120)
    bench.get_by_label("Dose of 1/push").fill("1")
    bench.locator("[data-row=steered] mark").first.wait_for(state="attached", timeout=10_000)
    expect(status(bench)).to_contain_text("done", timeout=30_000)
    bench.wait_for_url(lambda url: "changes" in url)
    changed, link = bench.locator("[data-row=steered]").text_content(), bench.url
    bench.goto("/features")
    bench.goto(link)
    expect(bench.get_by_label("Dose of 1/push")).to_have_value("0")
    assert written(bench, "Replay") == changed
    assert bench.url == link
    expect(bench.get_by_label("Dose of 1/push")).to_have_value("1")
    assert written(bench) != changed
    expect(bench.get_by_role("button", name="Replay")).to_have_count(0)
    expect(bench).not_to_have_url(link)


def test_a_basket_that_changes_leaves_the_run_that_goes_on(bench: Page) -> None:
    add(bench, "push")
    begin(bench)
    up = add(bench, "up")
    bench.locator("[data-says=detached]").wait_for()
    bench.get_by_label("Dose of 1/push").fill("1")
    bench.locator("[data-row=steered] mark").first.wait_for(state="attached", timeout=10_000)
    up.get_by_label("Dose of").fill("0.3")
    bench.get_by_label("Remove 1/push").click()
    expect(bench.locator(".item")).to_have_count(1)
    length = len(bench.locator("[data-row=steered]").text_content() or "")
    expect(status(bench)).to_contain_text("done", timeout=60_000)
    assert len(bench.locator("[data-row=steered]").text_content() or "") > length
    expect(bench.locator(".problem", has_text="broken")).to_have_count(1)
    expect(bench.locator(".problem")).to_have_count(1)
    expect(bench.locator("[data-says=detached]")).to_have_count(0)
    bench.get_by_label("Tokens").fill("20")
    written(bench)
    bench.wait_for_url(lambda url: "changes" not in url)


def test_tokens_are_marked_where_a_gate_is_open(bench: Page, tiny: LoadedModel, pushing: SteeringVector) -> None:
    item = add(bench, "push")
    bench.get_by_label("Dose of 1/push").fill("0.5")
    item.get_by_label("gate above").fill("0.3")
    item.get_by_label("shut at").fill("0.1")
    item.get_by_label("for at least").fill("3")
    bench.get_by_label("Temperature").fill("0")
    text = written(bench)
    rows = [[Intervention.of(pushing, 4.0, gate=pushing.energy_gate(0.3, 0.1, 3))], []]
    assert text == generate(tiny, ["the river"] * 2, max_new_tokens=20, temperature=0.0, rows=rows)[0]
    row = bench.locator("[data-row=steered]")
    assert 0 < row.locator(".open").count() < row.locator(".gated").count()
    assert "1 push: 0." in (row.locator(".open").first.get_attribute("title") or "")
    assert bench.locator("[data-row=unsteered] .open").count() == 0
    item.get_by_label("shut at").fill("0.4")
    expect(item.locator(".problem")).to_contain_text("off <= on")
    look(bench, "bench-gates")


def test_a_scope_is_chosen_and_refused_at_its_item(bench: Page, tiny: LoadedModel, pushing: SteeringVector) -> None:
    item = add(bench, "push")
    bench.get_by_label("Dose of 1/push").fill("0.5")
    bench.get_by_label("Temperature").fill("0")
    item.get_by_label("Scope").select_option("generated")
    item.get_by_label("from").fill("8")
    item.get_by_label("to", exact=True).fill("14")
    used = replace(pushing, coefficient=4.0, scope="generated after:8 before:14")
    rows = [[Intervention.of(used)], []]
    assert written(bench) == generate(tiny, ["the river"] * 2, max_new_tokens=20, temperature=0.0, rows=rows)[0]
    item.get_by_label("Scope").select_option("thinking")
    expect(item.locator(".problem")).to_contain_text("thinking markers")
    bench.get_by_role("button", name="Run").click()
    expect(status(bench)).to_contain_text("failed")
    expect(bench.locator(".problem", has_text="thinking markers")).to_have_count(1)


def test_a_dose_beyond_the_window_has_to_be_forced(bench: Page) -> None:
    item = add(bench, "bounded")
    slider = bench.get_by_label("Dose of 1/bounded")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("-0.375", "0.375")
    item.get_by_label("in figures").fill("1.0")
    expect(item.locator(".problem")).to_contain_text("calibrated window")
    expect(item.locator(".warn")).to_contain_text("outside")
    bench.get_by_label("force").check()
    expect(item.locator(".problem")).to_have_count(0)
    assert written(bench)


def test_a_latent_is_an_item_and_kept_with_a_vector_under_one_name(bench: Page, library: Path) -> None:
    add(bench, "resid_post.1:7")
    add(bench, "push")
    expect(bench.locator(".cosines td")).to_have_count(6)
    bench.get_by_label("Library").select_option(label=f"{library.parent.name}/second")
    expect(bench.get_by_label("Library").locator("option")).to_have_count(2)
    bench.get_by_label("Name to save as").fill("both")
    bench.get_by_role("button", name="Save").click()
    bench.get_by_text("Saved both.").wait_for()
    latent, push = find_vectors(library.parent / "second", "both")
    assert (latent.hook_point, latent.coefficient, latent.source["latent"]) == ("resid_post.1", 2.0, 7)
    assert push.hook_point == "resid_post.3"
    assert written(bench)


def test_a_latent_that_comes_late_takes_nothing_back(bench: Page) -> None:
    asked: list[Route] = []
    bench.route("**/api/bench/latent*", lambda route: asked.append(route))
    bench.get_by_label("Add a vector").fill("resid_post.1:7")
    with bench.expect_request("**/api/bench/latent*"):
        bench.get_by_role("button", name="Add", exact=True).click()
    bench.get_by_label("Prompt").fill("the other river")
    asked[0].continue_()
    expect(bench.locator(".item")).to_have_count(1)
    expect(bench.get_by_label("Prompt")).to_have_value("the other river")


def test_what_is_not_there_is_told_and_what_is_there_is_offered(bench: Page) -> None:
    bench.get_by_label("Add a vector").fill("nothing")
    bench.get_by_role("button", name="Add", exact=True).click()
    expect(bench.locator(".problem", has_text="nothing: expected a vector")).to_have_count(1)
    bench.get_by_role("button", name="bounded").click()
    expect(bench.get_by_label("Dose of 1/bounded")).to_have_count(1)


def test_a_library_by_itself_begins_with_the_bench(chromium: Browser, library: Path, tiny: LoadedModel) -> None:
    app = create_app(
        Opened({}, (library,)), single(Account("ada", "admin"), TOKEN), LOOPBACK, SharedModel(None, "cpu", tiny)
    )
    with serving(app) as where, contextlib.closing(chromium.new_context(base_url=where)) as context:
        page = context.new_page()
        page.goto(f"/#token={TOKEN}")
        add(page, "push")
        expect(page.get_by_role("link", name="Bench")).to_have_attribute("aria-current", "page")


def test_what_is_typed_stays_while_a_text_is_written(bench: Page) -> None:
    add(bench, "push")
    begin(bench)
    field = bench.get_by_label("Temperature")
    field.fill("")
    bench.wait_for_timeout(500)
    expect(field).to_have_value("")
    field.press_sequentially("1.25", delay=100)
    expect(field).to_have_value("1.25")
    bench.keyboard.press("Escape")


def test_a_group_has_one_slider(page: Page, library: Path, pushing: SteeringVector, vector: SteeringVector) -> None:
    group = [replace(vector, name="calm@resid_post.1"), replace(pushing, name="calm@resid_post.3", coefficient=2.0)]
    save_library(library, [*load_library(library).values(), *group])
    page.goto("/bench")
    item = add(page, "1/calm")
    expect(item.locator("bdi")).to_have_text("calm")
    expect(item).to_contain_text("resid_post.1, resid_post.3")
    expect(item.get_by_role("slider")).to_have_count(1)
    page.get_by_label("Name to save as").fill("calmer")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("Saved calmer.")).to_be_visible()
    assert {"calmer@resid_post.1", "calmer@resid_post.3"} <= set(load_library(library))

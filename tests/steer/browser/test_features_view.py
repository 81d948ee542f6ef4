"""The list and the page of a latent, in Chromium, with keys alone where a mouse is not needed."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from sae.annotation.events import NewEvent
from sae.annotation.store import AnnotationStore

from .conftest import N_LATENTS

FIRST = "/feature/resid_post.1"


def expect_at(page: Page, number: str) -> None:
    """The row that is chosen has this number."""
    expect(page.locator(".entry.at .figure").first).to_have_text(number)


def test_a_list_is_walked_and_opened_with_keys(page: Page) -> None:
    page.goto("/")
    expect(page.get_by_role("grid", name="Latents")).to_be_visible()
    expect(page.locator("#row-0")).to_contain_text("rivers and mills, number 0")
    for _ in range(3):
        page.keyboard.press("j")
    page.keyboard.press("k")
    expect_at(page, "2")
    page.keyboard.press("End")
    expect(page.locator(f"#row-{N_LATENTS - 1}")).to_be_in_viewport()
    expect_at(page, "299")
    page.keyboard.press("PageUp")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("resid_post.1 1")
    page.go_back()
    expect(page.locator(".entry.at")).to_contain_text("mill")
    expect_at(page, "1")


def test_a_number_is_gone_to(page: Page) -> None:
    page.goto("/features")
    expect(page.locator("#row-0")).to_be_visible()
    page.keyboard.type("g250\n")
    expect(page.locator("#row-250")).to_be_in_viewport()
    expect_at(page, "250")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/feature/resid_post\.1/250$"))
    expect(page.locator(".place")).to_have_text("251 of 300")
    page.keyboard.type("g7\n")
    expect(page).to_have_url(re.compile(r"/feature/resid_post\.1/7$"))


def test_it_searches_as_one_types(page: Page) -> None:
    page.goto("/features")
    expect(page.locator("#row-0")).to_be_visible()
    page.keyboard.type("/number 25")
    expect(page.locator("#row-0")).to_contain_text("rivers and mills, number 25")
    expect(page).to_have_url(re.compile(r"q=number\+25"))
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("resid_post.1 25")
    page.goto("/features?q=zebra")
    expect(page.get_by_role("heading", name="No latent is like that")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".total")).to_have_text("300 latents")


def test_what_a_list_shows_is_in_its_address(page: Page) -> None:
    page.goto("/features")
    page.get_by_role("button", name="Max", exact=True).click()
    expect(page.get_by_role("columnheader", name="Max")).to_have_attribute("aria-sort", "descending")
    page.get_by_label("Show").select_option("live")
    page.get_by_label("Label", exact=True).select_option("explained")
    page.get_by_text("Bounds").click()
    page.get_by_label("Score at least").fill("0.9")
    page.keyboard.press("Enter")
    shown = "12 of 300"  # every fifth from 240 on
    expect(page.locator(".total")).to_have_text(shown)
    expect(page.locator(".entry:not(.head)")).to_have_count(12)
    before = page.locator(".entry:not(.head)").all_text_contents()
    page.reload()
    expect(page.locator(".total")).to_have_text(shown)
    expect(page.locator(".entry:not(.head)")).to_have_text(before)
    page.get_by_title("Take this away").click()
    expect(page.locator(".total")).not_to_have_text(shown)


def test_a_bound_that_is_typed_stays_while_another_list_arrives(page: Page) -> None:
    held: list[Route] = []
    page.route("**/api/latents?*explained=true*", lambda route: held.append(route))
    page.goto("/features")
    expect(page.locator(".total")).to_have_text("300 latents")
    page.get_by_text("Bounds").click()
    page.get_by_label("Label", exact=True).select_option("explained")
    page.get_by_label("Score at least").fill("0.9")
    while not held:
        page.wait_for_timeout(20)
    for route in held:
        route.continue_()
    page.unroute("**/api/latents?*explained=true*")
    expect(page.locator(".total")).to_have_text("60 of 300")
    expect(page.get_by_label("Score at least")).to_have_value("0.9")
    page.keyboard.press("Enter")
    expect(page.locator(".total")).to_have_text("12 of 300")


def test_a_list_is_of_what_somebody_decided(page: Page, own_index: Path) -> None:
    with AnnotationStore.open(own_index) as store:
        for latent, author, action in ((3, "ada", "reject"), (4, "bob", "reject"), (5, "bob", "flag")):
            store.record(NewEvent(f"{latent}", latent, author, action))
    page.goto("/features")
    page.get_by_label("People").select_option("rejected")
    expect(page.locator(".total")).to_have_text("2 of 300")
    page.get_by_label("By", exact=True).select_option("bob")
    expect(page.locator(".total")).to_have_text("1 of 300")
    assert {"status=rejected", "by=bob"} <= set(page.url.split("?")[1].split("&"))
    page.reload()
    expect(page.locator(".total")).to_have_text("1 of 300")
    expect(page.get_by_label("By", exact=True)).to_have_value("bob")
    page.get_by_label("People").select_option("undecided")
    expect(page.locator(".total")).to_have_text("298 of 300")
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".total")).to_have_text("300 latents")


def test_next_and_previous_follow_the_list_one_came_from(page: Page) -> None:
    page.goto("/features?sort=density&desc=1&show=live")
    expect(page.locator("#row-9")).to_be_visible()
    order = [row.locator(".figure").first.inner_text() for row in page.locator(".entry:not(.head)").all()[:9]]
    page.keyboard.press("Enter")
    for number in order[1:8]:
        expect(page.locator(".place")).to_have_text(re.compile("of 270"))
        page.keyboard.press("j")
        expect(page.get_by_role("heading", level=1)).to_have_text(f"resid_post.1 {number}")
    page.keyboard.press("k")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"resid_post.1 {order[6]}")
    assert "sort=density" in page.url
    page.keyboard.press("u")
    expect(page.locator(".entry.at")).to_contain_text(order[6])


def test_a_latent_that_the_list_lacks_goes_on_by_number(page: Page) -> None:
    page.goto(f"{FIRST}/3?show=dead")
    expect(page.locator(".place")).to_have_text("not in the list")
    page.keyboard.press("j")
    expect(page.get_by_role("heading", level=1)).to_have_text("resid_post.1 4")


def test_three_ahead_are_there_before_they_are_asked_for(page: Page) -> None:
    asked: list[str] = []
    page.goto("about:blank")  # the list on which it logged in asks for features too
    page.on("request", lambda request: asked.append(request.url) if "/api/feature" in request.url else None)
    page.goto(f"{FIRST}/20")
    expect(page.locator(".place")).to_have_text("21 of 300")
    page.wait_for_timeout(300)
    assert {int(url.rsplit("=", 1)[1]) for url in asked} == {19, 20, 21, 22, 23}


def test_hostile_texts_are_shown_as_they_are(page: Page) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(f"{FIRST}/10?wrap=1")
    label = page.locator("p.label bdi")
    expect(label).to_have_text("</script><img src=x onerror=alert(1)>⟨U+202E⟩&lt;")
    text = page.locator(".contexts").inner_text()
    for shown in ("<script>", "<img src=x onerror=alert(1)>", "⟨U+202E⟩", "␛[31m", "&amp;", "↵", "␀", "⟨C3⟩"):
        assert shown in text
    assert page.locator("main img, main script").count() == 0
    assert not re.search("[\u0000-\u0008\u202a-\u202e\u2066-\u2069]", page.locator("main").inner_text())
    assert dialogs == []


def test_a_token_tells_its_activation(page: Page) -> None:
    page.goto(f"{FIRST}/3")
    peak = page.locator(".line .token.peak").first
    score = float(page.locator(".line .number").first.inner_text())
    assert float((peak.get_attribute("title") or "").rsplit("  ")[-1]) == pytest.approx(score, abs=0.06)
    page.keyboard.press("w")
    expect(page).to_have_url(re.compile("wrap=1"))
    expect(page.locator(".whole").first).to_be_visible()


def test_a_latent_says_all_that_is_known(page: Page) -> None:
    page.goto(f"{FIRST}/15")
    for name in ("Strongest contexts", "Contexts by quantile of activation", "Near misses", "Labels", "Activations",
                 "Density among all latents", "Logits", "Most similar decoder rows", "Active together"):  # fmt: skip
        expect(page.get_by_role("heading", name=name)).to_be_visible()
    scores = page.locator(".scores")
    expect(scores).to_contain_text("detection")
    expect(scores).to_contain_text("Another's")
    expect(page.get_by_role("link", name="Try in the bench")).to_have_attribute(
        "href", "/bench?latents=resid_post.1%3A15"
    )
    expect(page.get_by_role("img", name=re.compile("active tokens by activation"))).to_be_visible()
    others = page.get_by_role("heading", name="Most similar decoder rows").locator("xpath=..").get_by_role("link")
    expect(others.first).to_have_attribute("href", f"{FIRST}/16")


def test_the_link_is_copied(page: Page) -> None:
    page.goto(f"{FIRST}/15?sort=density")
    expect(page.locator(".place")).to_have_text(re.compile("of 300"))
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.keyboard.press("c")
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("window.copied") == page.url


@pytest.mark.parametrize(
    ("path", "says"),
    [(f"{FIRST}/300", "has no latent 300"), (f"{FIRST}/x", "has no latent x"), (f"{FIRST}/-1", "has no latent -1"),
     ("/feature/nothing/3", "No index is called nothing"), ("/feature", "No feature is named"),
     ("/features?source=nothing", "No index is called nothing"), (f"{FIRST}/9", "Never active")],
)  # fmt: skip
def test_what_is_not_there_is_said(page: Page, path: str, says: str) -> None:
    page.goto(path)
    expect(page.get_by_role("heading", name=says)).to_be_visible()


def test_keys_do_nothing_while_one_types(page: Page) -> None:
    page.goto("/features")
    expect(page.locator("#row-0")).to_be_visible()
    page.get_by_label("Search labels and words").fill("jjj")
    expect(page.get_by_role("heading", name="No latent is like that")).to_be_visible()
    page.get_by_label("Search labels and words").fill("")
    expect(page.locator("#row-0")).to_be_visible()
    expect_at(page, "0")


GEOMETRY = """async () => {
  const { geometry, follow, scrollOf, reveal } = await import('/static/virtual.js');
  const shape = geometry(1e6, 30, 600, 8e6);
  let spot = { top: 0, scroll: 0 };
  spot = follow(spot, 100, shape);
  const small = spot.top;
  spot = follow(spot, shape.furthest / 2, shape);
  const far = spot.top;
  const end = follow(spot, shape.furthest, shape).top;
  const start = follow(spot, 0, shape).top;
  const back = follow({ top: 0, scroll: 0 }, scrollOf(12345678, shape), shape).top;
  const [up, down, stay] = [reveal(900, 3, 30, 600), reveal(0, 20, 30, 600), reveal(0, 19, 30, 600)];
  return { height: shape.height, small, far, end, start, back, up, down, stay };
}"""


def test_long_lists_are_scrolled_on_a_shorter_scale(page: Page) -> None:
    found = page.evaluate(GEOMETRY)
    assert found["height"] == 8e6
    assert found["small"] == 100
    assert found["far"] == pytest.approx(15e6, rel=1e-3)
    assert (found["start"], found["end"]) == (0, 30e6 - 600)
    assert found["back"] == pytest.approx(12345678)
    assert (found["up"], found["down"], found["stay"]) == (90, 30, 0)


def test_without_an_embedding_model_there_is_no_search_by_meaning(page: Page) -> None:
    page.goto("/features")
    expect(page.get_by_label("Search labels and words")).to_be_visible()
    expect(page.get_by_label("Search by")).to_have_count(0)
    answer = page.request.get("/api/latents?source=resid_post.1&q=law&how=meaning")
    assert "set embedding=" in answer.json()["detail"]["fix"]
    assert page.request.get("/api/meaning?source=resid_post.1").status == 404

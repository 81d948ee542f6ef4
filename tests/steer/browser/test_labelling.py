"""Labelling over HTTP and in Chromium: nothing that was decided is lost or counted twice."""

import json
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from sae.annotation.store import AnnotationStore
from sae.index_db import FeatureIndex
from steer.browser.app import create_app
from steer.browser.guard import Account
from steer.browser.model import SharedModel
from steer.browser.sources import Opened
from steer.listening import LOOPBACK

from .conftest import HOSTILE, TOKEN, serving
from .test_serve import address_of, started

SOURCE = "resid_post.1"
ROLES = {"viewer": "viewer", "ada": "admin", **{f"ann{i}": "annotator" for i in range(8)}}


@pytest.fixture
def many(opened: Opened) -> Iterator[str]:
    """A browser whose tokens are names."""
    people = {name: Account(name, role) for name, role in ROLES.items()}
    with serving(create_app(opened, people.get, LOOPBACK, SharedModel(None))) as where:
        yield where


@pytest.fixture
def client(many: str) -> Iterator[Callable[[str], httpx.Client]]:
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(
            httpx.Client(base_url=many, headers={"authorization": f"Bearer {name}"}, timeout=60)
        )


def create(client: httpx.Client, **changes: Any) -> int:
    body = {"source": SOURCE, "name": "first", "n": 30} | changes
    answer = client.post("/api/label/sessions", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def event(session: int, latent: int, action: str = "reject", **more: Any) -> dict[str, Any]:
    return {"source": SOURCE, "session": session, "latent": latent, "action": action, "key": str(uuid.uuid4())} | more


def events_of(index: Path) -> list[Any]:
    with closing(AnnotationStore.open(index)) as store:
        return store.events()


def test_lists_by_status_hide_what_others_decided_while_a_session_is_blind(
    client: Callable[[str], httpx.Client],
) -> None:
    ada, ann, viewer = client("ada"), client("ann0"), client("viewer")
    session = create(ada, blind=True)
    latent, other = ann.post("/api/label/lease", json={"source": SOURCE, "session": session, "n": 2}).json()["latents"]
    for each, action in ((latent, "reject"), (other, "flag")):
        assert ann.post("/api/label/events", json=event(session, each, action)).status_code == 200

    def listed(who: httpx.Client, **asked: str) -> list[int]:
        return [row["latent"] for row in who.get("/api/latents", params={"source": SOURCE, **asked}).json()["rows"]]

    def authors(who: httpx.Client) -> list[str]:
        return who.get("/api/label/authors", params={"source": SOURCE}).json()

    assert (listed(ann, status="rejected"), listed(ann, status="flagged", by="ann0")) == ([latent], [other])
    assert listed(ann, status="decided") == sorted([latent, other])
    assert authors(ann) == ["ann0"]
    for who in (ada, viewer):
        assert (listed(who, status="decided"), listed(who, status="rejected", by="ann0"), authors(who)) == ([], [], [])
        around = who.get("/api/latents/around", params={"source": SOURCE, "status": "decided", "latent": latent})
        assert (around.json()["place"], around.json()["total"]) == (None, 0)
    assert ada.post("/api/label/unblind", json={"source": SOURCE, "session": session}).status_code == 200
    for who in (ada, viewer):
        assert (listed(who, status="rejected", by="ann0"), authors(who)) == ([latent], ["ann0"])
    assert viewer.get("/api/latents", params={"source": SOURCE, "status": "nonsense"}).status_code == 422


def test_a_viewer_looks_and_writes_nothing(client: Callable[[str], httpx.Client]) -> None:
    session = create(client("ann0"))
    viewer = client("viewer")
    asked = {"source": SOURCE, "session": session}
    assert viewer.get("/api/label/desk", params=asked).json()["session"]["progress"]["latents"] == 30
    for path, body in (
        ("lease", asked), ("events", event(session, 0)), ("sessions", {"source": SOURCE, "name": "x"}),
        ("drafts", asked | {"latent": 0, "text": "x", "tab": "t", "revision": 1}), ("release", asked),
    ):  # fmt: skip
        assert viewer.post(f"/api/label/{path}", json=body).status_code == 403
    assert client("ann0").post("/api/label/unblind", json=asked).status_code == 403
    assert client("ann0").post("/api/label/events", json=event(session, 0, "adjudicate")).status_code == 400


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"latent": -1}, 422), ({"latent": 300}, 400), ({"action": "nonsense"}, 400), ({"text": "x" * 10_001}, 422),
        ({"action": "accept", "text": " "}, 400), ({"session": 99}, 404), ({"source": "../x"}, 404), ({"key": ""}, 422),
        ({"author": "eve"}, 422), ({"action": "undo"}, 400), ({"text": "\x00"}, 400), ({"latent": 2**60}, 422),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(client: Callable[[str], httpx.Client], change: Any, status: int) -> None:
    ann = client("ann0")
    session = create(ann, n=None)
    answer = ann.post("/api/label/events", json=event(session, 0) | change)
    assert (answer.status_code, set(answer.json()["detail"])) == (status, {"where", "expected", "got", "fix"})


def test_an_event_sent_twice_counts_once(client: Callable[[str], httpx.Client], own_index: Path) -> None:
    ann = client("ann0")
    session = create(ann)
    (latent,) = ann.post("/api/label/lease", json={"source": SOURCE, "session": session, "n": 1}).json()["latents"]
    sent = event(session, latent, "accept", text="rivers <b>")
    first, second = (ann.post("/api/label/events", json=sent).json() for _ in range(2))
    assert first == second
    assert ann.post("/api/label/events", json=sent | {"text": "other"}).status_code == 409
    assert [(each.author, each.text) for each in events_of(own_index)] == [("ann0", "rivers <b>")]
    with closing(FeatureIndex.open(own_index)) as index:
        assert "rivers <b>" in {label.text for label in index.labels(latent)}
    text = ann.get("/api/label/export", params={"source": SOURCE, "session": session, "form": "jsonl"}).text
    assert json.loads(text.splitlines()[0])["text"] == "rivers <b>"


def test_while_it_is_blind_nobody_sees_the_others(client: Callable[[str], httpx.Client]) -> None:
    one, two, ada = client("ann0"), client("ann1"), client("ada")
    session = create(one, blind=True, annotators_per_latent=2)
    asked = {"source": SOURCE, "session": session}
    (latent,) = one.post("/api/label/lease", json=asked | {"n": 1}).json()["latents"]
    one.post("/api/label/events", json=event(session, latent, "accept", text="secret rivers"))
    look = lambda who: who.get("/api/label/latent", params=asked | {"latent": latent}).text  # noqa: E731
    assert "secret" not in look(two)
    assert "secret" in look(one)
    assert two.get("/api/label/agreement", params=asked).status_code == 400
    assert two.get("/api/label/export", params=asked).status_code == 400
    two.post("/api/label/events", json=event(session, latent))
    cases = ada.get("/api/label/cases", params=asked).json()
    assert [(case["latent"], case["differ_in"]) for case in cases] == [(latent, "verdicts")]
    ada.post("/api/label/unblind", json=asked)
    assert "secret" in look(two)
    assert two.get("/api/label/agreement", params=asked).json()["equal_verdicts"]["value"] == 0


def test_labels_are_exported_as_neuronpedia_has_them(client: Callable[[str], httpx.Client]) -> None:
    ada = client("ada")
    session = create(ada)
    asked = {"source": SOURCE, "session": session}
    (latent,) = ada.post("/api/label/lease", json=asked | {"n": 1}).json()["latents"]
    ada.post("/api/label/events", json=event(session, latent, "accept", text="rivers"))
    there = {"form": "neuronpedia", "model_id": "gemma-2-2b", "sae_id": "12-res-16k", "author_id": "me"}
    answer = ada.get("/api/label/export", params=asked | there)
    assert 'filename="explanations-' in answer.headers["content-disposition"]
    (record,) = map(json.loads, answer.text.splitlines())
    kept = {name: record[name] for name in ("modelId", "layer", "index", "description", "authorId")}
    assert kept == {
        "modelId": "gemma-2-2b", "layer": "12-res-16k", "index": str(latent), "description": "rivers", "authorId": "me"
    }  # fmt: skip
    for missing in ("model_id", "sae_id", "author_id"):
        refused = ada.get("/api/label/export", params=asked | there | {missing: " "})
        assert (refused.status_code, refused.json()["detail"]["where"]) == (400, missing)


def test_eight_at_once_neither_lose_nor_double_anything(client: Callable[[str], httpx.Client], own_index: Path) -> None:
    session = create(client("ann0"), n=40, annotators_per_latent=2)
    sent: list[tuple[str, int]] = []
    failures: list[str] = []

    def work(name: str, mine: httpx.Client) -> None:
        while latents := mine.post("/api/label/lease", json={"source": SOURCE, "session": session, "n": 3}).json()[
            "latents"
        ]:
            for latent in latents:
                body = event(session, latent, "accept", text=f"{name} on {latent}")
                for _ in range(2):
                    if (answer := mine.post("/api/label/events", json=body)).status_code != 200:
                        failures.append(answer.text)
                sent.append((name, latent))

    clients = {f"ann{i}": client(f"ann{i}") for i in range(8)}
    threads = [threading.Thread(target=work, args=each) for each in clients.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = [(each.author, each.latent) for each in events_of(own_index)]
    assert sorted(found) == sorted(sent)
    assert len(set(found)) == len(found)
    assert set(Counter(latent for _, latent in found).values()) == {2}
    assert len({latent for _, latent in found}) == 40


# --- in the browser ---


@pytest.fixture
def desk(page: Page, address: str) -> Page:
    """A page at the desk of a new session."""
    page.get_by_role("link", name="Label").click()
    page.get_by_label("Name").fill("first look")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Label", exact=True)).to_be_visible()
    return page


def shown(page: Page) -> int:
    return int(page.locator(".label-box h2 .mono").inner_text())


def press(page: Page, key: str) -> int:
    """Press a key that decides; gives the latent that it was about, once another one is there."""
    before = shown(page)
    page.keyboard.press(key)
    expect(page.locator(".label-box h2 .mono")).not_to_have_text(str(before))
    return before


def saved(page: Page) -> None:
    expect(page.get_by_text("all saved")).to_be_visible()


def test_a_session_by_keys_alone(desk: Page, own_index: Path) -> None:
    desk.keyboard.press("e")
    desk.keyboard.type("flows & <i>mills</i>")
    before = shown(desk)
    desk.keyboard.press("Control+Enter")
    expect(desk.locator(".label-box h2 .mono")).not_to_have_text(str(before))
    rejected, skipped, flagged = press(desk, "x"), press(desk, " "), press(desk, "f")
    saved(desk)
    expect(desk.locator(".last li")).to_have_count(4)
    desk.keyboard.press("Backspace")
    expect(desk.locator(".label-box h2 .mono")).to_have_text(str(flagged))
    expect(desk.locator(".last li:not(.faint)")).to_have_count(3)
    saved(desk)
    actions = [(each.action, each.latent) for each in events_of(own_index)]
    expected = [("edit", before), ("reject", rejected), ("skip", skipped), ("flag", flagged), ("undo", flagged)]
    assert actions == expected
    assert events_of(own_index)[0].text == "flows & <i>mills</i>"
    expect(desk.locator(".last")).to_contain_text("flows & <i>mills</i>")


def test_a_suggestion_is_accepted_as_it_is_read(desk: Page, own_index: Path) -> None:
    desk.keyboard.press("g")
    desk.keyboard.type("10")
    desk.keyboard.press("Enter")
    expect(desk.locator(".label-box h2 .mono")).to_have_text("10")
    expect(desk.locator(".suggestions")).to_contain_text(HOSTILE[:10])
    press(desk, "a")
    saved(desk)
    (event,) = events_of(own_index)
    assert (event.action, event.latent, event.seen_label is None) == ("accept", 10, False)


def test_what_was_typed_is_there_after_a_reload_and_in_another_tab(desk: Page) -> None:
    latent = shown(desk)
    desk.keyboard.press("e")
    desk.get_by_label("Label", exact=True).fill("half a thou")
    desk.reload()
    expect(desk.locator(".label-box h2 .mono")).to_have_text(str(latent))
    expect(desk.get_by_label("Label", exact=True)).to_have_value("half a thou")
    other = desk.context.new_page()
    other.goto(desk.url)
    expect(other.get_by_label("Label", exact=True)).to_have_value("half a thou")


def test_offline_decisions_arrive_once(desk: Page, own_index: Path) -> None:
    expect(desk.locator(".label-box .mono")).to_be_visible()
    desk.wait_for_timeout(500)  # what lies ahead is fetched
    desk.context.set_offline(True)
    decided = [press(desk, "x"), press(desk, "f")]
    expect(desk.get_by_text("2 not saved yet")).to_be_visible()
    assert events_of(own_index) == []
    desk.context.set_offline(False)
    saved(desk)
    assert [(each.latent, each.action) for each in events_of(own_index)] == [
        (decided[0], "reject"),
        (decided[1], "flag"),
    ]


def test_a_server_that_dies_and_comes_back_loses_nothing(chromium: Browser, own_index: Path, tmp_path: Path) -> None:
    page = chromium.new_page()
    with started(tmp_path, own_index) as process:
        where, token = address_of(process)
        page.goto(f"{where}/label#token={token}")
        page.get_by_label("Name").fill("first look")
        page.keyboard.press("Enter")
        expect(page.locator(".label-box .mono")).to_be_visible()
        decided = [press(page, "x")]
        saved(page)
        page.wait_for_timeout(500)
    decided.append(press(page, "f"))
    expect(page.get_by_text("1 not saved yet")).to_be_visible()
    with started(tmp_path, own_index, "--set", f"port={where.rsplit(':', 1)[1]}") as process:
        assert address_of(process)[0] == where
        expect(page.get_by_text("all saved")).to_be_visible(timeout=40_000)
        assert [each.latent for each in events_of(own_index)] == decided
    page.close()


def test_where_people_differ_an_admin_decides(page: Page, address: str, own_index: Path) -> None:
    with closing(AnnotationStore.open(own_index)) as store:
        from sae.annotation.events import NewEvent

        session = store.create_session("two", [3, 4], annotators_per_latent=2).id
        for author, text in (("ada", "rivers"), ("bob", "mills")):
            store.record(NewEvent(f"{author}-3", 3, author, "accept", session, text=text))
    page.goto(f"/label/{SOURCE}/{session}/agreement")
    case = page.locator(".case")
    expect(case).to_contain_text("differ in texts")
    case.get_by_role("button", name="Take this").nth(1).click()
    expect(case.get_by_text("decided: mills")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="csv").click()
    assert "mills" in Path(download.value.path()).read_text()
    assert TOKEN not in page.url

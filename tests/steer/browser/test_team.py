"""Accounts of several people, in the database and over HTTP."""

import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sql
from playwright.sync_api import Browser, expect

from activations.errors import ConfigError, StorageError, UnknownNameError
from steer.browser.app import create_app
from steer.browser.guard import Account, Pace
from steer.browser.model import SharedModel
from steer.browser.sources import Opened
from steer.browser.team import Team, sqlite_url
from steer.listening import LOOPBACK

from .conftest import TOKEN, serving

ADA = Account("ada", "admin")


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    with closing(Team(sqlite_url(tmp_path / "state" / "accounts.sqlite"), ADA, TOKEN)) as team:
        yield team


@pytest.fixture
def where(team: Team, opened: Opened) -> Iterator[str]:
    with serving(create_app(opened, team.account_of, LOOPBACK, SharedModel(None), team)) as where:
        yield where


def client(where: str, token: str) -> httpx.Client:
    return httpx.Client(base_url=where, headers={"authorization": f"Bearer {token}"})


def test_a_token_is_its_account_until_it_is_renewed_or_revoked(team: Team, tmp_path: Path) -> None:
    token = team.add("grace", "annotator")
    assert team.account_of(token) == Account("grace", "annotator")
    assert team.account_of(TOKEN) == ADA
    assert team.account_of(token[:-1]) is None
    team.change("grace", "viewer")
    assert team.account_of(token) == Account("grace", "viewer")
    renewed = team.renew("grace")
    assert (team.account_of(token), team.account_of(renewed)) == (None, Account("grace", "viewer"))
    team.revoke("grace")
    assert team.account_of(renewed) is None
    assert [(each.name, each.is_active) for each in team.people()] == [("grace", False)]
    file = tmp_path / "state" / "accounts.sqlite"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert token.encode() not in file.read_bytes()
    with closing(Team(sqlite_url(file), ADA, TOKEN)) as again:
        assert [each.name for each in again.people()] == ["grace"]


@pytest.mark.parametrize("name", ["", " x", "a\nb", "<b>", "x" * 65, "ada", "ADA", "Grace"])
def test_names_that_are_taken_or_none(team: Team, name: str) -> None:
    team.add("grace", "viewer")
    with pytest.raises(ConfigError, match="name"):
        team.add(name, "viewer")


def test_who_is_not_there_cannot_be_changed(team: Team) -> None:
    for act in (lambda: team.change("bob", "viewer"), lambda: team.renew("bob"), lambda: team.revoke("bob")):
        with pytest.raises(UnknownNameError, match="'bob'"):
            act()


def test_a_database_that_is_not_there_is_named_without_its_password() -> None:
    with pytest.raises(ConfigError, match="database"):
        Team("nonsense", ADA, TOKEN)
    url = sql.URL.create("postgresql+psycopg", "me", "secret", "127.0.0.1", 1, "x", {"connect_timeout": "2"})
    with pytest.raises(StorageError) as caught:
        Team(url, ADA, TOKEN)
    assert "secret" not in str(caught.value)


def test_roles_over_http(where: str) -> None:
    with client(where, TOKEN) as admin:
        answer = admin.post("/api/people", json={"name": "grace", "role": "viewer"})
        assert answer.status_code == 201
        assert admin.post("/api/people", json={"name": "grace", "role": "viewer"}).status_code == 400
        assert admin.post("/api/people", json={"name": "x", "role": "root"}).status_code == 422
        with client(where, answer.json()["token"]) as viewer:
            assert viewer.get("/api/about").json()["role"] == "viewer"
            assert viewer.get("/api/people").status_code == 403
            assert viewer.post("/api/people", json={"name": "eve", "role": "admin"}).status_code == 403
            assert viewer.patch("/api/people/grace", json={"role": "admin"}).status_code == 403
            assert admin.delete("/api/people/grace").status_code == 204
            assert viewer.get("/api/about").status_code == 401
        assert admin.delete("/api/people/nobody").status_code == 404


def test_wrong_tokens_are_counted(opened: Opened) -> None:
    app = create_app(opened, lambda token: None, LOOPBACK, SharedModel(None))
    app.state.pace = Pace(wrong_a_minute=3)
    with serving(app) as where, httpx.Client(base_url=where) as anybody:
        codes = [anybody.post("/api/login", json={"token": "x"}).status_code for _ in range(5)]
    assert codes == [401, 401, 401, 429, 429]


def test_what_changes_something_is_counted_for_each_account(where: str, team: Team, opened: Opened) -> None:
    app = create_app(opened, team.account_of, LOOPBACK, SharedModel(None), team)
    app.state.pace = Pace(asked_a_minute=2)
    token = team.add("grace", "admin")
    with serving(app) as own, client(own, TOKEN) as ada, client(own, token) as grace:
        codes = [ada.patch("/api/people/grace", json={"role": "admin"}).status_code for _ in range(3)]
        assert codes == [204, 204, 429]
        assert grace.patch("/api/people/grace", json={"role": "admin"}).status_code == 204
        assert ada.get("/api/about").status_code == 200


def test_an_admin_adds_and_revokes_on_the_page(chromium: Browser, where: str) -> None:
    page = chromium.new_page(base_url=where)
    page.goto(f"/people#token={TOKEN}")
    page.get_by_label("Name").fill("grace")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Give grace this address")
    link = page.locator("code").inner_text()
    other = chromium.new_page()
    other.goto(link)
    expect(other.locator(".who")).to_have_text("grace")
    expect(other.get_by_role("link", name="People")).to_have_count(0)
    page.get_by_role("button", name="Revoke").click()
    expect(page.get_by_text("revoked")).to_be_visible()
    other.reload()
    expect(other.get_by_label("Token")).to_be_visible()
    page.close()
    other.close()

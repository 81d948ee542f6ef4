"""Nothing is answered without permission, whatever a request says of itself."""

import http.client
from collections.abc import Iterator

import httpx
import pytest
from starlette.routing import Mount

from steer.browser.app import create_app
from steer.browser.guard import MAX_BODY, SAFE, Account, Pace, host_of
from steer.browser.model import SharedModel
from steer.browser.sources import Opened
from steer.listening import LOOPBACK

from .conftest import TOKEN, serving

OPEN = {("/api/login", "POST")}
"""what anybody may ask for, beside the page's own files"""


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address) as client:
        yield client


def routes(opened: Opened) -> list[tuple[str, str]]:
    app = create_app(opened, lambda token: None, LOOPBACK, SharedModel(None))
    assert not any(route.path.startswith("/api") for route in app.routes if isinstance(route, Mount))
    return [(path, method.upper()) for path, methods in app.openapi()["paths"].items() for method in methods]


def test_no_endpoint_answers_without_a_token(opened: Opened) -> None:
    app = create_app(opened, lambda token: None, LOOPBACK, SharedModel(None))
    app.state.pace = Pace(wrong_a_minute=1000)
    asked = [each for each in routes(opened) if each not in OPEN]
    assert len(asked) >= 6
    with serving(app) as address, httpx.Client(base_url=address) as client:
        for path, method in asked:
            answer = client.request(method, path.replace("{", "").replace("}", ""), headers={"x-saekit": "1"})
            assert (path, method, answer.status_code) == (path, method, 401)
            wrong = client.request(method, path, headers={"authorization": "Bearer wrong"})
            assert (path, method, wrong.status_code) == (path, method, 401)


def test_a_login_gives_a_cookie_that_only_this_site_sends(client: httpx.Client) -> None:
    assert client.get("/api/about").status_code == 401
    assert client.post("/api/login", json={"token": "wrong"}).status_code == 401
    assert client.post("/api/login", content=b'{"token": "\\ud800"}').status_code == 422, "half a character"
    answer = client.post("/api/login", json={"token": TOKEN})
    assert answer.status_code == 204
    cookie = answer.headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict"} <= {part.strip() for part in cookie.split(";")}
    about = client.get("/api/about").json()
    assert (about["account"], about["role"], about["sources"][0]["d_sae"]) == ("ada", "admin", 300)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:80"])
def test_other_names_of_the_machine_are_refused(address: str, host: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    connection.putrequest("GET", "/api/about", skip_host=True)
    connection.putheader("Host", host)
    connection.putheader("Authorization", f"Bearer {TOKEN}")
    connection.endheaders()
    assert connection.getresponse().status in (400, 421)
    connection.close()


@pytest.mark.parametrize(
    ("header", "host"),
    [("localhost", "localhost"), ("LocalHost:80", "localhost"), ("127.0.0.1:1", "127.0.0.1"), ("[::1]", "::1"),
     ("[::1]:80", "::1")],
)  # fmt: skip
def test_host_of(header: str, host: str) -> None:
    assert host_of(header) == host


def test_every_answer_carries_the_policy(client: httpx.Client) -> None:
    for path in ("/", "/feature/resid_post.1/3", "/static/main.js", "/api/about", "/api/nothing"):
        policy = client.get(path).headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy


def test_a_body_has_a_length_and_is_small(client: httpx.Client) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert client.post("/api/login", content=b" " * (MAX_BODY + 1), headers=headers).status_code == 413
    assert client.post("/api/login", content=(b" " for _ in range(3)), headers=headers).status_code == 413


def test_roles_are_ordered() -> None:
    assert [Account("a", "annotator").may(role) for role in ("viewer", "annotator", "admin")] == [True, True, False]


def test_changing_routes_want_the_header_beside_the_cookie(opened: Opened) -> None:
    """Every route but the login, with a cookie and without the header."""
    app = create_app(opened, lambda token: Account("ada", "admin"), LOOPBACK, SharedModel(None))
    changing = [(path, method) for path, method in routes(opened) if method not in SAFE and (path, method) not in OPEN]
    with serving(app) as where, httpx.Client(base_url=where, cookies={"saekit": TOKEN}) as client:
        for path, method in changing:
            assert (path, client.request(method, path).status_code) == (path, 403)

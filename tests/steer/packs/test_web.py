"""Places: paths, addresses, and servers that mean no good."""

from pathlib import Path

import pytest

from activations.errors import ConfigError, CorruptArtefactError, EndpointError, MissingArtefactError, SaekitError
from steer.packs import web
from steer.packs.web import inside, local_path, read_place, shown
from tests.steer.packs.servers import Answer, serving


def test_places() -> None:
    assert local_path("file:///a%20b/c") == Path("/a b/c")
    assert local_path("file://localhost/c") == Path("/c")
    assert inside("/a/b", "x.json") == "/a/b/x.json"
    assert inside("file:///a", "x.json") == "/a/x.json"
    assert inside("http://h/a", "x y") == "http://h/a/x%20y"
    assert inside("https://u:p@h:8/a/?token=1", "x") == "https://u:p@h:8/a/x?token=1"
    assert shown("https://user:secret@h:8/a?token=secret#secret") == "https://h:8/a"
    assert shown("a\x1b[2J") == "a\ufffd[2J"
    for wrong in ("file://elsewhere/c", "ftp://h/c", "s3://h/c"):
        with pytest.raises(ConfigError):
            local_path(wrong)
    for wrong in ("http://[", "file://[", "http://h:99999999/x", "http://\0/", "http:///x", "https://a b/"):
        with pytest.raises(SaekitError):
            read_place(wrong, 10)


def test_files_have_a_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert read_place(str(tmp_path / "f"), 5) == b"12345"
    assert read_place(f"file://{tmp_path}/f", 5) == b"12345"
    with pytest.raises(CorruptArtefactError, match="at most 4 bytes"):
        read_place(str(tmp_path / "f"), 4)
    with pytest.raises(MissingArtefactError):
        read_place(str(tmp_path / "none"), 4)
    with pytest.raises(SaekitError):
        read_place(str(tmp_path), 4)


def handled(answer: Answer, path: str) -> None:
    """What the server of these tests does, by the name of what it is asked for."""
    name, _, rest = path.lstrip("/").partition("?")[0].partition("/")
    if name == "file":
        answer.send(200, b"12345")
    elif name == "long":
        answer.send(200, b"1" * 2000)
    elif name == "endless":
        answer.send(200, b"", Content_Length="")
        for _ in range(10_000):
            answer.wfile.write(b"1" * 1000)
    elif name == "cut":
        answer.send(200, b"123", Content_Length="5")
    elif name == "packed":
        answer.send(200, b"\x1f\x8b not gzip", Content_Encoding="gzip")
    elif name == "hops":
        answer.send(302, Location=f"/hops/{int(rest) - 1}" if int(rest) else "/file")
    elif name == "to":
        answer.send(302, Location=rest.replace("=", "/"))
    elif name == "silent":
        answer.close_connection = True
        answer.connection.close()
    else:
        answer.send(int(name) if name.isdecimal() else 404, b"no \x1b[2J")


def test_what_servers_send() -> None:
    with serving(handled) as server:
        assert read_place(f"{server.url}/file", 5) == b"12345"
        assert read_place(f"{server.url}/hops/4", 5) == b"12345"
        assert read_place(f"{server.url}/packed", 20) == b"\x1f\x8b not gzip"
        for name, limit, kind in [
            ("file", 4, CorruptArtefactError),
            ("long", 1999, CorruptArtefactError),
            ("endless", 100_000, CorruptArtefactError),
            ("cut", 5, EndpointError),
            ("none", 5, MissingArtefactError),
            ("410", 5, MissingArtefactError),
            ("403", 5, EndpointError),
            ("500", 5, EndpointError),
            ("206", 5, EndpointError),
            ("204", 5, EndpointError),
            ("silent", 5, EndpointError),
            ("hops/5", 5, EndpointError),
            ("to/ftp:==h=x", 5, EndpointError),
            ("to/file:===etc=passwd", 5000, EndpointError),
            ("to/http:==[", 5, EndpointError),
            ("to/", 5, EndpointError),
            ("to/http:==", 5, EndpointError),
        ]:
            with pytest.raises(kind, match=f"^{server.url}/{name.split('/')[0]}") as caught:
                read_place(f"{server.url}/{name}", limit)
            assert "\x1b" not in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(EndpointError, match="ConnectError"):
        read_place(f"{server.url}/file", 5)


def test_https_is_not_left() -> None:
    with pytest.raises(EndpointError, match="the same scheme or to https, got one to http://h/b"):
        web._redirected("https://h/a", "https://h/a", "http://h/b")
    assert web._redirected("http://h/a", "http://h/a", "https://h/b") == "https://h/b"


def test_passwords_go_to_their_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(handled) as other, serving(handled) as server:
        host = server.url.removeprefix("http://")
        there = other.url.replace("/", "=")
        assert read_place(f"http://ada:secret@{host}/hops/1", 5) == b"12345"
        assert all("Authorization" in headers for _, _, headers in server.answer.asked)
        assert read_place(f"http://ada:secret@{host}/to/{there}=file", 5) == b"12345"
        ((_, _, headers),) = other.answer.asked
        assert "Authorization" not in headers
        for name in ("none", "500", "cut", "silent"):
            with pytest.raises(SaekitError) as caught:
                read_place(f"http://ada:secret@{host}/{name}?key=secret", 5)
            assert "secret" not in str(caught.value)


def test_a_server_that_is_too_slow_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "DOWNLOAD_S", -1.0)
    with serving(handled) as server, pytest.raises(EndpointError, match="a file in"):
        read_place(f"{server.url}/long", 5000)
    monkeypatch.setattr(web, "WAIT_S", 0.05)
    with (
        serving(lambda answer, path: answer.rfile.read(1) and None) as server,
        pytest.raises(EndpointError, match="Timeout"),
    ):
        read_place(f"{server.url}/file", 5)

"""Where a catalogue or an archive is, a folder or a web server; and getting files from there without trusting it.

A place is a path, `file:///PATH`, or an http(s) address. Of a server: answers have a limit, and what goes beyond is not
read; it has to answer in time; redirects, a few at most, lead to the same scheme or to https, and no password goes
along; nothing is decompressed on the way. User and password in an address are sent, and never shown. Left out: proxies
and certificates, which are the environment's (as httpx reads it), and going on with a download that broke off.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

import httpx2

from activations.errors import ConfigError, CorruptArtefactError, EndpointError, MissingArtefactError, SaekitError
from steer.packs.contents import BLOCK, damaged
from steer.packs.disk import explained
from steer.packs.names import printable

WAIT_S = 30.0
"""for a server to connect, or to send something"""
DOWNLOAD_S = 6 * 3600.0
"""for a whole file"""
REDIRECTS = 5
WEB = ("http://", "https://")


def is_web(place: str) -> bool:
    """Whether a place is on a web server."""
    return place.startswith(WEB)


def local_path(place: str) -> Path:
    """The path of a place that is on this disk. Raises: ConfigError for schemes that are not known."""
    parts = _split(place)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    if "://" in place:
        fix = "Use one of these."
        raise ConfigError(shown(place), expected="a path, file:///, http:// or https://", got=parts.scheme, fix=fix)
    return Path(place).expanduser()


def inside(place: str, file: str) -> str:
    """The place of a file in a place, both given with slashes; what is asked for stays, as the `?...` of an address."""
    if not is_web(place):
        return str(local_path(place) / file)
    parts = _split(place)
    path = parts.path if parts.path.endswith("/") else parts.path + "/"
    return urlunsplit((parts.scheme, parts.netloc, path + quote(file), parts.query, ""))


def shown(place: str) -> str:
    """A place as it may be shown: of an address neither user nor password, nor what follows a question mark."""
    if "://" not in place:
        return printable(place)
    parts = _split(place)
    return printable(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))


def _split(place: str) -> SplitResult:
    try:
        return urlsplit(place)
    except ValueError as error:
        fix = "Correct it."
        raise ConfigError("address", expected="one that can be read", got="another text", fix=fix) from error


def read_place(place: str, limit: int) -> bytes:
    """The content of a file, which has to be of at most `limit` bytes.

    Raises: MissingArtefactError if it is not there; EndpointError if a server fails; CorruptArtefactError if it is
      longer.
    """
    return b"".join(parts_of(place, limit))


def parts_of(place: str, limit: int) -> Iterator[bytes]:
    """The content of a file in blocks, as `read_place`."""
    if is_web(place):
        yield from _downloaded(place, limit)
        return
    path, left = local_path(place), limit
    with explained(path):
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise _missing(place) from error
        with file:
            while part := file.read(min(BLOCK, left + 1)):
                if (left := left - len(part)) < 0:
                    raise _too_long(place, limit)
                yield part


def _downloaded(place: str, limit: int) -> Iterator[bytes]:
    client = httpx2.Client(headers={"Accept-Encoding": "identity"}, timeout=WAIT_S, follow_redirects=False)
    deadline = time.monotonic() + DOWNLOAD_S
    with client, _unreachable(place), _answer(client, place) as answer:
        length = answer.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > limit:
            raise _too_long(place, limit)
        left = limit
        for part in answer.iter_raw(BLOCK):
            left -= len(part)
            if left < 0:
                raise _too_long(place, limit)
            if time.monotonic() > deadline:
                fix = "Download it another way, and give the path."
                raise EndpointError(shown(place), expected=f"a file in {DOWNLOAD_S:.0f} s", got="not all", fix=fix)
            yield part


@contextmanager
def _answer(client: httpx2.Client, place: str) -> Iterator[httpx2.Response]:
    """The answer with the file, behind all redirects."""
    address = place
    for _ in range(REDIRECTS + 1):
        with client.stream("GET", address) as answer:
            if not answer.is_redirect:
                _check_status(place, answer.status_code)
                yield answer
                return
            address = _redirected(place, address, answer.headers.get("location", ""))
    fix = "Check the address."
    raise EndpointError(shown(place), expected=f"at most {REDIRECTS} redirects", got="more", fix=fix)


def _redirected(place: str, address: str, location: str) -> str:
    before, target = urlsplit(address), urlsplit(urljoin(address, location))
    if target.scheme not in (before.scheme, "https") or not target.hostname:
        fix = "Check the address."
        got = f"one to {shown(urlunsplit(target))[:200]}"
        raise EndpointError(shown(place), expected="redirects to the same scheme or to https", got=got, fix=fix)
    is_same = (target.scheme, target.hostname, target.port) == (before.scheme, before.hostname, before.port)
    netloc = before.netloc if is_same else target.netloc.rpartition("@")[2]
    return urlunsplit((target.scheme, netloc, target.path, target.query, ""))


def _check_status(place: str, status: int) -> None:
    if status in (404, 410):
        raise _missing(place)
    if status != 200:
        fix = "Check the address, and who may read it."
        raise EndpointError(shown(place), expected="an answer with the file", got=f"status {status}", fix=fix)


@contextmanager
def _unreachable(place: str) -> Iterator[None]:
    try:
        yield
    except SaekitError:
        raise
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, ValueError) as error:
        # The message of such an error may repeat the address with its password.
        fix = "Check the address and the network, then run the same command again."
        raise EndpointError(
            shown(place), expected="a server that sends the file", got=type(error).__name__, fix=fix
        ) from error


def _missing(place: str) -> MissingArtefactError:
    return MissingArtefactError(shown(place), expected="a file", got="nothing there", fix="Check the path.")


def _too_long(place: str, limit: int) -> CorruptArtefactError:
    return damaged(shown(place), f"at most {limit} bytes", "more")

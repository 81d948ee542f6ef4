"""Who may ask for what: nothing is answered without permission, whoever can reach the port.

1. The Host header has to name the browser itself, so that no web page reaches it by a name of its own (DNS rebinding).
2. A request is somebody's: of the token in its cookie, or behind `Authorization: Bearer`. Files of the page itself hold
   nothing and are anybody's.
3. What changes something needs the header `X-Saekit`, which no other site's page can send along with the cookie (CSRF).
4. A role is enough for what needs it or less: viewer, annotator, admin.
5. Wrong tokens, and requests that change or compute something, are counted by the minute.
6. Every answer forbids the page to load or run anything that is not the browser's own (Content-Security-Policy).

Left out: where accounts are kept (`steer.browser.people`, `steer.browser.team`).
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, HTTPException, Request
from pydantic import BaseModel
from starlette import exceptions
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from activations.errors import SaekitError
from steer.browser.roles import Account, Role

if TYPE_CHECKING:
    from limits.strategies import MovingWindowRateLimiter

COOKIE = "saekit"
HEADER = "x-saekit"
SAFE = ("GET", "HEAD", "OPTIONS")
MAX_BODY = 1 << 20
"""bytes of a request"""
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Problem(BaseModel):
    """Why a request is refused, in the four parts of every error."""

    where: str
    expected: str
    got: str
    fix: str


class Refused(BaseModel):
    """An answer that refuses something."""

    detail: Problem


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refused, "description": says}
    for status, says in {
        400: "it cannot be done", 401: "no token that is known", 403: "the role is not enough, or a header is missing",
        404: "nothing of that name", 405: "not a method of this path", 409: "it does not fit what is there",
        413: "too long, or of no length", 421: "not a name of this server",
        422: "not of the form that is described", 429: "too often", 503: "the storage does not answer",
    }.items()
}  # fmt: skip
"""what any route may answer in place of what it is for, as the OpenAPI schema tells it"""


def detail_of(error: SaekitError) -> dict[str, str]:
    """An error in its four parts, as every answer that refuses something has it."""
    return {"where": error.where, "expected": error.expected, "got": error.got, "fix": error.fix}


def refusal(
    status: int, where: str, *, expected: str, got: str, fix: str, headers: dict[str, str] | None = None
) -> HTTPException:
    """What to raise for a request that is refused before anything of this project looks at it."""
    detail = {"where": where, "expected": expected, "got": got, "fix": fix}
    return HTTPException(status, detail, headers)


class Pace:
    """How often somebody may ask: requests that change or compute something, and tokens that are wrong."""

    def __init__(self, asked_a_minute: int = 240, wrong_a_minute: int = 20):
        self._asked, self._wrong = asked_a_minute, wrong_a_minute

    def ask(self, account: str) -> None:
        """Count a request. Raises: HTTPException 429."""
        self._hit(self._asked, "asked", account)

    def be_wrong(self, client: str) -> None:
        """Count a wrong token. Raises: HTTPException 429."""
        self._hit(self._wrong, "wrong", client)

    @cached_property
    def _limiter(self) -> "MovingWindowRateLimiter":
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter

        return MovingWindowRateLimiter(MemoryStorage())

    def _hit(self, most: int, what: str, who: str) -> None:
        from limits import RateLimitItemPerMinute

        if not self._limiter.hit(RateLimitItemPerMinute(most), what, who):
            expected, again = f"at most {most} a minute", {"retry-after": "60"}
            raise refusal(429, "request", expected=expected, got="more", fix="Wait.", headers=again)


class Gatekeeper:
    """ASGI middleware: Host, size of the body, and headers of every answer."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str] | None,
        answer: Callable[[exceptions.HTTPException], JSONResponse] | None = None,
    ):
        """Args: hosts: names that the Host header may have; none: any. answer: what a refusal looks like."""
        self._app, self._answer = app, answer or answer_of
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        host = headers.get("host", "")
        if self._hosts is not None and host_of(host) not in self._hosts:
            return await self._refused(421, "a name of this server", host)(scope, receive, guarded)
        if scope["method"] not in SAFE and not _is_small(headers):
            expected = f"a body of at most {MAX_BODY} bytes, with its length"
            return await self._refused(413, expected, "another")(scope, receive, guarded)
        await self._app(scope, receive, guarded)

    def _refused(self, status: int, expected: str, got: str) -> JSONResponse:
        return self._answer(refusal(status, "request", expected=expected, got=got, fix="Correct the request."))


def host_of(header: str) -> str:
    """The host of a Host header, without its port."""
    name = header.lower().rsplit(":", 1)[0] if not header.endswith("]") else header.lower()
    return name.strip("[]")


def _is_small(headers: Headers) -> bool:
    """A length that is said and small; the server itself cuts a body off at what was said."""
    if "transfer-encoding" in headers:
        return False
    length = headers.get("content-length", "0")
    return length.isascii() and length.isdigit() and int(length) <= MAX_BODY


def answer_of(refused: exceptions.HTTPException) -> JSONResponse:
    """What is answered in place of what was asked for."""
    return JSONResponse({"detail": refused.detail}, refused.status_code, refused.headers)


def token_of(request: Request) -> str | None:
    """The token that a request carries."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token if kind.lower() == "bearer" else request.cookies.get(COOKIE)


def needs(role: Role) -> Any:
    """What a route declares to be for a role and those above it; gives the account.

    The application keeps an AccountOf as `app.state.account_of` and a Pace as `app.state.pace`.
    """

    def check(request: Request) -> Account:
        token, pace = token_of(request), request.app.state.pace
        account = None if token is None else request.app.state.account_of(token)
        if account is None and token is not None:
            pace.be_wrong(request.client.host if request.client else "")
        if account is None:
            fix = "Log in with the address that saekit browse printed."
            raise refusal(401, "request", expected="a token", got="none that is known", fix=fix)
        if request.method not in SAFE and "authorization" not in request.headers and HEADER not in request.headers:
            raise refusal(403, "request", expected=f"the header {HEADER}", got="none", fix="Send it along.")
        if not account.may(role):
            fix = "Ask an admin."
            raise refusal(403, account.name, expected=f"the role {role}", got=account.role, fix=fix)
        if request.method not in SAFE:
            pace.ask(account.name)
        return account

    return Depends(check)


Viewer = Annotated[Account, needs("viewer")]
Annotator = Annotated[Account, needs("annotator")]
Admin = Annotated[Account, needs("admin")]

"""The OpenAI-compatible server as one web application.

Flow of a request: 1. `Gatekeeper` looks at its Host and size, `Patience` at how long its body takes; 2. a router
answers (`steer.serving.routes`); 3. what was refused or failed becomes an error in the shape of OpenAI's API
(`steer.serving.refusals`); 4. numbers and a line of log. Left out: listening on a port (`steer.serving.serve`).
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette import exceptions
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from activations.errors import SaekitError
from steer.browser.guard import Gatekeeper, refusal
from steer.serving.admission import Admission
from steer.serving.catalogue import Catalogue
from steer.serving.config import ServeConfig
from steer.serving.desk import Desk
from steer.serving.engine import Engine, Job
from steer.serving.keys import Keys
from steer.serving.refusals import answer_of, as_answer
from steer.serving.routes import Whose, answers_router, listing_router, state_router
from steer.serving.sampling import Sampling
from steer.serving.watching import Seen, Watch

BODY_S = 30.0
"""seconds that a request's body may take"""


def create_app(
    config: ServeConfig,
    engine: Engine,
    catalogue: Catalogue,
    keys: Keys,
    hosts: Iterable[str] | None,
    log: Callable[[str], Any] | None = None,
) -> FastAPI:
    """The application; it starts the engine, and closes it.

    Args:
      hosts: names that the Host header may have; none: any.
      log: told each line of log; none: standard error is.
    Raises: as `Desk` does.
    """
    desk, whose = Desk(config, engine, catalogue), Whose(keys)
    admission = Admission(config.max_running + config.max_waiting, config.max_running_per_key)
    watch = Watch(lambda: admission.n, log)

    def steering() -> dict[str, Any]:
        return {"fingerprint": engine.loaded.fingerprint, "budget": config.budget, "libraries": catalogue.listing()}

    app = FastAPI(
        title="saekit serve", version=version("saekit"), openapi_url=None, lifespan=_running(engine),
    )  # fmt: skip
    app.add_middleware(Patience, seconds=BODY_S)
    app.add_middleware(Gatekeeper, hosts=hosts, answer=answer_of)
    app.add_middleware(Counted, watch=watch)
    for kind in (SaekitError, RequestValidationError, UnicodeEncodeError, exceptions.HTTPException, Exception):
        app.add_exception_handler(kind, as_answer)
    app.include_router(state_router(engine, admission, watch, whose))
    app.include_router(listing_router(desk, engine, steering, whose))
    app.include_router(answers_router(desk, engine, admission, config.timeout_s, whose))
    return app


def _running(engine: Engine) -> Any:
    """Starts the engine with the application, and closes it."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        async for _ in engine.submit(Job("first", [0], Sampling(max_tokens=1))):
            pass  # what the first pass alone takes long for nobody has to wait for
        yield
        await asyncio.to_thread(engine.close)

    return running


class Counted:
    """ASGI middleware: every request gets an id, and is counted and logged when it has ended, however."""

    def __init__(self, app: ASGIApp, watch: Watch):
        self._app, self._watch = app, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, seen = asyncio.get_running_loop().time(), Seen(secrets.token_hex(12), scope["path"][:100])
        scope.setdefault("state", {})["seen"] = seen

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                route = scope.get("route")
                seen.route = route.path if route is not None else "-"
                MutableHeaders(scope=message)["x-request-id"] = seen.id
            await send(message)

        try:
            await self._app(scope, receive, told)
        except Exception:
            seen.status = 500
            raise
        finally:
            seen.total_s = asyncio.get_running_loop().time() - start
            self._watch.end(seen)


class Patience:
    """ASGI middleware: a body that does not come in time is not waited for."""

    def __init__(self, app: ASGIApp, seconds: float):
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        deadline, has_come = asyncio.get_running_loop().time() + self._seconds, False

        async def received() -> Message:
            nonlocal has_come
            if has_come:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                expected = f"a body within {self._seconds:g} s"
                raise refusal(408, "request", expected=expected, got="a part of one", fix="Send it again.") from None
            has_come = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        await self._app(scope, received, send)

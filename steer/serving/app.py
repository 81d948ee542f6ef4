"""The OpenAI-compatible server as one web application.

Flow of a request: 1. `Gatekeeper` looks at its Host and size, `Patience` at how long its body takes; 2. its key says
whose it is; 3. `Admission` lets it in, or refuses at once; 4. `steer.serving.desk` makes jobs of it; 5. the engine
writes, until the answer ends, its time is over, or whoever asked is gone; 6. numbers and a line of log.

Every refusal is {"error": {message, type, param, code, detail}}, where detail has where, expected, got and fix. Left
out: listening on a port (`steer.serving.serve`).
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette import exceptions
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from activations.errors import EngineError, SaekitError
from steer.browser.guard import Gatekeeper, Pace, detail_of, refusal
from steer.serving.admission import Admission
from steer.serving.answers import Shape
from steer.serving.bodies import ChatRequest, CompletionRequest
from steer.serving.catalogue import Catalogue
from steer.serving.config import ServeConfig
from steer.serving.desk import Desk, UnknownModelError
from steer.serving.engine import Engine, Job
from steer.serving.keys import Keys
from steer.serving.sampling import Sampling
from steer.serving.watching import Seen, Watch
from steer.serving.writes import Answers

BODY_S = 30.0
"""seconds that a request's body may take"""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CLIENT_GONE = 499
"""in logs, of a request whose answer nobody waits for"""


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
    desk, pace = Desk(config, engine, catalogue), Pace()
    admission = Admission(config.max_running + config.max_waiting, config.max_running_per_key)
    watch = Watch(lambda: admission.n, log)
    started = int(time.time())

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        async for _ in engine.submit(Job("first", [0], Sampling(max_tokens=1))):
            pass  # what the first pass alone takes long for nobody has to wait for
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="saekit serve", version=version("saekit"), docs_url=None, redoc_url=None, lifespan=running,
    )  # fmt: skip
    app.add_middleware(Patience, seconds=BODY_S)
    app.add_middleware(Gatekeeper, hosts=hosts, answer=answer_of)
    app.add_middleware(Counted, watch=watch)
    for kind in (SaekitError, RequestValidationError, UnicodeEncodeError, exceptions.HTTPException, Exception):
        app.add_exception_handler(kind, _as_answer)

    def whose(request: Request) -> str:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        name = keys.name_of(key if kind.lower() == "bearer" else None)
        if name is None:
            pace.be_wrong(request.client.host if request.client else "")
            fix = "Send Authorization: Bearer KEY."
            raise refusal(401, "request", expected="an API key", got="none that is known", fix=fix)
        return name

    async def answered(request: Request, body: ChatRequest | CompletionRequest, key: str) -> Response:
        seen = request.state.seen
        seen.key, seen.model = key, body.model[:100]
        return await _Asked(desk, engine, admission, config.timeout_s, seen).answer(request, body)

    @app.get("/health")
    def health() -> Response:
        told = {"status": "ok" if engine.is_alive else "down", "answers": admission.n, "model": engine.loaded.id}
        return JSONResponse(told, 200 if engine.is_alive else 503)

    @app.get("/metrics")
    def metrics(key: str = Depends(whose)) -> Response:
        return Response(watch.text(), media_type="text/plain; version=0.0.4")

    def described(name: str) -> dict[str, Any]:
        steers = [item.model_dump(exclude_none=True) for item in desk.models[name].steer]
        owner = {"id": name, "object": "model", "created": started, "owned_by": "saekit"}
        return {**owner, "max_model_len": engine.most_tokens, "steering": steers}

    @app.get("/v1/models")
    def models(key: str = Depends(whose)) -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in desk.models]}

    @app.get("/v1/models/{name:path}")
    def model(name: str, key: str = Depends(whose)) -> dict[str, Any]:
        if name not in desk.models:
            expected = f"one of {', '.join(desk.models)}"
            raise UnknownModelError("model", expected=expected, got=f"'{name[:100]}'", fix="See GET /v1/models.")
        return described(name)

    @app.get("/v1/steering")
    def steering(key: str = Depends(whose)) -> dict[str, Any]:
        return {"fingerprint": engine.loaded.fingerprint, "budget": config.budget, "libraries": catalogue.listing()}

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest, key: str = Depends(whose)) -> Response:
        return await answered(request, body, key)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest, key: str = Depends(whose)) -> Response:
        return await answered(request, body, key)

    return app


class _Asked:
    """One request, from its body to its answer."""

    def __init__(self, desk: Desk, engine: Engine, admission: Admission, timeout_s: float, seen: Seen):
        self._desk, self._engine, self._admission, self._seen = desk, engine, admission, seen
        self._start = asyncio.get_running_loop().time()
        self._deadline = self._start + timeout_s

    async def answer(self, request: Request, body: ChatRequest | CompletionRequest) -> Response:
        """The answer, whole or as a stream. Raises: SaekitError, HTTPException."""
        with ExitStack() as stack:
            stack.enter_context(self._admission.of(self._seen.key, self._desk.n_answers(body)))
            order = await asyncio.to_thread(self._desk.order, self._seen.id, body)
            answers = Answers(self._engine, order.jobs, order.stops, self._deadline)
            stack.callback(self._count, order.shape, answers)
            stack.callback(answers.cancel)
            if body.stream:
                events = self._events(order.shape, answers, body.includes_usage)
                return _Stream(events, stack.pop_all().close)
            return JSONResponse(await self._whole(request, order.shape, answers))

    async def _whole(self, request: Request, shape: Shape, answers: Answers) -> dict[str, Any]:
        work, gone = asyncio.create_task(self._written(answers)), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._seen.why = "gone"
                raise HTTPException(CLIENT_GONE, "nobody waits")
            await work
        except TimeoutError:
            self._seen.why = "timeout"
            raise _late() from None
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        return shape.whole(answers)

    async def _written(self, answers: Answers) -> None:
        async for _ in answers.deltas():
            self._began()

    async def _events(self, shape: Shape, answers: Answers, has_usage: bool) -> AsyncIterator[str]:
        deltas = answers.deltas()
        try:
            yield shape.first(len(answers.choices))
            async for delta in deltas:
                self._began()
                if event := shape.next(delta, answers):
                    yield event
            yield shape.last(answers, has_usage=has_usage)
        except TimeoutError:
            self._seen.why = "timeout"
            yield _event(_late())
        except SaekitError as error:
            self._seen.why = type(error).__name__
            yield _event(_refusal_of(error))
        except (asyncio.CancelledError, GeneratorExit):
            self._seen.why, self._seen.status = "gone", CLIENT_GONE
            raise
        finally:
            await deltas.aclose()  # type: ignore[attr-defined]

    def _began(self) -> None:
        if self._seen.first_s is None:
            self._seen.first_s = asyncio.get_running_loop().time() - self._start

    def _count(self, shape: Shape, answers: Answers) -> None:
        seen = self._seen
        seen.n_prompt, seen.n_written, seen.n_choices = shape.n_prompt, answers.n_written, len(answers.choices)
        seen.steering = shape.prepared.sha256 if shape.prepared.interventions else None


class _Stream(StreamingResponse):
    """A stream that lets go of everything when it ends, or when it never began."""

    def __init__(self, events: AsyncIterator[str], release: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._events, self._release = events, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
            self._release()


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


async def _gone(request: Request) -> None:
    """Ends when whoever asked is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- refusals --------------------------------------------------------------------------------------------------------


def answer_of(refused: exceptions.HTTPException) -> JSONResponse:
    """A refusal in the shape of OpenAI's API."""
    return JSONResponse(_error_of(refused), refused.status_code, refused.headers)


def _error_of(refused: exceptions.HTTPException) -> dict[str, Any]:
    detail: Any = refused.detail
    kind = TYPES.get(refused.status_code, "server_error" if refused.status_code >= 500 else "invalid_request_error")
    if not isinstance(detail, dict):
        return {"error": {"message": str(detail), "type": kind, "param": None, "code": None, "detail": None}}
    code = detail.pop("code", None)
    message = f"{detail['where']}: expected {detail['expected']}, got {detail['got']}. {detail['fix']}"
    return {"error": {"message": message, "type": kind, "param": detail["where"], "code": code, "detail": detail}}


def _event(refused: exceptions.HTTPException) -> str:
    return f"data: {json.dumps(_error_of(refused))}\n\n"


def _late() -> HTTPException:
    fix = "Ask for fewer tokens, or try again later."
    return refusal(504, "server", expected="an answer in time", got="a part of one", fix=fix)


def _refusal_of(error: SaekitError) -> HTTPException:
    status = 404 if isinstance(error, UnknownModelError) else 500 if isinstance(error, EngineError) else 400
    code = "model_not_found" if status == 404 else None
    return HTTPException(status, {**detail_of(error), "code": code})


async def _as_answer(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, SaekitError):
        return answer_of(_refusal_of(error))
    if isinstance(error, exceptions.HTTPException):
        return answer_of(error)
    if isinstance(error, UnicodeEncodeError):  # JSON can spell half a character, which nothing can read
        got = repr(error.object)[:100]
        return answer_of(refusal(400, "request", expected="text of whole characters", got=got, fix="Correct it."))
    if not isinstance(error, RequestValidationError):
        got, fix = type(error).__name__, "Tell whoever runs the server."
        return answer_of(refusal(500, "server", expected="an answer", got=got, fix=fix))
    first = error.errors()[0]
    where, got = ".".join(str(part) for part in first["loc"][1:]) or "body", repr(first.get("input"))[:100]
    return answer_of(refusal(400, where, expected=first["msg"], got=got, fix="Correct it."))

"""The routes of the server: what it tells of itself, and answers.

Flow of a request for an answer: 1. its key says whose it is (`Whose`); 2. `Admission` lets it in, or refuses at once;
3. `steer.serving.desk` makes jobs of it; 4. the engine writes, until the answer ends, its time is over, or whoever
asked is gone. Left out: what stands in front of all routes (`steer.serving.app`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from activations.errors import SaekitError
from steer.browser.guard import Pace, refusal
from steer.serving.admission import Admission
from steer.serving.answers import Shape
from steer.serving.bodies import ChatRequest, CompletionRequest
from steer.serving.desk import Desk, UnknownModelError
from steer.serving.engine import Engine
from steer.serving.keys import Keys
from steer.serving.refusals import event_of, late, refusal_of
from steer.serving.watching import Seen, Watch
from steer.serving.writes import Answers

CLIENT_GONE = 499
"""in logs, of a request whose answer nobody waits for"""
LATE_S = 5.0
"""seconds that whoever reads a stream has behind its end in time"""


class Whose:
    """Says by its key whose a request is."""

    def __init__(self, keys: Keys):
        self._keys, self._pace = keys, Pace()

    async def __call__(self, request: Request) -> str:
        """The key's name; a coroutine, as FastAPI asks others in a thread, which takes longer than the answer.

        Raises: HTTPException for one that is not known.
        """
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        name = self._keys.name_of(key if kind.lower() == "bearer" else None)
        if name is None:
            self._pace.be_wrong(request.client.host if request.client else "")
            fix = "Send Authorization: Bearer KEY."
            raise refusal(401, "request", expected="an API key", got="none that is known", fix=fix)
        return name


def state_router(engine: Engine, admission: Admission, watch: Watch, whose: Whose) -> APIRouter:
    """Whether the server works, and its numbers."""
    router = APIRouter()

    @router.api_route("/health", methods=["GET", "HEAD"])
    def health() -> Response:
        told = {"status": "ok" if engine.is_alive else "down", "answers": admission.n, "model": engine.loaded.id}
        return JSONResponse(told, 200 if engine.is_alive else 503)

    @router.get("/metrics")
    def metrics(key: str = Depends(whose)) -> Response:
        return Response(watch.text(), media_type="text/plain; version=0.0.4")

    return router


def listing_router(desk: Desk, engine: Engine, steering: Callable[[], dict[str, Any]], whose: Whose) -> APIRouter:
    """Names of models, and what steers. Args: steering: all that a request may steer with."""
    router, started = APIRouter(), int(time.time())

    def described(name: str) -> dict[str, Any]:
        steers = [item.model_dump(exclude_none=True) for item in desk.models[name].steer]
        owner = {"id": name, "object": "model", "created": started, "owned_by": "saekit"}
        return {**owner, "max_model_len": engine.most_tokens, "steering": steers}

    @router.get("/v1/models")
    def models(key: str = Depends(whose)) -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in desk.models]}

    @router.get("/v1/models/{name:path}")
    def model(name: str, key: str = Depends(whose)) -> dict[str, Any]:
        if name not in desk.models:
            expected = f"one of {', '.join(desk.models)}"
            raise UnknownModelError("model", expected=expected, got=f"'{name[:100]}'", fix="See GET /v1/models.")
        return described(name)

    @router.get("/v1/steering")
    def listed(key: str = Depends(whose)) -> dict[str, Any]:
        return steering()

    return router


def answers_router(desk: Desk, engine: Engine, admission: Admission, timeout_s: float, whose: Whose) -> APIRouter:
    """Answers. Args: timeout_s: how long one may take."""
    router = APIRouter()

    async def answered(request: Request, body: ChatRequest | CompletionRequest, key: str) -> Response:
        seen = request.state.seen
        seen.key, seen.model = key, body.model[:100]
        return await _Asked(desk, engine, admission, timeout_s, seen).answer(request, body)

    @router.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest, key: str = Depends(whose)) -> Response:
        return await answered(request, body, key)

    @router.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest, key: str = Depends(whose)) -> Response:
        return await answered(request, body, key)

    return router


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
                return _Stream(self._events(order.shape, answers), self._deadline + LATE_S, stack.pop_all().close)
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
            raise late() from None
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        return shape.whole(answers)

    async def _written(self, answers: Answers) -> None:
        async for _ in answers.deltas():
            self._began()

    async def _events(self, shape: Shape, answers: Answers) -> AsyncIterator[str]:
        deltas = answers.deltas()
        try:
            yield shape.first(len(answers.choices))
            async for delta in deltas:
                self._began()
                if event := shape.next(delta, answers):
                    yield event
            yield shape.last(answers)
        except TimeoutError:
            self._seen.why = "timeout"
            yield event_of(late())
        except SaekitError as error:
            self._seen.why = type(error).__name__
            yield event_of(refusal_of(error))
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
        seen.n_prompt, seen.n_written, seen.n_choices = shape.n_prompt, answers.n_read, len(answers.choices)
        seen.steering = shape.prepared.sha256 if shape.prepared.interventions else None


class _Stream(StreamingResponse):
    """A stream that lets go of everything when it ends, or when it never began, or is not read."""

    def __init__(self, events: AsyncIterator[str], deadline: float, release: Callable[[], None]):
        """Args: deadline: of the event loop's clock; somebody who does not read by then is left."""
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._events, self._deadline, self._release = events, deadline, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(TimeoutError):  # the connection is closed, as the stream has no end
                async with asyncio.timeout_at(self._deadline):
                    await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
            self._release()


async def _gone(request: Request) -> None:
    """Ends when whoever asked is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

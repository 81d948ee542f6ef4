"""The feature browser as one web application: an API in JSON, and the page that uses it.

Flow of a request: `steer.browser.guard` looks at it; a router answers, one module a part of the page; a SaekitError
becomes an answer with where, expected, got and fix. Every other path is the page's own, whatever state its address
names. Left out: listening on a port (`steer.browser.serve`).
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib import resources
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from activations.errors import MismatchError, MissingArtefactError, SaekitError, StorageError, UnknownNameError
from steer.browser.accounts import accounts_router
from steer.browser.bench import bench_router
from steer.browser.bench_runs import Runs
from steer.browser.comparisons import Comparisons, comparisons_router
from steer.browser.entry import entry_router
from steer.browser.features import features_router
from steer.browser.guard import REFUSALS, Gatekeeper, Pace, answer_of, refusal
from steer.browser.labelling import Labelling, labelling_router
from steer.browser.labelling_results import results_router
from steer.browser.lists import Listings, lists_router
from steer.browser.maps import maps_router
from steer.browser.meaning import Meaning, meaning_router
from steer.browser.model import SharedModel
from steer.browser.prompts import prompts_router
from steer.browser.roles import AccountOf
from steer.browser.saes import Saes
from steer.browser.sources import Opened
from steer.browser.team import Team

STATIC = resources.files("steer.browser") / "static"
STATUSES: dict[type[SaekitError], int] = {
    UnknownNameError: 404, MissingArtefactError: 404, MismatchError: 409, StorageError: 503,
}  # fmt: skip
"""what an error is over HTTP, by the first that it is one of; 400 otherwise"""


def create_app(
    opened: Opened,
    account_of: AccountOf,
    hosts: Iterable[str],
    model: SharedModel,
    team: Team | None = None,
    database: str | None = None,
    meaning: Meaning | None = None,
) -> FastAPI:
    """The application.

    Args:
      account_of: whose a token is.
      hosts: names that the Host header may have.
      model: what prompts are run through and what is steered.
      team: whose accounts an admin may change; none: there is one account.
      database: URL of the database that keeps what people write of latents; none: each index its own.
      meaning: what labels are searched by beside their words; none: nothing.
    """
    labelling, comparisons, runs = Labelling(opened, database), Comparisons(opened), Runs(model)
    listings, saes = Listings(opened, labelling.standings, None if meaning is None else meaning.of), Saes()

    @asynccontextmanager
    async def closing(app: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=listings.warm, name="warm", daemon=True).start()
        yield
        await asyncio.to_thread(runs.close)
        labelling.close()
        comparisons.close()
        if meaning is not None:
            meaning.close()

    app = FastAPI(
        title="saekit browser", version=version("saekit"), docs_url=None, redoc_url=None, openapi_url=None,
        lifespan=closing, responses=REFUSALS,
    )  # fmt: skip
    app.state.account_of, app.state.pace = account_of, Pace()
    app.add_middleware(GZipMiddleware, minimum_size=1024)
    app.add_middleware(Gatekeeper, hosts=hosts)
    app.add_exception_handler(SaekitError, _as_answer)
    app.add_exception_handler(RequestValidationError, _as_answer)
    app.add_exception_handler(UnicodeEncodeError, _as_answer)
    app.add_exception_handler(HTTPException, _as_answer)

    routers = [
        entry_router(opened, model, is_team=team is not None, has_meaning=meaning is not None),
        lists_router(listings), features_router(listings),
        prompts_router(listings, model, saes), maps_router(opened), comparisons_router(comparisons),
        labelling_router(labelling), results_router(labelling), bench_router(opened, model, saes, runs),
    ]  # fmt: skip
    routers += [] if team is None else [accounts_router(team)]
    routers += [] if meaning is None else [meaning_router(meaning)]
    for router in routers:
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=str(STATIC)), name="static")

    @app.get("/{path:path}", include_in_schema=False)
    def page(path: str) -> Response:
        if path.startswith("api/"):
            raise HTTPException(404)
        return FileResponse(str(STATIC / "index.html"), headers={"cache-control": "no-cache"})

    return app


async def _as_answer(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, SaekitError):
        status = next((code for kind, code in STATUSES.items() if isinstance(error, kind)), 400)
        return answer_of(refusal(status, error.where, expected=error.expected, got=error.got, fix=error.fix))
    if isinstance(error, UnicodeEncodeError):  # JSON can spell half a character, which nothing can store or compare
        expected, got = "text of whole characters", repr(error.object)[:100]
        return answer_of(refusal(422, "request", expected=expected, got=got, fix="Correct it."))
    if isinstance(error, HTTPException):
        return answer_of(_in_four_parts(request, error) if isinstance(error.detail, str) else error)
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where, got = ".".join(str(part) for part in first["loc"]), repr(first.get("input"))[:100]
    return answer_of(refusal(422, where, expected=first["msg"], got=got, fix="Correct it."))


def _in_four_parts(request: Request, error: HTTPException) -> HTTPException:
    """What the framework refuses by itself; of a path the methods of all routes, since each knows of its own only."""
    path, paths = request.url.path, request.app.openapi()["paths"]
    allowed = sorted({method.upper() for each in paths if compile_path(each)[0].match(path) for method in paths[each]})
    if error.status_code in (404, 405) and allowed:
        methods, fix = ", ".join(allowed), "Use another method."
        return refusal(
            405, path, expected=f"the method {methods}", got=request.method, fix=fix, headers={"allow": methods}
        )
    if error.status_code == 404:
        return refusal(404, path, expected="a path of the API", got="another", fix="See /api/openapi.json.")
    return refusal(
        error.status_code, path, expected="a request that can be read", got=error.detail, fix="Correct the request."
    )

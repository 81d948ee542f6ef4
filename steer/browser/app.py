"""The feature browser as one web application: an API in JSON, and the page that uses it.

Flow of a request: `steer.browser.guard` looks at it; a router answers, one module a part of the page; a SaekitError
becomes an answer with where, expected, got and fix. Every other path is the page's own, whatever state its address
names. Left out: listening on a port (`steer.browser.serve`).
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib import resources
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from activations.errors import MismatchError, MissingArtefactError, SaekitError, StorageError, UnknownNameError
from steer.browser.accounts import accounts_router
from steer.browser.bench import bench_router
from steer.browser.comparisons import Comparisons, comparisons_router
from steer.browser.features import features_router
from steer.browser.guard import COOKIE, AccountOf, Gatekeeper, Pace, Viewer
from steer.browser.labelling import Labelling, labelling_router
from steer.browser.lists import Listings, lists_router
from steer.browser.maps import maps_router
from steer.browser.model import SharedModel
from steer.browser.prompts import prompts_router
from steer.browser.sources import Opened
from steer.browser.team import Team

STATIC = resources.files("steer.browser") / "static"
STATUSES: dict[type[SaekitError], int] = {
    UnknownNameError: 404, MissingArtefactError: 404, MismatchError: 409, StorageError: 503,
}  # fmt: skip
"""what an error is over HTTP, by the first that it is one of; 400 otherwise"""


class About(BaseModel):
    """What is open, and who asks."""

    version: str
    account: str
    role: str
    sources: list[dict[str, Any]]
    libraries: list[str]
    model: str | None
    model_state: str
    is_team: bool


class Login(BaseModel):
    """A token that is to be kept as a cookie."""

    token: str


def create_app(
    opened: Opened,
    account_of: AccountOf,
    hosts: Iterable[str],
    model: SharedModel,
    team: Team | None = None,
    database: str | None = None,
) -> FastAPI:
    """The application.

    Args:
      account_of: whose a token is.
      hosts: names that the Host header may have.
      model: what prompts are run through and what is steered.
      team: whose accounts an admin may change; none: there is one account.
      database: URL of the database that keeps what people write of latents; none: each index its own.
    """
    labelling, comparisons = Labelling(opened, database), Comparisons(opened)

    @asynccontextmanager
    async def closing(app: FastAPI) -> AsyncIterator[None]:
        yield
        labelling.close()
        comparisons.close()

    app = FastAPI(
        title="saekit browser", version=version("saekit"), docs_url=None, redoc_url=None, openapi_url=None,
        lifespan=closing,
    )  # fmt: skip
    app.state.account_of, app.state.pace = account_of, Pace()
    app.add_middleware(GZipMiddleware, minimum_size=1024)
    app.add_middleware(Gatekeeper, hosts=hosts)
    app.add_exception_handler(SaekitError, _as_answer)
    app.add_exception_handler(RequestValidationError, _as_answer)

    @app.get("/api/about")
    def about(account: Viewer) -> About:
        sources = [
            {"name": each.name, "d_sae": each.index.info["d_sae"], "model": each.index.info["model"]["id"],
             "n_tokens": each.index.info["n_tokens"], "path": str(each.path), "can_run": each.sae is not None}
            for each in opened.sources.values()
        ]  # fmt: skip
        return About(
            version=version("saekit"), account=account.name, role=account.role, sources=sources,
            libraries=[str(path) for path in opened.libraries], model=model.spec, model_state=model.state,
            is_team=team is not None,
        )  # fmt: skip

    @app.get("/api/openapi.json")
    def schema(account: Viewer) -> dict[str, Any]:
        return app.openapi()

    @app.post("/api/login", status_code=204)
    def login(given: Login, request: Request) -> Response:
        if account_of(given.token) is None:
            app.state.pace.be_wrong(request.client.host if request.client else "")
            raise HTTPException(401, {"where": "token", "expected": "a token that is known", "got": "another",
                                      "fix": "Copy it again from what saekit browse printed."})  # fmt: skip
        return _kept(Response(status_code=204), given.token, request)

    listings = Listings(opened)
    for router in (
        lists_router(listings), features_router(listings), prompts_router(listings, model), maps_router(opened),
        comparisons_router(comparisons), labelling_router(labelling), bench_router(opened, model),
    ):  # fmt: skip
        app.include_router(router)
    if team is not None:
        app.include_router(accounts_router(team))
    app.mount("/static", StaticFiles(directory=str(STATIC)), name="static")

    @app.get("/{path:path}", include_in_schema=False)
    def page(path: str) -> Response:
        if path.startswith("api/"):
            raise HTTPException(404, {"where": f"/{path}", "expected": "a path of the API", "got": "another",
                                      "fix": "See /api/openapi.json."})  # fmt: skip
        return FileResponse(str(STATIC / "index.html"), headers={"cache-control": "no-cache"})

    return app


def _kept(response: Response, token: str, request: Request) -> Response:
    is_secure = request.url.scheme == "https"  # also behind a proxy on this machine that says so
    response.set_cookie(COOKIE, token, max_age=30 * 86400, httponly=True, samesite="strict", secure=is_secure)
    return response


async def _as_answer(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, SaekitError):
        detail = {"where": error.where, "expected": error.expected, "got": error.got, "fix": error.fix}
        status = next((code for kind, code in STATUSES.items() if isinstance(error, kind)), 400)
        return JSONResponse({"detail": detail}, status)
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    got = repr(first.get("input"))[:100]
    return JSONResponse({"detail": {"where": where, "expected": first["msg"], "got": got, "fix": "Correct it."}}, 422)

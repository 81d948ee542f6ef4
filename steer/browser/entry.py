"""The way in: who asks, what is open, and how a token becomes a cookie."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from steer.browser.guard import COOKIE, Viewer, refusal
from steer.browser.model import SharedModel
from steer.browser.sources import Opened
from steer.items import Body


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
    has_meaning: bool
    """whether labels can be searched by meaning"""


class Login(Body):
    """A token that is to be kept as a cookie."""

    token: str


def entry_router(opened: Opened, model: SharedModel, *, is_team: bool, has_meaning: bool) -> APIRouter:
    """Routes that any page begins with."""
    router = APIRouter(prefix="/api")

    @router.get("/about")
    def about(account: Viewer) -> About:
        sources = [
            {"name": each.name, "d_sae": each.index.info["d_sae"], "model": each.index.info["model"]["id"],
             "n_tokens": each.index.info["n_tokens"], "path": str(each.path), "can_run": each.sae is not None}
            for each in opened.sources.values()
        ]  # fmt: skip
        return About(
            version=version("saekit"), account=account.name, role=account.role, sources=sources,
            libraries=[str(path) for path in opened.libraries], model=model.spec, model_state=model.state,
            is_team=is_team, has_meaning=has_meaning,
        )  # fmt: skip

    @router.get("/openapi.json")
    def schema(account: Viewer, request: Request) -> dict[str, Any]:
        return request.app.openapi()

    @router.post("/login", status_code=204)
    def login(given: Login, request: Request) -> Response:
        if request.app.state.account_of(given.token) is None:
            request.app.state.pace.be_wrong(request.client.host if request.client else "")
            fix = "Copy it again from what saekit browse printed."
            raise refusal(401, "token", expected="a token that is known", got="another", fix=fix)
        return _kept(Response(status_code=204), given.token, request)

    return router


def _kept(response: Response, token: str, request: Request) -> Response:
    is_secure = request.url.scheme == "https"  # also behind a proxy on this machine that says so
    response.set_cookie(COOKIE, token, max_age=30 * 86400, httponly=True, samesite="strict", secure=is_secure)
    return response

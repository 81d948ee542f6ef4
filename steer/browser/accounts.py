"""Accounts over HTTP: an admin lists, adds, changes and revokes them."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from steer.browser.guard import Admin
from steer.browser.roles import Role
from steer.browser.team import Team
from steer.items import Body

Name = Annotated[str, Path(min_length=1, max_length=64)]


class NewAccount(Body):
    """An account to be."""

    name: str = Field(min_length=1, max_length=64)
    role: Role


class NewRole(Body):
    """What an account may do from now on."""

    role: Role


class Token(BaseModel):
    """A token, shown this once."""

    name: str
    token: str


class PersonOut(BaseModel):
    """An account, without its token."""

    name: str
    role: Role
    created: str
    is_active: bool


def accounts_router(team: Team) -> APIRouter:
    """The routes of /api/people."""
    router = APIRouter(prefix="/api/people")

    @router.get("")
    def people(account: Admin) -> list[PersonOut]:
        return [PersonOut(**asdict(each)) for each in team.people()]

    @router.post("", status_code=201)
    def add(given: NewAccount, account: Admin) -> Token:
        return Token(name=given.name, token=team.add(given.name, given.role))

    @router.patch("/{name}", status_code=204)
    def change(name: Name, given: NewRole, account: Admin) -> None:
        team.change(name, given.role)

    @router.post("/{name}/token")
    def renew(name: Name, account: Admin) -> Token:
        return Token(name=name, token=team.renew(name))

    @router.delete("/{name}", status_code=204)
    def revoke(name: Name, account: Admin) -> None:
        team.revoke(name)

    return router

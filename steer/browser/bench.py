"""The steering bench: a basket of vectors and latents, texts that are written under it, and saving what was found.

Left out: finding vectors (`steer.browser.basket`); writing texts (`steer.browser.bench_runs`).
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from activations.errors import ConfigError, MismatchError
from steer.browser.basket import (
    Basket,
    Catalogue,
    Item,
    Shelf,
    as_used,
    interventions,
    refusals,
)
from steer.browser.bench_runs import Asked, Doses, Run, Runs
from steer.browser.guard import Annotator, Viewer, detail_of
from steer.browser.model import SharedModel
from steer.browser.saes import Saes
from steer.browser.sources import Opened
from steer.items import MOST_ITEMS, Body, Entry, entry_of

if TYPE_CHECKING:
    from steer.vectors import SteeringVector

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}(@[a-z_]+\.[0-9]{1,4})?$")]
EVENTS = "text/event-stream"


class Weighed(Body):
    """A basket whose parts are compared."""

    basket: Basket
    force: bool = False


class Kept(Body):
    """What is saved, and where."""

    library: int = Field(ge=0, le=10_000, description="number in the catalogue")
    basket: Basket
    names: list[Name] = Field(max_length=MOST_ITEMS, description="one for each item")


def bench_router(opened: Opened, model: SharedModel, saes: Saes, runs: Runs) -> APIRouter:
    """Routes of the bench."""
    router, shelf, saving = APIRouter(prefix="/api/bench"), Shelf(opened, saes), threading.Lock()

    @router.get("/catalogue")
    def catalogue(account: Viewer) -> Catalogue:
        return shelf.catalogue()

    @router.get("/latent")
    def latent(account: Viewer, ref: str) -> Entry:
        return entry_of(ref, shelf.find(Item(latent=ref[:300])))

    @router.post("/stream", response_class=Response, responses={200: {"content": {EVENTS: {}}}})
    async def stream(account: Viewer, asked: Asked) -> StreamingResponse:
        steers = await asyncio.to_thread(shelf.steers, asked.basket)
        await asyncio.to_thread(interventions, steers)  # refuses before anything is streamed
        run = Run(asked, steers, account.name, asyncio.get_running_loop())
        return StreamingResponse(runs.start(run), media_type=EVENTS, headers={"cache-control": "no-store"})

    @router.post("/interference")
    def interference(account: Viewer, weighed: Weighed) -> dict[str, Any]:
        refused = refusals(shelf, weighed.basket, model.loaded, force=weighed.force)
        sound = [item for item, why in zip(weighed.basket, refused, strict=True) if why is None]
        return {"items": refused, "together": _together(shelf, sound)}

    @router.post("/save")
    def save(account: Annotator, kept: Kept) -> list[Entry]:
        with saving:
            return _save(shelf, kept, account.name)

    @router.post("/{run}/doses", status_code=204)
    def doses(account: Viewer, run: str, given: Doses) -> None:
        runs.dose(run, account.name, given)

    return router


def _together(shelf: Shelf, basket: Basket) -> dict[str, Any]:
    from steer.composition import composition, cosines

    used = [each for steer in shelf.steers(basket) for each in as_used(steer)]
    try:
        found = composition(used).as_json()
    except MismatchError as error:
        return {"refused": detail_of(error)}
    return {**found, "names": [each.name for each in used], "cosines": cosines(used).round(4).tolist() if used else []}


def _save(shelf: Shelf, kept: Kept, author: str) -> list[Entry]:
    """Add to a library. Raises: ConfigError for a name that is taken, or a library that cannot be written."""
    from steer.library import group_name, grouped, load_library
    from steer.making.make import add_to_library

    path = shelf.library(kept.library)
    if len(kept.names) != len(kept.basket) or len(set(kept.names)) != len(kept.names):
        raise ConfigError("names", expected="one for each item, all different", got=kept.names, fix="Correct them.")
    taken = {group_name(name) for name in load_library(path)} & {group_name(name) for name in kept.names}
    if taken:
        fix = "Choose another; nothing is overwritten."
        raise ConfigError("names", expected="names that are free", got=", ".join(sorted(taken)), fix=fix)
    vectors = []
    for name, item, steer in zip(kept.names, kept.basket, shelf.steers(kept.basket), strict=True):
        steer.interventions()  # refuses a scope or gate that is none before it is written
        vectors += _of_item(name, item, shelf.find(item), as_used(steer), author)
    try:
        add_to_library(path, *vectors)
    except OSError as error:
        got = error.strerror
        raise ConfigError("library", expected="one that can be written", got=got, fix="Open another.") from error
    groups = grouped({vector.name: vector for vector in vectors}).items()
    return [entry_of(f"{kept.library}/{name}", parts) for name, parts in groups]


def _of_item(
    name: str, item: Item, vectors: list[SteeringVector], used: list[SteeringVector], author: str
) -> list[SteeringVector]:
    """The vectors of an item as a library keeps them. Raises: ConfigError for a name behind an @ that is not theirs."""
    from steer.library import group_name

    own = group_name(name)
    if name != own and name not in [f"{own}@{vector.hook_point}" for vector in vectors[:1] if len(vectors) == 1]:
        expected = f"a name, or NAME@{vectors[0].hook_point}" if len(vectors) == 1 else "a name, of a group"
        raise ConfigError("names", expected=expected, got=name, fix="Leave out what is behind the @.")
    names = [name] if len(vectors) == 1 else [f"{own}@{vector.hook_point}" for vector in vectors]
    kept = []
    for own_name, vector, as_it_is in zip(names, vectors, used, strict=True):
        is_measured = (as_it_is.operation, as_it_is.scope) == (vector.operation, vector.scope) and item.gate is None
        source = {**vector.source, "bench": {"of": vector.name, "sha256": vector.sha256, "by": author}}
        gate = vector.gate if item.gate is None else item.gate.of(vector)
        receipts = vector.receipts if is_measured else []
        kept.append(replace(as_it_is, name=own_name, source=source, gate=gate, receipts=receipts))
    return kept

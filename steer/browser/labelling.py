"""Labelling sessions over HTTP: who labels what next, and what was decided.

Whoever asks is the author: no request names another. A page sends each event under a key of its own and again until it
is answered (`sae.annotation.events`). While a session is blind, what others wrote is left out. Left out: what a latent
looks like (`steer.browser.features`), and what came of a session (`steer.browser.labelling_results`).
"""

import threading
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from activations.errors import ConfigError
from sae.annotation import sources
from sae.annotation.events import ADJUDICATE, MAX_INTEGER, MAX_KEY, MAX_NAME, MAX_TEXT, Draft, NewEvent
from sae.annotation.queues import Known, QueueSpec, order, verdicts_of
from sae.annotation.sessions import LabellingSession
from sae.annotation.standing import Standings
from sae.annotation.state import states
from sae.annotation.store import AnnotationStore
from sae.vocabulary import visible
from steer.browser.guard import Annotator, Viewer
from steer.browser.lists import Latent, SourceName
from steer.browser.sources import Opened, Source
from steer.items import Body

Number = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
SessionNumber = Annotated[int, Query(ge=0, le=MAX_INTEGER)]


class _Asked(Body):
    source: str = Field(max_length=200)


class NewSession(_Asked):
    """A session to be."""

    name: str = Field(min_length=1, max_length=MAX_NAME)
    kind: str = Field("random", max_length=40)
    seed: Number = 0
    n: int | None = Field(None, ge=1, le=MAX_INTEGER)
    low: float = Field(0.0, ge=0, le=1)
    high: float = Field(1.0, ge=0, le=1)
    annotators_per_latent: int = Field(1, ge=1, le=100)
    blind: bool = False


class Session(BaseModel):
    """A session, and how far it is."""

    id: int
    name: str
    queue: dict[str, Any]
    annotators_per_latent: int
    blind: bool
    is_blind_now: bool
    created: str
    progress: dict[str, Any]


class Wanted(_Asked):
    """Latents that somebody wants to label."""

    session: Number
    n: int = Field(5, ge=1, le=50)
    latent: Number | None = None
    """this one, wherever it is in the queue; none: the next"""


class SentEvent(_Asked):
    """An event, whose author is whoever sends it."""

    key: str = Field(min_length=1, max_length=MAX_KEY)
    latent: Number
    session: Number | None = None
    action: str = Field(max_length=20)
    text: str = Field("", max_length=MAX_TEXT)
    note: str = Field("", max_length=MAX_TEXT)
    seen_label: Number | None = None
    seen_text: str | None = Field(None, max_length=MAX_TEXT)
    undoes: Number | None = None
    tab: str = Field("", max_length=MAX_KEY)
    revision: Number = 0


class SentDraft(_Asked):
    """What was typed and not decided on."""

    latent: Number
    session: Number
    text: str = Field(max_length=MAX_TEXT)
    tab: str = Field(min_length=1, max_length=MAX_KEY)
    revision: int = Field(ge=1, le=MAX_INTEGER)


class SessionOf(_Asked):
    """A session by its number."""

    session: Number


class Labelling:
    """The annotations of every source, opened when they are first asked for."""

    def __init__(self, opened: Opened, url: str | None = None):
        self._opened, self._url = opened, url
        self._stores: dict[str, AnnotationStore] = {}
        self._standings: dict[str, Standings] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> tuple[Source, AnnotationStore]:
        """A source and its annotations. Raises: UnknownNameError; as AnnotationStore.open does."""
        source = self._opened.source(name)
        with self._lock:
            if name not in self._stores:
                self._stores[name] = AnnotationStore.open(source.path, url=self._url)
            return source, self._stores[name]

    def standings(self, name: str) -> Standings:
        """What people decided of a source's latents. Raises: as `of` does."""
        store = self.of(name)[1]
        with self._lock:
            return self._standings.setdefault(name, Standings(store))

    def close(self) -> None:
        """Release the databases."""
        for store in self._stores.values():
            store.close()


def labelling_router(labelling: Labelling) -> APIRouter:
    """Routes for whoever labels."""
    router = APIRouter(prefix="/api/label")

    @router.get("/sessions")
    def sessions(account: Viewer, source: SourceName) -> list[Session]:
        store = labelling.of(source)[1]
        return [session_out(store, each) for each in store.sessions()]

    @router.post("/sessions", status_code=201)
    def create(account: Annotator, new: NewSession) -> Session:
        source, store = labelling.of(new.source)
        spec = QueueSpec(new.kind, new.seed, new.n, new.low, new.high)
        made = store.create_session(
            new.name, order(spec, _known(source, store, new.kind)), queue=spec.json(), seed=new.seed,
            annotators_per_latent=new.annotators_per_latent, blind=new.blind,
        )  # fmt: skip
        return session_out(store, made)

    @router.get("/authors")
    def authors(account: Viewer, source: SourceName) -> list[str]:
        """Whose decisions a list can be asked for."""
        return labelling.standings(source).authors(account.name)

    @router.post("/lease")
    def lease(account: Annotator, wanted: Wanted) -> dict[str, Any]:
        store = labelling.of(wanted.source)[1]
        if wanted.latent is not None and not store.claim(wanted.session, account.name, wanted.latent):
            return {"latents": [], "is_mine": False}
        return {"latents": store.lease(wanted.session, account.name, wanted.n), "is_mine": True}

    @router.post("/release")
    def release(account: Annotator, given: SessionOf) -> dict[str, int]:
        return {"latents": labelling.of(given.source)[1].release(given.session, account.name)}

    @router.post("/events")
    def record(account: Annotator, sent: SentEvent) -> dict[str, Any]:
        store = labelling.of(sent.source)[1]
        if sent.action == ADJUDICATE and not account.may("admin"):
            raise ConfigError("action", expected="an admin to adjudicate", got=account.role, fix="Ask an admin.")
        event = store.record(NewEvent(author=account.name, **sent.model_dump(exclude={"source"})))
        if not store.is_own:
            store.publish()
        return _shown(event)

    @router.post("/drafts")
    def draft(account: Annotator, sent: SentDraft) -> dict[str, Any]:
        store = labelling.of(sent.source)[1]
        kept, is_this_one = store.save_draft(Draft(author=account.name, **sent.model_dump(exclude={"source"})))
        return {"revision": kept.revision, "is_this_one": is_this_one}

    @router.get("/desk")
    def desk(account: Viewer, source: SourceName, session: SessionNumber) -> dict[str, Any]:
        """What stands beside a latent while somebody labels: the session, their pace, and their last ten decisions."""
        store = labelling.of(source)[1]
        last = store.last(account.name, session=session)
        return {
            "session": session_out(store, store.session(session)).model_dump(),
            "pace": asdict(store.pace(account.name, session=session)),
            "last": [_shown(event) | {"counts": counts} for event, counts in last],
        }

    @router.get("/latent")
    def latent(account: Viewer, source: SourceName, session: SessionNumber, latent: Latent) -> dict[str, Any]:
        """What is known of a latent to whoever labels it: suggestions, what they said before, and a draft."""
        opened, store = labelling.of(source)
        store.position(session, latent)
        hidden = store.people() - {account.name} if store.session(session).is_blind_now else set()
        said = [label for label in opened.index.labels(latent) if label.author not in hidden]
        drafts = store.drafts(account.name, latent=latent, session=session)
        return {
            "state": asdict(store.state(latent, account.name, session=session)),
            "draft": drafts[-1].text if drafts else "",
            "suggestions": [
                {"id": each.id, "kind": each.kind, "text": visible(each.text), "author": visible(each.author)}
                for each in said
            ],
            "history": [_shown(event) for event in store.history(latent, viewer=account.name)],
        }

    return router


def session_out(store: AnnotationStore, session: LabellingSession) -> Session:
    values = {name: getattr(session, name) for name in Session.model_fields if name != "progress"}
    return Session(**values, progress=store.progress(session.id)._asdict())


def _known(source: Source, store: AnnotationStore, kind: str) -> Known:
    """What a kind of queue is ordered by, and no more, since labels and scores of all latents take a while."""
    return Known(
        density=source.index.columns()["density"],
        margins=sources.margins(store) if kind == "uncertainty" else {},
        labelled=sources.labelled(store) if kind == "unlabelled" else (),
        verdicts=verdicts_of(states(store.events())) if kind == "disagreement" else {},
    )


def _shown(event: Any) -> dict[str, Any]:
    kept = ("id", "latent", "author", "action", "session", "text", "note", "undoes", "created", "key")
    return {name: getattr(event, name) for name in kept}

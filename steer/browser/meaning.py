"""Search by meaning, where an embedding model is configured: labels are read once, in the background, then ranked.

Flow: 1. the page asks for a source, and one worker embeds its labels, which takes seconds for thousands; 2. the page
asks how far it is; 3. a list is ranked by the cosine of labels and text (`sae.labels.meaning`). The model is loaded
when it is first asked for. Left out: lists (`steer.browser.lists`).
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from activations.errors import ConfigError, ModelError, SaekitError
from activations.quiet import first_line
from steer.browser.guard import Viewer
from steer.browser.lists import SourceName
from steer.browser.sources import Opened, Source
from steer.items import Body

if TYPE_CHECKING:
    from activations.sentences import SentenceModel
    from sae.labels.meaning import Meanings


class Wanted(Body):
    """Whose labels are to be read."""

    source: str = Field(max_length=200)


class State(BaseModel):
    """How far the labels of a source are read."""

    state: Literal["not begun", "running", "ready", "failed"]
    n_done: int = 0
    n_texts: int = 0
    """0 while that is not known"""
    problem: str | None = None


class Meaning:
    """Labels by meaning, of every source."""

    def __init__(self, opened: Opened, spec: str, device: str = "auto", model: SentenceModel | None = None):
        """Args: spec: as `load_sentence_model` takes it."""
        self.spec, self._opened, self._device, self._model = spec, opened, device, model
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="meaning")
        self._known: dict[str, Meanings] = {}
        self._reading: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    def begin(self, name: str) -> State:
        """Read the labels of a source that are not read yet. Raises: UnknownNameError."""
        source = self._opened.source(name)
        with self._lock:
            reading, known = self._reading.get(name), self._known.get(name)
            if (reading is None or reading.done()) and not (known is not None and known.is_current):
                self._reading[name] = self._worker.submit(self._read, source)
        return self.state(name)

    def state(self, name: str) -> State:
        """How far it is. Raises: UnknownNameError."""
        self._opened.source(name)
        reading, known = self._reading.get(name), self._known.get(name)
        if reading is None or reading.cancelled():
            return State(state="not begun")
        done, texts = (known.n_done, known.n_texts) if known is not None else (0, 0)
        if not reading.done():
            return State(state="running", n_done=done, n_texts=texts)
        if (error := reading.exception()) is not None:
            return State(state="failed", problem=str(error))
        return State(state="ready", n_done=done, n_texts=texts)

    def of(self, name: str) -> Meanings:
        """The labels of a source. Raises: ConfigError before they are read."""
        known = self._known.get(name)
        if known is None or known.revision is None:
            fix = "Ask for it first: POST /api/meaning."
            raise ConfigError("how", expected="labels that are read", got="none", fix=fix)
        return known

    def close(self) -> None:
        """Begin nothing more."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        for each in self._known.values():
            each.close()

    def _read(self, source: Source) -> None:
        from sae.labels.meaning import Meanings

        if source.name not in self._known:
            self._known[source.name] = Meanings(source.index, source.path, self._loaded())
        self._known[source.name].read()

    def _loaded(self) -> SentenceModel:
        from activations.sentences import load_sentence_model

        if self._model is None:
            try:
                self._model = load_sentence_model(self.spec, device=self._device)
            except SaekitError:
                raise
            except (OSError, RuntimeError) as error:
                expected, fix = "a model that can be loaded", "Check embedding=…"
                raise ModelError(self.spec, expected=expected, got=first_line(error), fix=fix) from error
        return self._model


def meaning_router(meaning: Meaning) -> APIRouter:
    """Routes of labels by meaning."""
    router = APIRouter(prefix="/api/meaning")

    @router.post("", status_code=202)
    def begin(account: Viewer, wanted: Wanted) -> State:
        return meaning.begin(wanted.source)

    @router.get("")
    def state(account: Viewer, source: SourceName) -> State:
        return meaning.state(source)

    return router

"""The language model behind prompts and the steering bench: loaded when it is first needed, used by one at a time.

Steering hooks into the model's modules, so two users at once would steer each other. Left out: what is done with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from activations.errors import ModelError, SaekitError

if TYPE_CHECKING:
    from activations.models import LoadedModel

WAIT_S = 120.0
"""seconds that somebody waits for another's use to end"""


class SharedModel:
    """One model of a browser. Opening a browser loads nothing, not even torch."""

    def __init__(self, spec: str | None, device: str = "auto", loaded: LoadedModel | None = None):
        """Args: spec: as `load_model` takes it; none: there is no model."""
        self.spec, self._device, self._loaded = spec, device, loaded
        self._loading, self._used = threading.Lock(), threading.Lock()

    @property
    def state(self) -> Literal["none", "not loaded", "loading", "ready"]:
        """Whether somebody who uses it has to wait."""
        if self._loaded is not None:
            return "ready"
        if self.spec is None:
            return "none"
        return "loading" if self._loading.locked() else "not loaded"

    @property
    def is_busy(self) -> bool:
        """Whether somebody who uses it now has to wait."""
        return self._loaded is None or self._used.locked()

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, if it is loaded, for what is read off it; to run it, see `using`."""
        return self._loaded

    @contextmanager
    def using(self) -> Iterator[LoadedModel]:
        """The model, for whoever asked, alone until the context ends; blocks while it is loaded or used.

        Raises: ModelError if there is none, or another use does not end; as `load_model` does.
        """
        loaded = self._get()
        if not self._used.acquire(timeout=WAIT_S):
            fix = "Try again, or stop the other answer."
            raise ModelError("model", expected="nobody else to use it", got=f"{WAIT_S:.0f} s of waiting", fix=fix)
        try:
            yield loaded
        finally:
            self._used.release()

    def _get(self) -> LoadedModel:
        if self._loaded is None:
            if self.spec is None:
                fix = "Start saekit browse with --set model=…"
                raise ModelError("model", expected="a model to run", got="none", fix=fix)
            with self._loading:
                if self._loaded is None:
                    self._loaded = self._load(self.spec)
        return self._loaded

    def _load(self, spec: str) -> LoadedModel:
        from activations.models import load_model

        try:
            return load_model(spec, device=self._device)
        except SaekitError:
            raise
        except (OSError, RuntimeError) as error:
            got = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ModelError(spec, expected="a model that can be loaded", got=got, fix="Check model=…") from error

"""What the bench steers with: vectors of opened libraries and latents of opened sources, by reference.

A vector is NUMBER/NAME, the number being its library's in the catalogue; a latent is SOURCE:N. No path of a request is
ever opened. Left out: generating (`steer.browser.bench_runs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from activations.errors import ConfigError, MissingArtefactError, UnknownNameError
from steer.browser.saes import Saes
from steer.browser.sources import Opened, Source

if TYPE_CHECKING:
    from steer.chat.state import Steer
    from steer.operations import Intervention
    from steer.vectors import SteeringVector

MOST_ITEMS = 8
Ref = Annotated[str, Field(max_length=300)]
Dose = Annotated[float, Field(ge=-16, le=16, allow_inf_nan=False)]
Level = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class Levels(BaseModel):
    """Energies between which a gate opens and shuts."""

    on: Level
    off: Level | None = None
    tokens: int = Field(1, ge=1, le=1024)


class Item(BaseModel):
    """One thing that steers."""

    vector: Ref | None = None
    """NUMBER/NAME of the catalogue"""
    latent: Ref | None = None
    """SOURCE:N"""
    dose: Dose | None = None
    """none: the vector's own; of an ablation, its share"""
    operation: Literal["add", "rotate", "ablate"] | None = None
    scope: Annotated[str, Field(max_length=200)] | None = None
    gate: Levels | None = None


Basket = Annotated[list[Item], Field(max_length=MOST_ITEMS)]


class Entry(BaseModel):
    """A vector as the page shows it; doses are coefficients over the mean norm."""

    ref: str
    name: str
    hook_point: str
    coefficient: float
    dose: float
    window: tuple[float, float] | None
    operation: str
    scope: str
    gated: bool
    headline: str


class Shelf:
    """Finds vectors."""

    def __init__(self, opened: Opened, saes: Saes):
        self.opened, self._saes = opened, saes

    def catalogue(self) -> list[Entry]:
        """Vectors of every library. Raises: as `load_library` does."""
        from steer.library import load_library

        libraries = enumerate(self.opened.libraries)
        return [entry_of(f"{i}/{name}", v) for i, path in libraries for name, v in load_library(path).items()]

    def library(self, number: int) -> Path:
        """A library by its number. Raises: UnknownNameError."""
        if not 0 <= number < len(self.opened.libraries):
            expected = f"a number below {len(self.opened.libraries)}"
            raise UnknownNameError("library", expected=expected, got=number, fix="See the catalogue.")
        return self.opened.libraries[number]

    def find(self, item: Item) -> SteeringVector:
        """The vector of an item. Raises: ConfigError, UnknownNameError, MissingArtefactError."""
        if (item.vector is None) == (item.latent is None):
            raise ConfigError("basket", expected="a vector or a latent", got="both or neither", fix="Give one of them.")
        if item.vector is not None:
            from steer.library import find_vector

            number, _, name = item.vector.partition("/")
            return find_vector(self.library(_number(number)), name)
        source, _, latent = (item.latent or "").rpartition(":")
        return self._latent(source, _number(latent))

    def steers(self, basket: Sequence[Item]) -> list[Steer]:
        """What a basket does. Raises: as `find` does.

        A gate is put onto the vector here, once: the runtime takes two of one name for a mistake, and a run asks for
        its interventions again with each change of doses.
        """
        from steer.chat.state import Steer

        found: dict[str, SteeringVector] = {}
        steers = []
        for number, item in enumerate(basket, 1):
            ref = item.vector or item.latent or ""
            vector = found.setdefault(ref, self.find(item))
            if (levels := item.gate) is not None:
                gate = vector.energy_gate(levels.on, levels.off, levels.tokens)
                vector = replace(vector, gate=replace(gate, name=f"{vector.name}, {number}"))
            steers.append(Steer(ref, (vector,), item.dose, item.operation, item.scope))
        return steers

    def _latent(self, name: str, latent: int) -> SteeringVector:
        from activations.store_schema import ModelRef
        from steer.latents import places_of
        from steer.vectors import from_latent

        source = self.opened.source(name)
        artefact, _ = self._saes.get(source)
        model = ModelRef.model_validate(source.index.info["model"])
        return from_latent(artefact, latent, model, self._mean_norm(source, str(places_of(artefact).writes), model))

    def _mean_norm(self, source: Source, hook_point: str, model: Any) -> float:
        """Of the store that the index was built from, or of a vector of the same place."""
        from activations.errors import SaekitError
        from activations.store import ActivationStore
        from steer.library import load_library

        if source.store is not None:
            with suppress(SaekitError, OSError):
                return ActivationStore.open(source.store).stats(hook_point).mean_norm
        for path in self.opened.libraries:
            for vector in load_library(path).values():
                if (vector.hook_point, vector.model.fingerprint) == (hook_point, model.fingerprint):
                    return vector.mean_norm
        fix = "Keep the store, or open a library with a vector of this hook point."
        raise MissingArtefactError(source.name, expected=f"the mean norm at {hook_point}", got="none", fix=fix)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UnknownNameError("basket", expected="a number in NUMBER/NAME or SOURCE:N", got=repr(text), fix="Add it.")
    return int(text)


def entry_of(ref: str, vector: SteeringVector) -> Entry:
    """A vector for the page."""
    low, high = vector.window or (0.0, 0.0)
    window = None if vector.window is None else (low / vector.mean_norm, high / vector.mean_norm)
    receipts = len(vector.receipts)
    return Entry(
        ref=ref, name=vector.name, hook_point=vector.hook_point, coefficient=vector.coefficient,
        dose=vector.coefficient if vector.operation == "ablate" else vector.coefficient / vector.mean_norm,
        window=window, operation=vector.operation, scope=vector.scope, gated=vector.gate is not None,
        headline=f"{receipts} receipt{'' if receipts == 1 else 's'}" if receipts else "not measured",
    )  # fmt: skip


def as_used(steer: Steer) -> list[SteeringVector]:
    """The vectors of a steer at the coefficients and for the operation it uses them for."""
    pairs = zip(steer.vectors, steer.coefficients, strict=True)
    return [replace(steer.used(v), name=steer.name, coefficient=c, scope=steer.scope or v.scope) for v, c in pairs]


def interventions(steers: Sequence[Steer]) -> list[Intervention]:
    """Of all steers. Raises: as `Steer.interventions` does."""
    return [each for steer in steers for each in steer.interventions()]


def random_control(steers: Sequence[Steer], seed: int) -> list[Intervention]:
    """The same, each direction a random one of unit length; gates read what they read."""
    from steer.operations import Intervention
    from steer.scopes import Scope

    rng, found = np.random.default_rng(seed), []
    for used in (each for steer in steers for each in as_used(steer)):
        drawn = rng.standard_normal(len(used.direction)).astype(np.float32)
        turned = replace(used, direction=drawn / np.linalg.norm(drawn))
        found.append(Intervention.of(turned, used.coefficient, scope=Scope.parse(used.scope)))
    return found

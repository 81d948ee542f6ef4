"""What the bench steers with: vectors of opened libraries and latents of opened sources, by reference.

A vector is NUMBER/NAME, the number being its library's in the catalogue, and so are vectors NAME@HOOK_POINT that belong
together (`steer.groups`): one item, at the dose of the lead. A latent is SOURCE:N. No path of a request is ever opened.
Left out: generating (`steer.browser.bench_runs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from activations.errors import ConfigError, MissingArtefactError, SaekitError, UnknownNameError
from steer.browser.guard import detail_of
from steer.browser.saes import Saes
from steer.browser.sources import Opened, Source
from steer.items import MOST_ITEMS, Entry, Ref, Use, entry_of, steer_of

if TYPE_CHECKING:
    from activations.models import LoadedModel
    from steer.chat.state import Steer
    from steer.operations import Intervention
    from steer.vectors import SteeringVector


class Item(Use):
    """One thing that steers."""

    vector: Ref | None = None
    """NUMBER/NAME of the catalogue"""
    latent: Ref | None = None
    """SOURCE:N"""


Refused = dict[str, str]
"""an error in its four parts"""
Basket = Annotated[list[Item], Field(max_length=MOST_ITEMS)]


class Problem(BaseModel):
    """A library that cannot be read."""

    library: int
    name: str
    detail: Refused


class Catalogue(BaseModel):
    """What the libraries hold."""

    vectors: list[Entry]
    problems: list[Problem]


class Shelf:
    """Finds vectors."""

    def __init__(self, opened: Opened, saes: Saes):
        self.opened, self._saes = opened, saes

    def catalogue(self) -> Catalogue:
        """Vectors and groups of every library, and of those that cannot be read, why."""
        from steer.library import grouped, load_library

        found = Catalogue(vectors=[], problems=[])
        for number, path in enumerate(self.opened.libraries):
            try:
                groups = grouped(load_library(path)).items()
                found.vectors += [entry_of(f"{number}/{name}", vectors) for name, vectors in groups]
            except SaekitError as error:
                found.problems.append(Problem(library=number, name=path.name, detail=detail_of(error)))
        return found

    def library(self, number: int) -> Path:
        """A library by its number. Raises: UnknownNameError."""
        if not 0 <= number < len(self.opened.libraries):
            expected = f"a number below {len(self.opened.libraries)}"
            raise UnknownNameError("library", expected=expected, got=number, fix="See the catalogue.")
        return self.opened.libraries[number]

    def find(self, item: Item) -> list[SteeringVector]:
        """The vector of an item, or those of its group. Raises: ConfigError, UnknownNameError, MissingArtefactError."""
        if (item.vector is None) == (item.latent is None):
            raise ConfigError("basket", expected="a vector or a latent", got="both or neither", fix="Give one of them.")
        if item.vector is not None:
            from steer.library import find_vectors

            number, _, name = item.vector.partition("/")
            return find_vectors(self.library(_number(number)), name)
        source, _, latent = (item.latent or "").rpartition(":")
        return [self._latent(source, _number(latent))]

    def steers(self, basket: Sequence[Item]) -> list[Steer]:
        """What a basket does. Raises: as `find` does, and ConfigError for levels of a gate that contradict each other.

        A gate is put onto the vector here, once: a run asks for its interventions again with each change of doses.
        """
        found: dict[str, list[SteeringVector]] = {}
        steers = []
        for number, item in enumerate(basket, 1):
            ref = item.vector or item.latent or ""
            vectors = found[ref] = found.get(ref) or self.find(item)
            steers.append(steer_of(number, item, vectors))
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
        from activations.store import ActivationStore
        from steer.library import load_library

        if source.store is not None:
            with suppress(SaekitError, OSError):
                return ActivationStore.open(source.store).stats(hook_point).mean_norm
        for path in self.opened.libraries:
            with suppress(SaekitError):
                for vector in load_library(path).values():
                    if (vector.hook_point, vector.model.fingerprint) == (hook_point, model.fingerprint):
                        return vector.mean_norm
        fix = "Keep the store, or open a library with a vector of this hook point."
        raise MissingArtefactError(source.name, expected=f"the mean norm at {hook_point}", got="none", fix=fix)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UnknownNameError("basket", expected="a number in NUMBER/NAME or SOURCE:N", got=repr(text), fix="Add it.")
    return int(text)


def refusals(shelf: Shelf, basket: Sequence[Item], loaded: LoadedModel | None, *, force: bool) -> list[Refused | None]:
    """What is wrong with each item by itself, in the four parts of an error; none: nothing.

    Args:
      loaded: the model; none: what it alone can tell is left out.
    """
    from steer.plan import Plan

    found: list[Refused | None] = []
    for number, item in enumerate(basket, 1):
        try:
            own = steer_of(number, item, shelf.find(item)).interventions()
            if loaded is not None:
                Plan(loaded, (), [own], [1], (), force).contents((), [own], [1])
        except SaekitError as error:
            found.append(detail_of(error))
        else:
            found.append(None)
    return found


def as_used(steer: Steer) -> list[SteeringVector]:
    """The vectors of a steer as it uses them, coefficients and operation included, each under a name of its own."""
    pairs = zip(steer.vectors, steer.coefficients, strict=True)
    names = [steer.name if len(steer.vectors) == 1 else f"{steer.name}@{v.hook_point}" for v in steer.vectors]
    return [
        replace(steer.used(v), name=name, coefficient=c, scope=steer.scope or v.scope)
        for name, (v, c) in zip(names, pairs, strict=True)
    ]


def interventions(steers: Sequence[Steer]) -> list[Intervention]:
    """Of all steers. Raises: as `Steer.interventions` does."""
    return [each for steer in steers for each in steer.interventions()]


def random_control(steers: Sequence[Steer], seed: int) -> list[Intervention]:
    """The same, each direction a random one of unit length; gates read what they read."""
    from steer.operations import Intervention
    from steer.scopes import Scope

    rng, found = np.random.default_rng(seed), []
    for used in (each for steer in steers for each in as_used(steer)):
        found.append(Intervention.of(used.random(rng), used.coefficient, scope=Scope.parse(used.scope)))
    return found

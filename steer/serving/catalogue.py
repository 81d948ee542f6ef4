"""What requests may be steered with: the libraries that a server was started with, and nothing else.

Flow: 1. libraries are opened once, when the server starts, and checked against the model; 2. what a request asks for is
found in them by name, and becomes interventions; 3. beside those stands the account: library, hash, operation,
coefficient and dose of everything that steers, so that an answer can say what it was written under.

No path of a request is ever opened. Left out: whether the model can be steered so (`steer.plan`).
"""

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from activations.errors import ConfigError, MismatchError, MissingArtefactError, UnknownNameError
from activations.models import LoadedModel
from activations.store_schema import ModelRef
from sae.artefact import SaeArtefact
from steer.items import entry_of, steer_of
from steer.latents import places_of
from steer.library import Library, grouped
from steer.manifest import SAE, read_manifest
from steer.operations import ClampLatents, Intervention, ScaleLatents
from steer.packs.installed import resolve
from steer.packs.keys import trusted_keys
from steer.packs.signature import check_signature
from steer.scopes import Scope
from steer.serving.items import Asked, Item
from steer.vectors import SteeringVector, from_latent


@dataclass(frozen=True)
class Prepared:
    """What one request is steered with."""

    interventions: list[Intervention] = field(default_factory=list)
    account: list[dict[str, Any]] = field(default_factory=list)
    """one entry a vector or latent"""
    budget: float | None = None

    @property
    def sha256(self) -> str:
        """Of the account and the budget: equal where two answers were steered alike."""
        told = json.dumps([self.account, self.budget], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


@dataclass
class Shelved:
    """One library."""

    name: str
    path: Path
    library: Library
    content_sha256: str
    signature: str
    _sae: SaeArtefact | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def names(self) -> dict[str, None]:
        """What can be asked for by name."""
        library = self.library
        return dict.fromkeys([*grouped(library.vectors), *library.vectors, *(kit.name for kit in library.kits)])

    def sae(self) -> SaeArtefact:
        """The SAE that is in it, read when it is first asked for. Raises: MissingArtefactError if there is none."""
        if self.library.sae is None or self.library.sae.dtype is None:
            fix = "Start the server with a library that has its SAE in it."
            raise MissingArtefactError(f"library {self.name}", expected="an SAE in it", got="none", fix=fix)
        with self._lock:
            if self._sae is None:
                self._sae = SaeArtefact.load(self.path / SAE)
            return self._sae

    def mean_norm(self, hook_point: str) -> float | None:
        """Of a vector at that place; none: no vector is there."""
        vectors = self.library.vectors.values()
        return next((vector.mean_norm for vector in vectors if vector.hook_point == hook_point), None)


class Catalogue:
    """All libraries of a server."""

    def __init__(self, shelves: Sequence[Shelved], loaded: LoadedModel, advice: str):
        self._shelves = {shelf.name: shelf for shelf in shelves}
        self._loaded, self._advice = loaded, advice

    @classmethod
    def open(cls, libraries: Sequence[str], loaded: LoadedModel, advice: str = "See GET /v1/steering.") -> "Catalogue":
        """Open libraries by path or installed name, for a model.

        Args:
          advice: what somebody is told who asks for what there is not.
        Raises: as `Library.open` does; MismatchError for a library of other weights, CorruptArtefactError for a
          signature that is not of it, ConfigError for two of one name.
        """
        trusted, shelves = trusted_keys(), dict[str, Shelved]()
        for each in libraries:
            path = resolve(each)
            library, manifest = Library.open(path), read_manifest(path)
            name = library.about.name or path.resolve().name
            if name in shelves:
                raise ConfigError(f"library {name}", expected="one of this name", got="two", fix="Leave one out.")
            signed = check_signature(path, path, manifest, trusted)
            shelves[name] = Shelved(name, path, library, manifest["content_sha256"], str(signed))
            _check_model(shelves[name], loaded)
        return cls([*shelves.values()], loaded, advice)

    @property
    def shelves(self) -> list[Shelved]:
        """The libraries."""
        return [*self._shelves.values()]

    # --- what is asked for -------------------------------------------------------------------------------------------

    def prepare(self, asked: Sequence[Asked], budget: float | None = None) -> Prepared:
        """What several lists of items come to, all of it at once, within the smallest of the budgets.

        Raises: UnknownNameError, ConfigError, MissingArtefactError naming the item.
        """
        items = [item for each in asked for item in each.steer]
        budgets = [each.budget for each in asked if each.budget is not None] + ([] if budget is None else [budget])
        found = Prepared(budget=min(budgets, default=None))
        for number, item in enumerate(items, 1):
            shelf, interventions, account = self._one(number, item)
            origin = {"library": shelf.name, "library_sha256": shelf.content_sha256}
            found.interventions.extend(interventions)
            found.account.extend({"item": number, **origin, **each} for each in account)
        return found

    def _one(self, number: int, item: Item) -> tuple[Shelved, list[Intervention], list[dict[str, Any]]]:
        where = f"steering: item {number}"
        if (item.vector is None) == (item.latent is None):
            raise ConfigError(where, expected="a vector or a latent", got="both or neither", fix="Give one of them.")
        sets = [name for name in ("clamp", "scale") if getattr(item, name) is not None]
        if sets and (item.vector is not None or len(sets) > 1 or item.dose is not None or item.operation is not None):
            expected = "clamp or scale, of a latent, without dose and operation"
            raise ConfigError(where, expected=expected, got="more, or another", fix="Leave out what does not belong.")
        if item.vector is not None:
            shelf, name = self._shelf_of(where, item.vector)
            vectors = shelf.library.find(shelf.name, name)
            return shelf, *_used(number, item, item.vector, vectors)
        shelf, latent = self._latent(where, str(item.latent))
        if sets:
            return shelf, *_set(number, item, shelf, latent, self._loaded)
        hook_point = str(places_of(shelf.sae()).writes)
        mean_norm = shelf.mean_norm(hook_point)
        if item.dose is None or mean_norm is None:
            expected = "a dose, clamp or scale" if item.dose is None else f"a library with a vector at {hook_point}"
            raise ConfigError(where, expected=expected, got="none", fix="Give clamp or scale, which need no mean norm.")
        vector = from_latent(shelf.sae(), latent, _model_ref(self._loaded), mean_norm)
        return shelf, *_used(number, item, vector.name, [vector])

    def _shelf_of(self, where: str, ref: str) -> tuple[Shelved, str]:
        """The library that has a vector, group or kit of this name, and the name in it."""
        first, slash, rest = ref.partition("/")
        if slash and first in self._shelves:
            return self._shelves[first], rest
        having = [shelf for shelf in self._shelves.values() if ref in shelf.names]
        if len(having) > 1:
            names = " or ".join(f"{shelf.name}/{ref}" for shelf in having)
            raise ConfigError(where, expected=names, got=f"'{ref}', which both have", fix="Say which.")
        if not having:
            known = [name for shelf in self._shelves.values() for name in shelf.names]
            expected = f"one of {', '.join(known[:20])}" + (" ..." if len(known) > 20 else "") if known else "a library"
            got = f"'{ref[:100]}'" if known else "none: it was started without libraries"
            raise UnknownNameError(where, expected=expected, got=got, fix=self._advice)
        return having[0], ref

    def _latent(self, where: str, ref: str) -> tuple[Shelved, int]:
        name, slash, number = ref.rpartition("/")
        shelves = [shelf for shelf in self._shelves.values() if shelf.library.sae and shelf.library.sae.dtype]
        having = [shelf for shelf in shelves if not slash or shelf.name == name]
        if len(having) != 1:
            names = ", ".join(f"{shelf.name}/N" for shelf in shelves)
            expected = f"one of {names}" if names else "a library with its SAE in it"
            got = f"'{ref[:100]}'" if names else "none"
            raise UnknownNameError(where, expected=expected, got=got, fix=self._advice)
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            fix = "Give its index."
            raise UnknownNameError(where, expected="the index of a latent", got=f"'{number[:100]}'", fix=fix)
        return having[0], int(number)

    # --- what there is -----------------------------------------------------------------------------------------------

    def listing(self) -> list[dict[str, Any]]:
        """Every library with its vectors, kits and labelled features, ready for JSON."""
        return [_listed(shelf) for shelf in self._shelves.values()]


def _check_model(shelf: Shelved, loaded: LoadedModel) -> None:
    made_for = {vector.model.fingerprint for vector in shelf.library.vectors.values()}
    made_for |= {shelf.library.sae.model_fingerprint} if shelf.library.sae is not None else set()
    if made_for - {loaded.fingerprint}:
        raise MismatchError(
            f"library {shelf.name}",
            expected=f"vectors of {loaded.id}",
            got=f"some of other weights, {min(made_for - {loaded.fingerprint})[:12]}",
            fix="Serve the model that it was made from, or leave it out.",
        )


def _used(
    number: int, item: Item, name: str, vectors: Sequence[SteeringVector]
) -> tuple[list[Intervention], list[dict[str, Any]]]:
    steer = replace(steer_of(number, item, vectors), name=f"{number} {name}")
    told = [{**each, "sha256": vector.sha256} for each, vector in zip(steer.record()["vectors"], vectors, strict=True)]
    return steer.interventions(), told


def _set(
    number: int, item: Item, shelf: Shelved, latent: int, loaded: LoadedModel
) -> tuple[list[Intervention], list[dict[str, Any]]]:
    """A latent that is clamped or scaled."""
    sae = shelf.sae()
    hook_point = str(places_of(sae).writes)
    mean_norm = shelf.mean_norm(hook_point)
    vector = from_latent(sae, latent, _model_ref(loaded), mean_norm or 1.0)
    gate = None if item.gate is None else replace(item.gate.of(vector), name=f"{number} {vector.name}")
    if item.clamp is not None:
        operation, told = ClampLatents(sae, {latent: item.clamp}), {"operation": "clamp", "value": item.clamp}
    else:
        assert item.scale is not None
        operation, told = ScaleLatents(sae, {latent: item.scale}), {"operation": "scale", "value": item.scale}
    scope = Scope.parse(item.scope or "all")
    intervention = Intervention(
        operation, None, scope, gate, loaded.fingerprint, mean_norm, None, f"latent {latent} of {shelf.name}"
    )
    own = [] if gate is None else [gate.name]
    account = {"name": vector.name, "hook_point": hook_point, **told, "scope": str(scope), "own_gate": own}
    return [intervention], [{**account, "sae_sha256": sae.sha256}]


def _model_ref(loaded: LoadedModel) -> ModelRef:
    return ModelRef(id=loaded.id, fingerprint=loaded.fingerprint, n_layers=loaded.n_layers, d_model=loaded.d_model)


def _listed(shelf: Shelved) -> dict[str, Any]:
    library = shelf.library
    return {
        "library": shelf.name,
        "version": library.about.version,
        "summary": library.about.summary,
        "content_sha256": shelf.content_sha256,
        "signature": shelf.signature,
        "vectors": [
            entry_of(f"{shelf.name}/{name}", vectors).model_dump(mode="json")
            for name, vectors in grouped(library.vectors).items()
        ],
        "kits": [{"name": kit.name, "summary": kit.summary, "vectors": kit.vectors} for kit in library.kits],
        "features": [
            {"latent": feature.latent, "label": feature.label, "author": feature.author, "vector": feature.vector,
             "max_activation": feature.max_activation, "density": feature.density}
            for feature in library.features
        ],
        "sae": None if library.sae is None else library.sae.model_dump(mode="json"),
    }  # fmt: skip

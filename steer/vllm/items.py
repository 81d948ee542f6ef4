"""What the items of a request come to, by one library: interventions, and a record to keep with an answer.

Left out: checks against a model (`steer.vllm.catalogue`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from activations.errors import ConfigError, MissingArtefactError
from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.artefact import SaeArtefact
from steer.chat.state import Steer
from steer.gates import Condition, Gate, joined, parts_of
from steer.library import Library, group_name
from steer.manifest import SAE, read_manifest
from steer.operations import Clamp, ClampLatents, Intervention, ScaleLatents
from steer.packs.installed import resolve
from steer.scopes import EVERYWHERE, Scope
from steer.vectors import SteeringVector, from_latent
from steer.vllm.request import Item


@dataclass(frozen=True)
class Shelf:
    """One library."""

    name: str
    path: Path
    library: Library
    content_sha256: str

    @cached_property
    def sae(self) -> SaeArtefact:
        """Raises: MissingArtefactError if the library has none."""
        if self.library.sae is None or self.library.sae.dtype is None:
            fix = "Steer with its vectors, or add the SAE with saekit library add."
            raise MissingArtefactError(self.name, expected="an SAE in the library", got="none", fix=fix)
        return SaeArtefact.load(self.path / SAE)


def open_shelf(library: str) -> Shelf:
    """The library of a path, or the installed one of a name. Raises: as `Library.open` does."""
    path = resolve(library)
    opened = Library.open(path)
    return Shelf(opened.about.name or path.name, path, opened, str(read_manifest(path)["content_sha256"]))


def interventions_of(shelf: Shelf, number: int, item: Item) -> list[Intervention]:
    """What one item does; names of its gates begin with its number. Raises: ConfigError for what contradicts itself."""
    if (item.vector is None) == (item.latent is None):
        raise ConfigError(
            f"steer item {number}", expected="a vector or a latent", got="both or neither", fix="Give one."
        )
    if item.latent is not None and item.operation in ("clamp", "scale"):
        return [_of_latent(shelf, number, item, item.latent)]
    if item.operation == "scale" or item.value is not None:
        fix = "Use dose, or name a latent with clamp or scale."
        raise ConfigError(f"steer item {number}", expected="a value for a latent alone", got="another", fix=fix)
    vectors = _vectors(shelf, item)
    known: dict[Gate, Gate] = {}
    gates = {
        v.name: _numbered(v.gate if item.gate is None else v.energy_gate(*_levels(item)), number, known)
        for v in vectors
    }
    if item.operation == "clamp":
        return [_clamped(vector, item, gates[vector.name]) for vector in vectors]
    used = [
        replace(v, gate=gates[v.name], window=v.window if item.operation in (None, v.operation) else None)
        for v in vectors
    ]
    return Steer(f"{number} {_name(vectors)}", tuple(used), item.dose, item.operation, item.scope).interventions()


def _levels(item: Item) -> tuple[float, float | None, int]:
    assert item.gate is not None
    return item.gate.on, item.gate.off, item.gate.tokens


def _name(vectors: Sequence[SteeringVector]) -> str:
    return vectors[0].name if len(vectors) == 1 else group_name(vectors[0].name)


def _vectors(shelf: Shelf, item: Item) -> list[SteeringVector]:
    if item.latent is None:
        return shelf.library.find(shelf.name, item.vector)
    return [from_latent(shelf.sae, item.latent, _model_of_sae(shelf), _mean_norm(shelf))]


def _clamped(vector: SteeringVector, item: Item, gate: Condition | None) -> Intervention:
    if item.dose is None:
        fix = "Give the dose that the projection is to have."
        raise ConfigError(f"clamp of '{vector.name}'", expected="a dose", got="none", fix=fix)
    target = item.dose * vector.mean_norm
    return Intervention(
        Clamp(torch.from_numpy(vector.direction), target, target),
        HookPoint.parse(vector.hook_point),
        Scope.parse(item.scope or vector.scope),
        gate,
        vector.model.fingerprint,
        vector.mean_norm,
        name=f"vector '{vector.name}'",
    )


def _of_latent(shelf: Shelf, number: int, item: Item, latent: int) -> Intervention:
    if item.value is None or item.dose is not None:
        fix = "Say value: an activation for clamp, a factor for scale."
        raise ConfigError(f"steer item {number}", expected="a value and no dose", got="another", fix=fix)
    sae = shelf.sae
    make = ClampLatents if item.operation == "clamp" else ScaleLatents
    operation = make(sae, {latent: item.value})
    gate = None
    if item.gate is not None:
        vector = from_latent(sae, latent, _model_of_sae(shelf), _mean_norm(shelf))
        gate = _numbered(vector.energy_gate(*_levels(item)), number, {})
    scope = EVERYWHERE if item.scope is None else Scope.parse(item.scope)
    model, norm = _model_of_sae(shelf), _mean_norm(shelf)
    return Intervention(operation, None, scope, gate, model.fingerprint, norm, name=f"latent {latent}")


def _model_of_sae(shelf: Shelf) -> ModelRef:
    found = next(iter(shelf.library.vectors.values()), None)
    if found is None:
        fix = "Add a vector of the same hook point."
        raise MissingArtefactError(shelf.name, expected="a vector, which names the model", got="none", fix=fix)
    return found.model


def _mean_norm(shelf: Shelf) -> float:
    for vector in shelf.library.vectors.values():
        if shelf.library.sae is not None and vector.hook_point == shelf.library.sae.hook_point:
            return vector.mean_norm
    fix = "Add a vector of that hook point."
    raise MissingArtefactError(shelf.name, expected="the mean norm where its SAE writes", got="none", fix=fix)


def _numbered(condition: Condition | None, number: int, known: dict[Gate, Gate]) -> Condition | None:
    """The same with the item's number in front of the names of its gates, which have to differ within a request."""
    if condition is None:
        return None
    if isinstance(condition, Gate):
        return known.setdefault(condition, replace(condition, name=f"{number} {condition.name}"))
    how, parts = parts_of(condition)
    return joined(how, [each for part in parts if (each := _numbered(part, number, known)) is not None])


def record_of(shelf: Shelf, item: Item) -> list[dict[str, Any]]:
    """What one item steers by: hashes, hook points, operations and coefficients."""
    if item.latent is not None and item.operation in ("clamp", "scale"):
        sha256, point = shelf.sae.sha256, shelf.sae.hook_point
        about = {"latent": item.latent, "sae_sha256": sha256, "hook_point": point, "value": item.value}
        return [about | _shared(item, item.operation, EVERYWHERE)]
    vectors = _vectors(shelf, item)
    if item.operation == "clamp":
        coefficients = [(item.dose or 0.0) * vector.mean_norm for vector in vectors]
    else:
        coefficients = Steer("", tuple(vectors), item.dose, item.operation, item.scope).coefficients
    return [
        {"vector": v.name, "sha256": v.sha256, "hook_point": v.hook_point, "coefficient": c}
        | _shared(item, item.operation or v.operation, v.scope)
        for v, c in zip(vectors, coefficients, strict=True)
    ]


def _shared(item: Item, operation: str, scope: Scope | str) -> dict[str, Any]:
    gate = None if item.gate is None else item.gate.model_dump(mode="json")
    return {"operation": operation, "scope": item.scope or str(scope), "gate": gate}

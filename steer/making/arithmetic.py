"""Vectors from other vectors of one model and hook point.

With unit directions v_i and weights w_i, m the direction of Σ v_i:

    sum       Σ w_i v_i                           add and, with weights below 0, subtract
    without   v_1 less its projection on the space that the others span
    shared    m                                   what all of them have in common
    unshared  each v_i less its projection on m   what each has alone; of two vectors, opposite directions

all made unit again. Flow of `combine`: 1. check that the parents belong together; 2. the new directions; 3. each is
dosed and measured with the concept of a parent, where that can be read: of a contrast always, of latents with their
SAE. Others are stored as they are, without a receipt.

Left out: which vectors get in each other's way (`steer.receipts.interference`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from activations.errors import ConfigError, MismatchError, NumericsError
from activations.models import LoadedModel, load_model
from sae.artefact import SaeArtefact
from sae.belongs import check_sae
from steer.library import load_library, named
from steer.making.config import CombineConfig
from steer.making.make import add_to_library, dose_and_measure
from steer.measures.concepts import own_concept, read_as
from steer.measures.effect import Concept
from steer.vectors import SteeringVector

LEAST = 1e-4
"""length from which on a sum of unit directions has a direction, beyond rounding"""

Rows = Float[np.ndarray, "vector d_model"]
Direction = Float[np.ndarray, " d_model"]


def weighted(rows: Rows, weights: Sequence[float]) -> Direction:
    """Σ weight * row, of any length."""
    return np.asarray(weights, np.float64) @ rows


def without(row: Direction, others: Rows) -> Direction:
    """`row` less its projection on the space that `others` span, of any length."""
    _, sizes, basis = np.linalg.svd(np.asarray(others, np.float64), full_matrices=False)
    basis = basis[sizes > LEAST * sizes.max()]
    rest = row - (row @ basis.T) @ basis
    return rest - (rest @ basis.T) @ basis  # twice is enough: what rounding left of the projection


def shared(rows: Rows) -> Direction:
    """The mean of the rows."""
    return rows.mean(axis=0)


def unit(direction: Direction, what: str) -> Float[np.ndarray, " d_model"]:
    """At length 1, in float32. Raises: NumericsError if next to nothing of unit directions is left."""
    length = float(np.linalg.norm(direction))
    if not length > LEAST:
        fix = "Combine other vectors, or at other weights."
        raise NumericsError(what, expected="a direction", got=f"one of length {length:.1g}", fix=fix)
    return (direction / length).astype(np.float32)


class Combined(NamedTuple):
    """One result."""

    suffix: str
    """of its name"""
    direction: Float[np.ndarray, " d_model"]
    expression: str


def combined(how: str, vectors: Mapping[str, float], rows: Rows) -> list[Combined]:
    """The results of one way to combine: a single one, or of `unshared` one a vector.

    Args:
      vectors: names and weights; the order counts for `without`.
      rows: their unit directions.
    Raises: ConfigError for too few vectors, NumericsError where nothing is left.
    """
    names, rows = list(vectors), rows.astype(np.float64)
    if len(names) < (1 if how == "sum" else 2):
        fix = "Write for example --set vectors='{one: 1.0, other: 1.0}'."
        raise ConfigError("key 'vectors'", expected="two vectors or more", got=len(names), fix=fix)
    if how == "sum":
        text = " + ".join(f"{weight:g} * {name}" for name, weight in vectors.items())
        return [Combined("", unit(weighted(rows, [*vectors.values()]), text), text)]
    if how == "without":
        text = f"{names[0]} without {', '.join(names[1:])}"
        return [Combined("", unit(without(rows[0], rows[1:]), text), text)]
    common = unit(shared(rows), f"shared part of {', '.join(names)}")
    text = f"shared by {', '.join(names)}"
    if how == "shared":
        return [Combined("", common, text)]
    rest = [(name, f"{name} without what is {text}", row) for name, row in zip(names, rows, strict=True)]
    return [Combined(f"-{name}", unit(without(row, common[None]), said), said) for name, said, row in rest]


def combine(config: CombineConfig, loaded: LoadedModel | None = None) -> list[SteeringVector]:
    """Combine vectors of the library of `config`, measure what comes out, and add it to the library at `config.out`.

    Raises: MismatchError for vectors of several models or hook points; UnknownNameError for one that is not there.
    """
    library = load_library(config.library)
    parents = [named(library, config.library, name) for name in config.vectors]
    check_together(parents)
    rows = np.stack([parent.direction for parent in parents]) if parents else np.zeros((0, 1), np.float32)
    found = []
    for part in combined(config.how, config.vectors, rows):
        own = [parent for parent in parents if part.suffix == f"-{parent.name}"]
        found.append((own or _by_weight(config, parents), part))
    artefact = None if config.sae is None else SaeArtefact.load(config.sae)
    made = []
    for related, part in found:
        vector = _child(config, parents, part)
        reader = next(((p, c) for p in related if (c := own_concept(p, artefact)) is not None), None)
        if reader is not None:
            vector = read_as(vector, reader[0])
            if config.measured:
                loaded = loaded or load_model(config.model, device=config.device)
                vector = _measured(config, loaded, vector, *reader, artefact)
        made.append(vector)
    add_to_library(config.out, *made)
    return made


def check_together(vectors: Sequence[SteeringVector]) -> None:
    """Raise MismatchError unless all vectors are of one model and hook point."""
    for vector in vectors[1:]:
        first, fix = vectors[0], "Combine vectors of one model and hook point."
        if vector.model.fingerprint != first.model.fingerprint:
            expected, got = f"a vector of {first.model.id}, as '{first.name}' is", f"one of {vector.model.id}"
            raise MismatchError(f"vector '{vector.name}'", expected=expected, got=got, fix=fix)
        if vector.hook_point != first.hook_point:
            expected = f"hook point {first.hook_point}, as of '{first.name}'"
            raise MismatchError(f"vector '{vector.name}'", expected=expected, got=vector.hook_point, fix=fix)


def _by_weight(config: CombineConfig, parents: Sequence[SteeringVector]) -> list[SteeringVector]:
    """Those that are added, in their order: what the result stands for is first what they do."""
    return [parent for parent in parents if config.vectors[parent.name] > 0][: 1 if config.how == "without" else None]


def _child(config: CombineConfig, parents: Sequence[SteeringVector], part: Combined) -> SteeringVector:
    source: dict[str, Any] = {
        "kind": "combination",
        "how": config.how,
        "expression": part.expression,
        "parents": {parent.name: parent.sha256 for parent in parents},
        "cosines": {parent.name: float(part.direction @ parent.direction) for parent in parents},
    }
    first = parents[0]
    return SteeringVector(
        config.name + part.suffix, part.direction, first.hook_point, first.model, first.mean_norm, source
    )


def _measured(
    config: CombineConfig,
    loaded: LoadedModel,
    vector: SteeringVector,
    parent: SteeringVector,
    concept: Concept,
    artefact: SaeArtefact | None,
) -> SteeringVector:
    if artefact is not None:
        check_sae(artefact, loaded)
    receipt = parent.receipts[-1] if parent.receipts else {}
    instruction = config.instruction or receipt.get("instruction") or f"Write in the way of {parent.name}."
    return dose_and_measure(loaded, vector, concept, config.measure, config.coefficient, instruction)


def as_result(config: CombineConfig, made: Sequence[SteeringVector]) -> dict[str, Any]:
    """What the command shows: a row a vector, without effect where nothing could be measured."""
    rows, shown = {}, ("effect", "random_control_effect", "kl") if any(vector.receipts for vector in made) else ()
    for vector in made:
        receipt = vector.receipts[-1] if vector.receipts else {}
        rows[vector.name] = {
            "expression": vector.source["expression"],
            "measured as": vector.source.get("concept", "not measured") if config.measured else "not asked for",
            "coefficient": vector.coefficient,
            "dose": vector.dose(vector.coefficient),
            **{key: receipt.get(key) for key in shown},
            "cosines": ", ".join(f"{name} {cosine:+.2f}" for name, cosine in vector.source["cosines"].items()),
        }
    return {"library": config.out, "vectors": rows}

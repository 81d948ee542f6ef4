"""Rows by hook point in .safetensors or .npz, for whatever else reads arrays: resid_post.12 -> its row.

A .safetensors file also says in its metadata, as JSON under `saekit`, the operation and coefficient of each row. A
.npz has rows alone: they are added at strength 1, so coefficients are folded in.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from activations.errors import HookPointError
from activations.hook_points import SITES, HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt, read_safetensors
from sae.formats.npz import read_npz
from steer.formats.base import (
    Candidate,
    Direction,
    check_expressible,
    checked_layer,
    checked_number,
    checked_row,
    checked_size,
    checked_word,
    refused,
    row_at,
    strength_of,
)
from steer.operations import VECTOR_OPERATIONS
from steer.vectors import SteeringVector

TITLE = "arrays by hook point"
KEY = "saekit"
SUFFIXES = (".safetensors", ".npz")


def matches(file: Candidate) -> bool:
    """By the name of the file."""
    return file.path.suffix in SUFFIXES


def read(path: Path, model: ModelRef) -> list[Direction]:
    """Its rows."""
    checked_size(path, "a file of arrays")
    rows, about = (read_npz(path), {}) if path.suffix == ".npz" else (read_safetensors(path), _metadata(path))
    if not rows:
        raise corrupt(path, "a row", "none")
    return [_direction(path, name, row, about, model) for name, row in rows.items()]


def write(vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
    """One row a hook point."""
    if path.suffix not in SUFFIXES:
        raise refused(path, f"a name that ends in {' or '.join(SUFFIXES)}", path.name)
    is_npz = path.suffix == ".npz"
    operations = ("add",) if is_npz or folded else tuple(VECTOR_OPERATIONS)
    check_expressible(vectors, f"{path.suffix} of {TITLE}", operations=operations, sites=tuple(SITES))
    is_folded = folded or is_npz
    strengths = {each.hook_point: strength_of([each], is_folded) for each in vectors}
    rows = {each.hook_point: row_at(each, strengths[each.hook_point]) for each in vectors}
    if is_npz:
        np.savez(path, **rows)  # type: ignore[reportArgumentType]
    else:
        said = {
            each.hook_point: {"operation": each.operation, "coefficient": strengths[each.hook_point]}
            for each in vectors
        }
        save_file(rows, path, {KEY: json.dumps(said, sort_keys=True)})
    return [f"h + row at {', '.join(rows)}" if is_folded else f"{KEY} in its metadata says what each row is for"]


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "numpy") as file:
            said = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise corrupt(path, f"JSON under {KEY}", type(error).__name__) from error
    return said if isinstance(said, dict) else {}


def _direction(path: Path, name: str, row: np.ndarray, about: Mapping[str, Any], model: ModelRef) -> Direction:
    where = f"{path}: {name[:80]}"
    try:
        point = HookPoint.parse(name)
    except HookPointError as error:
        raise refused(where, "arrays called by hook points, such as resid_post.12", name[:80]) from error
    checked_layer(where, point.layer, model)
    said = about.get(name, {})
    if not isinstance(said, dict):
        raise corrupt(where, "what the row is for", repr(said)[:80])
    operation = checked_word(where, said.get("operation", "add"), VECTOR_OPERATIONS)
    return Direction(
        point, checked_row(where, row, model), operation, checked_number(where, said.get("coefficient", 1.0))
    )

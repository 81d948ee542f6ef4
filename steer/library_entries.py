"""Steering vectors as JSON and tensors, as the manifest of a library has them.

Flow: 1. a vector becomes an entry, and its direction, its reader's and the weights of its gates become tensors;
2. reading goes the other way and believes nothing: kinds, numbers, shapes and finiteness are checked.

Left out: files and hashes (`steer.library`), gates themselves (`steer.gate_files`).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from activations.errors import ConfigError
from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from steer.gate_files import condition_of, entry_of
from steer.gates import Condition, Gate
from steer.operations import vector_operation
from steer.scopes import Scope
from steer.vectors import Reader, SteeringVector


def entry_of_vector(vector: SteeringVector, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A vector's part of the manifest; its direction, its reader's and the weights of its gates are added to `arrays`.

    Raises: ConfigError for a gate that cannot be kept, or two of one name.
    """
    _put(arrays, vector, vector.name, vector.direction)
    return {
        "name": vector.name,
        "model": vector.model.model_dump(mode="json"),
        "hook_point": vector.hook_point,
        "operation": vector.operation,
        "scope": vector.scope,
        "gate": _gate_entry(vector, arrays),
        "coefficient": vector.coefficient,
        "dose": vector.dose(vector.coefficient),
        "window": None if vector.window is None else list(vector.window),
        "reader": _reader_entry(vector, arrays),
        "mean_norm": vector.mean_norm,
        "source": vector.source,
        "receipts": vector.receipts,
    }


def _gate_entry(vector: SteeringVector, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    if vector.gate is None:
        return None
    entry, weights = entry_of(vector.gate)
    for gate in entry["gates"]:
        gate["weight"] = _put(arrays, vector, f"{vector.name}/gate/{gate['name']}", weights[gate["name"]])
    return entry


def _reader_entry(vector: SteeringVector, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    if vector.reader is None:
        return None
    direction = _put(arrays, vector, f"{vector.name}/reader", vector.reader.direction)
    return {"direction": direction, "hook_point": vector.reader.hook_point, "midpoint": vector.reader.midpoint}


def _put(arrays: dict[str, np.ndarray], vector: SteeringVector, name: str, row: np.ndarray) -> str:
    """Add what belongs to a vector to `arrays` under a name, which is returned."""
    if name in arrays:
        fix = "Rename one of them."
        raise ConfigError(f"vector '{vector.name}'", expected="names of its own", got=name, fix=fix)
    arrays[name] = np.ascontiguousarray(row, np.float32)
    return name


def _reader(entry: Any, arrays: Mapping[str, np.ndarray], d_model: int) -> Reader | None:
    if entry is None:
        return None
    point = str(HookPoint.parse(entry["hook_point"]))
    return Reader(_row(arrays, entry["direction"], d_model), point, _number(entry, "midpoint"))


def _gate(entry: Any, arrays: Mapping[str, np.ndarray], d_model: int, known: dict[Any, Gate]) -> Condition | None:
    if entry is None:
        return None
    weights = {gate["name"]: _row(arrays, gate["weight"], d_model) for gate in entry["gates"]}
    return condition_of(entry, weights, known)


def _row(arrays: Mapping[str, np.ndarray], name: str, d_model: int) -> np.ndarray:
    row = arrays[name]
    if row.shape != (d_model,) or row.dtype != np.float32 or not np.isfinite(row).all():
        raise ValueError(
            f"a direction or gate of {row.dtype} and shape {row.shape} for d_model {d_model}, or not finite"
        )
    return row


def _number(entry: dict[str, Any], key: str) -> float:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} {value!r}")
    return float(value)


def vector_of_entry(entry: dict[str, Any], arrays: Mapping[str, np.ndarray], gates: dict[Any, Gate]) -> SteeringVector:
    """The vector that an entry says; gates that are equal become one of `gates`.

    Raises: KeyError, TypeError, ValueError, AttributeError or SaekitError for what is not one.
    """
    model = ModelRef.model_validate(entry["model"])
    if not isinstance(entry["source"], dict) or not all(isinstance(each, dict) for each in list(entry["receipts"])):
        raise TypeError("a source or receipts of another type")
    if not _number(entry, "mean_norm") > 0:
        raise ValueError(f"mean_norm {entry['mean_norm']}")
    return SteeringVector(
        name=entry["name"],
        direction=_row(arrays, entry["name"], model.d_model),
        hook_point=str(HookPoint.parse(entry["hook_point"])),
        model=model,
        mean_norm=_number(entry, "mean_norm"),
        source=entry["source"],
        coefficient=_number(entry, "coefficient"),
        receipts=entry["receipts"],
        operation=_known_operation(entry["operation"]),
        scope=str(Scope.parse(entry["scope"])),
        gate=_gate(entry["gate"], arrays, model.d_model, gates),
        window=_window(entry["window"]),
        reader=_reader(entry["reader"], arrays, model.d_model),
    )


def _window(ends: list[float] | None) -> tuple[float, float] | None:
    if ends is None:
        return None
    low, high = map(float, ends)
    if not low <= high or not np.isfinite([low, high]).all():
        raise ValueError(f"a window from {low} to {high}")
    return low, high


def _known_operation(name: str) -> str:
    vector_operation(name)
    return name

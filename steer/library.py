"""A library: steering vectors in one directory that can be checked, read by a person, and passed on.

    manifest.json        per vector: model, hook point, operation, scope, gate, coefficient, dose, window, source,
                         receipts; content hash
    vectors.safetensors  one float32 unit direction a vector, by name, those of readers, and the weights of gates
    README.md            the same for people

The content hash covers the vectors and the manifest, and is checked on loading. Vectors that belong
together, one a layer, are named NAME@HOOK_POINT, and found by NAME. Left out: signatures.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from activations.errors import ConfigError, CorruptArtefactError, MissingArtefactError, StorageError, UnknownNameError
from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import JSON_BYTES
from steer.gate_files import condition_of, entry_of
from steer.gates import Condition, Gate, gates_of
from steer.operations import vector_operation
from steer.scopes import Scope
from steer.vectors import Reader, SteeringVector

FORMAT = "saekit-library-3"
TENSOR_BYTES = 1 << 30
"""the largest file of vectors that is read"""


def save_library(path: Path, vectors: Sequence[SteeringVector]) -> str:
    """Write `vectors` as the library at `path` and return its content hash.

    Raises: ConfigError for a gate that cannot be kept, before anything is written.
    """
    arrays = {vector.name: np.ascontiguousarray(vector.direction, np.float32) for vector in vectors}
    manifest: dict[str, Any] = {"format": FORMAT, "vectors": [_entry(vector, arrays) for vector in vectors]}
    tensors = save_tensors(arrays)
    manifest["content_sha256"] = _content_hash(tensors, manifest["vectors"])
    path.mkdir(parents=True, exist_ok=True)
    _replace(path / "vectors.safetensors", tensors)
    _replace(path / "README.md", _card(vectors).encode())
    _replace(path / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest["content_sha256"]


def load_library(path: str | Path) -> dict[str, SteeringVector]:
    """Read the library at `path`, by vector name.

    Raises: MissingArtefactError if there is none, StorageError if it cannot be read, CorruptArtefactError if it is
      damaged or was changed by hand.
    """
    path = Path(path)
    try:
        if (path / "manifest.json").stat().st_size > JSON_BYTES:
            raise _damaged(path, f"a manifest of more than {JSON_BYTES >> 20} MiB")
        manifest = json.loads((path / "manifest.json").read_text())
        if (path / "vectors.safetensors").stat().st_size > TENSOR_BYTES:
            raise _damaged(path, f"vectors of more than {TENSOR_BYTES >> 20} MiB")
        tensors = (path / "vectors.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise MissingArtefactError(
            path, expected="a library", got=f"no {Path(error.filename).name}", fix="Make one with: saekit vector make"
        ) from error
    except OSError as error:
        fix = "See who may read it."
        raise StorageError(path, expected="a library that can be read", got=error.strerror, fix=fix) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, "a manifest that is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(path, "another format")
    if manifest.get("content_sha256") != _content_hash(tensors, manifest.get("vectors")):
        raise _damaged(path, "content that does not match its hash")
    try:
        arrays, gates = load_tensors(tensors), {}
        vectors = {entry["name"]: _vector(entry, arrays, gates) for entry in manifest["vectors"]}
        if len(vectors) < len(manifest["vectors"]):
            raise ValueError("two vectors of one name")
        return vectors
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, SafetensorError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def find_vector(path: str | Path, name: str | None) -> SteeringVector:
    """One vector of a library, its first if no name is given. Raises: UnknownNameError listing the names there are."""
    vectors = load_library(path)
    return named(vectors, path, next(iter(vectors), "") if name is None else name)


def named(vectors: Mapping[str, SteeringVector], path: str | Path, name: str) -> SteeringVector:
    """One of the vectors that were read from `path`. Raises: UnknownNameError listing the names there are."""
    if name not in vectors:
        raise UnknownNameError(
            f"{path}: vector '{name}'",
            expected=f"one of {', '.join(vectors)}",
            got=f"'{name}'",
            fix="Correct the name.",
        )
    return vectors[name]


def group_name(name: str) -> str:
    """What vectors NAME@HOOK_POINT that belong together are called; of any other name, itself."""
    return name.partition("@")[0]


def find_vectors(path: str | Path, name: str | None) -> list[SteeringVector]:
    """The vector of this name, or else those of NAME@HOOK_POINT, in the order of a pass; the first if there is no name.

    Raises: UnknownNameError listing the names there are.
    """
    vectors = load_library(path)
    if name is None:
        name = group_name(next(iter(vectors), ""))
    parts = [vector for each, vector in vectors.items() if each.startswith(f"{name}@")]
    if name in vectors or not parts:
        return [named(vectors, path, name)]
    return sorted(parts, key=lambda vector: HookPoint.parse(vector.hook_point).depth)


def _entry(vector: SteeringVector, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A vector's part of the manifest; the weights of its gates are added to `arrays`."""
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
        gate["weight"] = _add(arrays, vector, f"gate/{gate['name']}", weights[gate["name"]])
    return entry


def _reader_entry(vector: SteeringVector, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    if vector.reader is None:
        return None
    direction = _add(arrays, vector, "reader", vector.reader.direction)
    return {"direction": direction, "hook_point": vector.reader.hook_point, "midpoint": vector.reader.midpoint}


def _add(arrays: dict[str, np.ndarray], vector: SteeringVector, what: str, row: np.ndarray) -> str:
    """Add what belongs to a vector to `arrays`, and return its name there."""
    name = f"{vector.name}/{what}"
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


def _vector(entry: dict[str, Any], arrays: Mapping[str, np.ndarray], gates: dict[Any, Gate]) -> SteeringVector:
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
        reader=_reader(entry.get("reader"), arrays, model.d_model),  # libraries of an earlier saekit have none
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


def _content_hash(tensors: bytes, entries: object) -> str:
    return hashlib.sha256(tensors + json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


FIGURES: dict[str, tuple[str, ...]] = {
    "effect": ("effect",),
    "random control": ("random_control_effect",),
    "KL": ("kl",),
    "capability": ("capability", "steered", "accuracy_change"),
    "refusal of harmful": ("refusal", "steered", "harmful_change"),
    "refusal of harmless": ("refusal", "steered", "harmless_change"),
}
"""column of the card -> where it is in a receipt"""


def _card(vectors: Sequence[SteeringVector]) -> str:
    lines = ["# Steering vectors", "", "Each is used at its hook point, on the tokens of its scope.", ""]
    columns = ["vector", "model", "hook point", "operation", "scope", "gate", "coefficient", "window", "dose", *FIGURES]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for vector in vectors:
        cells = [vector.name, vector.model.id, vector.hook_point, vector.operation, vector.scope]
        cells.append(", ".join(gate.name for gate in gates_of(vector.gate)) or "-")
        cells.append(f"{vector.coefficient:.3g}")
        cells.append("-" if vector.window is None else " to ".join(f"{end:.3g}" for end in vector.window))
        cells.append(f"{vector.dose(vector.coefficient):.2f}")
        lines.append("| " + " | ".join([*cells, *(_figure(vector, path) for path in FIGURES.values())]) + " |")
    notes = (
        "Effect: rise in the share of generated tokens on which the concept shows. Window: coefficients at which the "
        "vector was found to work and to do no harm. Capability and refusal: change in the share of questions answered "
        "rightly, and of prompts refused. All are of the newest receipt that has them, at this coefficient."
    )
    return "\n".join([*lines, "", notes, ""])


def _figure(vector: SteeringVector, path: Sequence[str]) -> str:
    """A figure of the newest receipt that has it, at the vector's own coefficient."""
    for receipt in reversed(vector.receipts):
        found: Any = receipt
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, float) and receipt.get("coefficient", vector.coefficient) == vector.coefficient:
            return f"{found:+.3f}"
    return "-"


def _damaged(path: Path, got: str) -> CorruptArtefactError:
    return CorruptArtefactError(path, expected="an intact library", got=got, fix="Get it again from where it came.")

"""A library: steering vectors in one directory that can be checked, read by a person, and passed on.

    manifest.json        per vector: model, hook point, operation, coefficient, dose, window, source, receipts; content
                         hash
    vectors.safetensors  one float32 unit direction a vector, by name
    README.md            the same for people

The content hash covers the vectors and the manifest, and is checked on loading. Left out: signatures, gates.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from activations.errors import CorruptArtefactError, MissingArtefactError, UnknownNameError
from activations.store_schema import ModelRef
from steer.operations import vector_operation
from steer.scopes import Scope
from steer.vectors import SteeringVector

FORMAT = "saekit-library-2"


def save_library(path: Path, vectors: Sequence[SteeringVector]) -> str:
    """Write `vectors` as the library at `path` and return its content hash."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = save_tensors({vector.name: np.ascontiguousarray(vector.direction, np.float32) for vector in vectors})
    manifest: dict[str, Any] = {"format": FORMAT, "vectors": [_entry(vector) for vector in vectors]}
    manifest["content_sha256"] = _content_hash(tensors, manifest["vectors"])
    _replace(path / "vectors.safetensors", tensors)
    _replace(path / "README.md", _card(vectors).encode())
    _replace(path / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest["content_sha256"]


def load_library(path: str | Path) -> dict[str, SteeringVector]:
    """Read the library at `path`, by vector name.

    Raises: MissingArtefactError if there is none, CorruptArtefactError if it is damaged or was changed by hand.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        tensors = (path / "vectors.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise MissingArtefactError(
            path, expected="a library", got=f"no {Path(error.filename).name}", fix="Make one with: saekit vector make"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, "a manifest that is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(path, "another format")
    if manifest.get("content_sha256") != _content_hash(tensors, manifest.get("vectors")):
        raise _damaged(path, "content that does not match its hash")
    try:
        directions = load_tensors(tensors)
        return {entry["name"]: _vector(entry, directions[entry["name"]]) for entry in manifest["vectors"]}
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def find_vector(path: str | Path, name: str) -> SteeringVector:
    """One vector of a library. Raises: UnknownNameError listing the names there are."""
    vectors = load_library(path)
    if name not in vectors:
        raise UnknownNameError(
            f"{path}: vector '{name}'",
            expected=f"one of {', '.join(vectors)}",
            got=f"'{name}'",
            fix="Correct the name.",
        )
    return vectors[name]


def _entry(vector: SteeringVector) -> dict[str, Any]:
    return {
        "name": vector.name,
        "model": vector.model.model_dump(mode="json"),
        "hook_point": vector.hook_point,
        "operation": vector.operation,
        "scope": vector.scope,
        "coefficient": vector.coefficient,
        "dose": vector.dose(vector.coefficient),
        "window": None if vector.window is None else list(vector.window),
        "mean_norm": vector.mean_norm,
        "source": vector.source,
        "receipts": vector.receipts,
    }


def _vector(entry: dict[str, Any], direction: np.ndarray) -> SteeringVector:
    model = ModelRef.model_validate(entry["model"])
    if direction.shape != (model.d_model,) or not np.isfinite(direction).all():
        raise KeyError(f"a direction of shape {direction.shape} for d_model {model.d_model}")
    return SteeringVector(
        entry["name"],
        direction,
        entry["hook_point"],
        model,
        float(entry["mean_norm"]),
        entry["source"],
        float(entry["coefficient"]),
        entry["receipts"],
        _known_operation(entry["operation"]),
        str(Scope.parse(entry["scope"])),
        _window(entry["window"]),
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
    columns = ["vector", "model", "hook point", "operation", "scope", "coefficient", "window", "dose", *FIGURES]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for vector in vectors:
        cells = [vector.name, vector.model.id, vector.hook_point, vector.operation, vector.scope]
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

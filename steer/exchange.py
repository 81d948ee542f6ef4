"""Vectors of a library to and from files of other projects.

Export: 1. the vectors are found; 2. the format refuses what it cannot express; 3. the file is written, and how it is
used is said. Import: 1. the file is read, without running anything in it; 2. hook points and widths are compared with
the model; 3. rows become unit directions with a coefficient, whose dose comes from the model's own norms.

No such file proves which weights it is for, so that an imported vector is only as right as the model that was named:
calibrate and score it before it is used. Left out: what each format is (`steer.formats`).
"""

from dataclasses import replace
from typing import Any

import numpy as np

from activations.errors import MismatchError, StorageError
from activations.models import LoadedModel, load_model
from sae.artefact import file_sha256
from steer.config import ExportConfig, ImportConfig
from steer.formats import detect, find
from steer.formats.base import Direction
from steer.library import find_vectors
from steer.making.contrast import read_sides
from steer.making.make import add_to_library
from steer.pairs import load_pairs
from steer.vectors import SteeringVector

NORM_TEXTS = "formal_vs_casual"
"""shipped pairs whose texts the mean norm of a hook point is taken over"""


def export_vectors(config: ExportConfig) -> dict[str, Any]:
    """Write the vector, or the vectors, of `config` for another project.

    Returns: JSON-ready: out, format, vectors, and `use`, lines on how the file is used there.
    Raises: MismatchError for what the format cannot express or a target that is taken, StorageError.
    """
    format_ = find(config.to)
    vectors = find_vectors(config.library, config.vector)
    if config.coefficient is not None:
        vectors = [replace(vector, coefficient=config.coefficient) for vector in vectors]
    if config.out.exists():
        raise MismatchError(config.out, expected="nothing", got="a file", fix="Choose another name, or remove it.")
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        use = format_.write(vectors, config.out, config.folded)
    except OSError as error:
        config.out.unlink(missing_ok=True)
        fix = "Check the place and its free space."
        raise StorageError(config.out, expected="a file to write", got=error.strerror, fix=fix) from error
    return {"out": str(config.out), "format": config.to, "vectors": [vector.name for vector in vectors], "use": use}


def import_vectors(config: ImportConfig, loaded: LoadedModel | None = None) -> list[SteeringVector]:
    """Add the vectors of a file to the library at `config.out`, and give them.

    Raises: as the format's `read`; HookPointError for a site that the model does not have.
    """
    name = config.format or detect(config.file)
    format_ = find(name)
    loaded = loaded or load_model(config.model, device=config.device)
    directions = format_.read(config.file, loaded.ref)
    sites = loaded.family.sites(loaded.model.config)
    points = [each.hook_point.check(loaded.n_layers, sites) for each in directions]
    read = read_sides(loaded, list(dict.fromkeys(points)), load_pairs(NORM_TEXTS))
    source = {
        "kind": "imported", "format": name, "file": config.file.name,
        "file_sha256": file_sha256(config.file),
    }  # fmt: skip
    vectors = [
        _vector(config, each, loaded, read[each.hook_point].mean_norm, source, alone=len(directions) == 1)
        for each in directions
    ]
    add_to_library(config.out, *vectors)
    return vectors


def _vector(
    config: ImportConfig, row: Direction, loaded: LoadedModel, mean_norm: float, source: dict[str, Any], *, alone: bool
) -> SteeringVector:
    length = float(np.linalg.norm(row.values.astype(np.float64)))
    name = config.name or (row.name if alone and row.name else config.file.stem.replace("@", "-"))
    source = source | ({"made_on": row.made_on} if row.made_on else {})
    coefficient = config.strength * row.coefficient * (1.0 if row.operation == "ablate" else length)
    return SteeringVector(
        name if alone else f"{name}@{row.hook_point}", (row.values / length).astype(np.float32), str(row.hook_point),
        loaded.ref, mean_norm, source, coefficient, operation=row.operation, scope=row.scope,
    )  # fmt: skip

"""Vectors as Neuronpedia takes them by POST /api/vector/new, and features with a vector as it gives them, in JSON.

hookType resid-post of layerNumber L is resid_post.L, resid-pre is resid_pre.L. vectorDefaultSteerStrength is the
coefficient. A feature says its hook as TransformerLens does, such as blocks.12.hook_resid_post.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt, read_json
from steer.formats.base import (
    Candidate,
    Direction,
    check_expressible,
    checked_layer,
    checked_list,
    checked_number,
    checked_size,
    checked_word,
    refused,
    row_at,
    strength_of,
)
from steer.vectors import SteeringVector

TITLE = "Neuronpedia vector"
SITES = {"resid-pre": "resid_pre", "resid-post": "resid_post"}
HOOK = re.compile(r"blocks\.(\d{1,5})\.hook_(resid_pre|resid_post)")
WIDEST = 24_576
"""numbers that it takes"""


def matches(file: Candidate) -> bool:
    """A .json with a vector."""
    return file.path.suffix == ".json" and "vector" in read_json(file.path)


def read(path: Path, model: ModelRef) -> list[Direction]:
    """Its one row, at its strength."""
    checked_size(path, "a .json")
    content = read_json(path)
    row = checked_list(f"{path}: vector", content.get("vector"), model)
    point, strength = _point(path, content), content.get("vectorDefaultSteerStrength", 1.0)
    strength = 1.0 if strength is None else checked_number(f"{path}: vectorDefaultSteerStrength", strength)
    checked_layer(str(path), point.layer, model)
    label = content.get("vectorLabel")
    return [Direction(point, row, "add", strength, label if isinstance(label, str) and label else None)]


def write(vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
    """One vector that is added."""
    check_expressible(vectors, TITLE, sites=tuple(SITES.values()))
    if len(vectors) > 1:
        raise refused(path, "one vector", f"{len(vectors)}: write them to a file each")
    vector, point = vectors[0], HookPoint.parse(vectors[0].hook_point)
    if vector.model.d_model > WIDEST:
        raise refused(path, f"a width of at most {WIDEST}", vector.model.d_model)
    strength = strength_of(vectors, folded)
    content = {
        "modelId": vector.model.id, "layerNumber": point.layer,
        "hookType": next(name for name, site in SITES.items() if site == point.site),
        "vector": row_at(vector, strength).tolist(), "vectorDefaultSteerStrength": strength,
        "vectorLabel": vector.name,
    }  # fmt: skip
    path.write_text(json.dumps(content) + "\n")
    return [f"POST {path} to /api/vector/new, with modelId as Neuronpedia has it"]


def _point(path: Path, content: dict[str, Any]) -> HookPoint:
    if isinstance(content.get("hookName"), str):
        found = HOOK.fullmatch(content["hookName"])
        if found is None:
            raise refused(path, "a hook of the residual stream", content["hookName"][:80])
        return HookPoint(found[2], int(found[1]))
    kind = checked_word(f"{path}: hookType", content.get("hookType"), SITES)
    layer = content.get("layerNumber")
    if type(layer) is not int:
        raise corrupt(f"{path}: layerNumber", "a block", repr(layer)[:80])
    return HookPoint(SITES[kind], layer)

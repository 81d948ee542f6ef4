"""Steering of lm-eval's `--model steered`: hook points of a model, each with a row, in a file of torch.save.

A hook point is a module of the model without its head, of which `layers.N` is the 0-based block N. The action add adds
coefficient * row to its output on all tokens; clamp sets the projection on the row, so that a clamp to 0 is an ablation
of the whole share. Heads and biases are not read, nor the CSV that names latents of SAEs.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt
from sae.formats.state_dict import load_torch
from steer.formats.base import (
    Candidate,
    Direction,
    check_expressible,
    checked_layer,
    checked_number,
    checked_row,
    dense,
    refused,
    row_at,
    strength_of,
)
from steer.vectors import SteeringVector

TITLE = "lm-eval steered"
BLOCK = re.compile(r"(?:model\.)?(?:layers|h)\.(\d{1,5})")
KEYS = {"steering_vector", "action"}


def matches(file: Candidate) -> bool:
    """A file of torch.save with entries of this kind."""
    content = file.torch
    return isinstance(content, dict) and bool(content) and all(_is_entry(each) for each in content.values())


def read(path: Path, model: ModelRef) -> list[Direction]:
    """Its rows, at their coefficients."""
    content = load_torch(path)
    if not isinstance(content, dict) or not content:
        raise corrupt(path, "a dict of hook points", type(content).__name__)
    return [_direction(f"{path}: {name}", str(name), entry, model) for name, entry in content.items()]


def write(vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
    """One entry a block: vectors that are added, and ablations of the whole share."""
    if path.suffix != ".pt":
        raise refused(path, "a name that ends in .pt", path.name)
    check_expressible(vectors, TITLE, operations=("add", "ablate"))
    torch.save({_name(vector): _entry(vector, folded) for vector in vectors}, path)
    return [f"lm_eval --model steered --model_args pretrained=MODEL,steer_path={path}"]


def _name(vector: SteeringVector) -> str:
    return f"layers.{HookPoint.parse(vector.hook_point).layer}"


def _entry(vector: SteeringVector, folded: bool) -> dict[str, Any]:
    if vector.operation == "ablate" and vector.coefficient != 1:
        where = f"vector '{vector.name}' as {TITLE}"
        raise refused(where, "an ablation of the whole share, 1", f"{vector.coefficient:g}")
    strength = strength_of([vector], folded)
    row = torch.from_numpy(row_at(vector, strength))
    how = {"action": "clamp", "steering_coefficient": 0.0} if vector.operation == "ablate" else {
        "action": "add", "steering_coefficient": strength
    }  # fmt: skip
    return {"steering_vector": row, **how, "bias": None, "head_index": None}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, Mapping) and entry.keys() >= KEYS


def _direction(where: str, name: str, entry: object, model: ModelRef) -> Direction:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("steering_vector"), torch.Tensor):
        raise corrupt(where, "an entry with a steering_vector", type(entry).__name__)
    block = BLOCK.fullmatch(name)
    if block is None:
        raise refused(where, "a block, such as layers.12", name[:80])
    if entry.get("head_index") is not None or entry.get("bias") is not None:
        raise refused(where, "no head and no bias", "one")
    coefficient = checked_number(f"{where}: steering_coefficient", entry.get("steering_coefficient", 1.0))
    row = checked_row(where, dense(where, entry["steering_vector"]), model)
    point = HookPoint("resid_post", checked_layer(where, int(block[1]), model))
    if entry.get("action") == "add":
        return Direction(point, row, "add", coefficient)
    if entry.get("action") == "clamp" and coefficient == 0:
        return Direction(point, row, "ablate", 1.0)
    raise refused(where, "the action add, or clamp to 0", f"{entry.get('action')!r} {coefficient:g}"[:80])

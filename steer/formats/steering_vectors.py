"""steering-vectors of the package of that name: its `SteeringVector`, whose fields are kept in a file of torch.save.

The package has no format of its own. The file holds its two fields, so that there
`SteeringVector(**torch.load(FILE, weights_only=True))` is the vector. A row of a decoder_block is added to the output
of that 0-based block. Its other layer types are outputs of modules that some models normalise before they are added, so
they are not read.
"""

from collections.abc import Sequence
from pathlib import Path

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
    checked_row,
    dense,
    refused,
    scaled_rows,
)
from steer.vectors import SteeringVector

TITLE = "steering-vectors"
LAYER_TYPE = "decoder_block"
FIELDS = {"layer_activations", "layer_type"}


def matches(file: Candidate) -> bool:
    """A file of torch.save with its fields."""
    return isinstance(file.torch, dict) and file.torch.keys() == FIELDS


def read(path: Path, model: ModelRef) -> list[Direction]:
    """Its rows."""
    content = load_torch(path)
    if not isinstance(content, dict) or content.keys() != FIELDS or not isinstance(content["layer_activations"], dict):
        raise corrupt(path, f"a dict of {' and '.join(sorted(FIELDS))}", type(content).__name__)
    if content["layer_type"] != LAYER_TYPE:
        raise refused(path, f"the layer type {LAYER_TYPE}", repr(content["layer_type"])[:80])
    found = []
    for layer, values in content["layer_activations"].items():
        if type(layer) is not int or not isinstance(values, torch.Tensor):
            raise corrupt(path, "a tensor a block", f"{type(values).__name__} at {layer!r}"[:80])
        where = f"{path}: block {layer}"
        row = checked_row(where, dense(where, values), model)
        found.append(Direction(HookPoint("resid_post", checked_layer(where, layer, model)), row))
    if not found:
        raise corrupt(path, "a row", "none")
    return found


def write(vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
    """One row a block."""
    check_expressible(vectors, TITLE)
    rows, strength = scaled_rows(vectors, folded)
    layers = {point.layer: torch.from_numpy(row) for point, row in rows.items()}
    torch.save({"layer_activations": layers, "layer_type": LAYER_TYPE}, path)
    return [f"SteeringVector(**torch.load('{path}', weights_only=True)).apply(model, multiplier={strength:.6g})"]

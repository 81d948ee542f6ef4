"""Vectors of hotwire, a plugin of vLLM: a table of one row a block in a file of torch.save.

A request names the file (without its ending), a 0-based block whose output the row is added to, a scale, and whether
only generated tokens are steered. Rows of zeros are for no use. A file of a single row says no block, so it is not
read.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt
from sae.formats.state_dict import load_torch
from steer.formats.base import Candidate, Direction, check_expressible, dense, refused, row_at, strength_of, table_rows
from steer.vectors import SteeringVector

TITLE = "hotwire table"


def matches(file: Candidate) -> bool:
    """A file of torch.save with one table."""
    return isinstance(file.torch, torch.Tensor)


def read(path: Path, model: ModelRef) -> list[Direction]:
    """Its rows that are not zero; scales are given in a request, so that of the file is 1."""
    table = load_torch(path)
    if not isinstance(table, torch.Tensor) or not table.is_floating_point():
        raise corrupt(path, "a table of floats", type(table).__name__)
    if tuple(table.shape) != (model.n_layers, model.d_model):
        raise refused(path, f"{model.n_layers} x {model.d_model} for {model.id}", "x".join(map(str, table.shape)))
    return table_rows(path, dense(path, table), model, "resid_post", "add")


def write(vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
    """One row a block; gives what a request says."""
    if path.suffix != ".pt":
        raise refused(path, "a name that ends in .pt", path.name)
    check_expressible(vectors, TITLE, scopes=("all", "generated"))
    model = vectors[0].model
    table, asked = np.zeros((model.n_layers, model.d_model), np.float32), []
    for vector in vectors:
        scale, layer = strength_of([vector], folded), HookPoint.parse(vector.hook_point).layer
        table[layer] = row_at(vector, scale)
        entry = {"id": path.stem, "layer": layer, "scale": scale}
        asked.append(entry | ({"decode_only": True} if vector.scope == "generated" else {}))
    torch.save(torch.from_numpy(table), path)
    spec = json.dumps(asked[0] if len(asked) == 1 else asked)
    return [f"HOTWIRE_VECTORS={path}", f"in a request: {json.dumps({'vllm_xargs': {'hotwire': spec}})}"]

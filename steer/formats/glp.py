"""GGUF Layer Projection (spec of September 2026): control vectors that say whether they are added or projected out.

In mode add, h + alpha * d; in mode project, h - alpha * d (d·h), with unit d. Stock llama.cpp does not know the mode
and adds in any case, so these files are not `llama_cpp`'s. Rank above 1 and scales a layer are not read.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt
from steer.formats._gguf import is_directions, layer_of, read_container, says_glp, write_container
from steer.formats.base import (
    Candidate,
    Direction,
    check_expressible,
    checked_layer,
    checked_number,
    checked_row,
    checked_word,
    refused,
    scaled_rows,
)
from steer.vectors import SteeringVector

TITLE = "GLP"
MODES = {"add": "add", "project": "ablate"}
SITES = {"residual_stream_post_layer": "resid_post", "ffn_out_pre_residual": "mlp_out",
         "attn_out_pre_residual": "attn_out"}  # fmt: skip
DEFAULT_SITE = "residual_stream_post_layer"
UNIT = 1e-3
"""how far a length may be from 1 in mode project"""


def matches(file: Candidate) -> bool:
    """A GGUF file of directions with keys of GLP."""
    return is_directions(file.path) and says_glp(file.path)


def read(path: Path, model: ModelRef) -> list[Direction]:
    """Its rows, at the strength that it suggests."""
    keys, tensors = read_container(path)
    mode = checked_word(f"{path}: glp.mode", keys.get("glp.mode", "add"), MODES)
    hook = checked_word(f"{path}: glp.hook_point", keys.get("glp.hook_point", DEFAULT_SITE), SITES)
    if keys.get("glp.rank", 1) != 1 or {"glp.dir_scales", "glp.layer_scales"} & keys.keys():
        raise refused(path, "one direction a layer, without scales", "a rank above 1, or scales")
    alpha = checked_number(f"{path}: glp.alpha_default", keys.get("glp.alpha_default", 1.0))
    if not tensors:
        raise corrupt(path, "a direction", "none")
    found = []
    for name, values in tensors.items():
        row = checked_row(f"{path}: {name}", values, model)
        if mode == "project" and abs(float(np.linalg.norm(row)) - 1) > UNIT:
            raise corrupt(f"{path}: {name}", "a length of 1", f"{np.linalg.norm(row):.4g}")
        point = HookPoint(SITES[hook], checked_layer(f"{path}: {name}", layer_of(path, name), model))
        found.append(Direction(point, row, MODES[mode], alpha))
    return found


def write(vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
    """Vectors of one operation and one site, from block 1 on."""
    check_expressible(vectors, TITLE, operations=tuple(MODES.values()), sites=tuple(SITES.values()), first_layer=1)
    operations, sites = ({vector.operation for vector in vectors}, {_site(vector) for vector in vectors})
    if len(operations) > 1 or len(sites) > 1:
        raise refused(path, "vectors of one operation at one site", ", ".join(sorted(operations | sites)))
    mode = next(name for name, operation in MODES.items() if operation in operations)
    hook = next(name for name, site in SITES.items() if site in sites)
    if mode == "add":
        rows, alpha = scaled_rows(vectors, folded)
    else:
        shares = {vector.coefficient for vector in vectors}
        if folded or len(shares) > 1:
            got = "one folded into unit directions" if folded else ", ".join(f"{share:g}" for share in sorted(shares))
            raise refused(path, "one share for all layers in mode project, kept apart", got)
        rows, alpha = {HookPoint.parse(each.hook_point): each.direction for each in vectors}, shares.pop()
    keys = {"glp.mode": mode, "glp.spec_version": 1, "glp.hook_point": hook, "glp.alpha_default": float(alpha)}
    write_container(path, vectors[0].model, rows, keys)
    return [f"mode {mode} at strength {alpha:.6g}; stock llama.cpp would add it whatever it says"]


def _site(vector: SteeringVector) -> str:
    return HookPoint.parse(vector.hook_point).site

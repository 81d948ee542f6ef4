"""Directional steering of ds4: FILE.f32, float32 of n_layers rows without a header, and FILE.json beside it.

The engine takes scale * d (d·y) off what a block's feed-forward network (or attention) writes, before it reaches the
residual stream: an ablation at mlp_out or attn_out whose share is the scale, with the same sign; a negative scale
amplifies. It adds nothing, so that a vector that is added cannot be written. Rows of zeros do nothing.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import read_json
from steer.formats.base import Candidate, Direction, check_expressible, checked_size, checked_word, refused, table_rows
from steer.vectors import SteeringVector

TITLE = "ds4 direction"
FORMAT = "ds4-directional-steering-v1"
SITES = {"ffn_out": "mlp_out", "attn_out": "attn_out"}
FLAGS = {"ffn_out": "--dir-steering-ffn", "attn_out": "--dir-steering-attn"}
LARGEST = 100.0
"""scale that the engine takes at most"""


def matches(file: Candidate) -> bool:
    """A .f32 with a .json of this format beside it."""
    return file.path.suffix == ".f32"


def read(path: Path, model: ModelRef) -> list[Direction]:
    """Its rows that are not zero, as ablations of the whole share."""
    size, wanted = checked_size(path, "a .f32 of directions"), 4 * model.n_layers * model.d_model
    if size != wanted:
        expected = f"{wanted} bytes, float32 of {model.n_layers} x {model.d_model} for {model.id}"
        raise refused(path, expected, f"{size} bytes")
    component = "ffn_out"
    if (beside := path.with_suffix(".json")).is_file():
        about = read_json(beside)
        if about.get("format") != FORMAT:
            raise refused(beside, f"the format {FORMAT}", repr(about.get("format"))[:80])
        component = checked_word(f"{beside}: component", about.get("component", component), SITES)
    rows = np.fromfile(path, "<f4").reshape(model.n_layers, model.d_model)
    return table_rows(path, rows, model, SITES[component], "ablate")


def write(vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
    """Ablations of one share at one sub-layer output, one a block."""
    if path.suffix != ".f32":
        raise refused(path, "a name that ends in .f32", path.name)
    check_expressible(vectors, TITLE, operations=("ablate",), sites=tuple(SITES.values()))
    points = [HookPoint.parse(vector.hook_point) for vector in vectors]
    sites, shares = {point.site for point in points}, {vector.coefficient for vector in vectors}
    if len(sites) > 1 or len(shares) > 1 or folded:
        raise refused(path, "vectors of one site and one share, which is not folded in", ", ".join(sorted(sites)))
    share = shares.pop()
    if abs(share) > LARGEST:
        raise refused(path, f"a share of at most {LARGEST:g}", f"{share:g}")
    component = next(name for name, site in SITES.items() if site in sites)
    model = vectors[0].model
    rows = np.zeros((model.n_layers, model.d_model), "<f4")
    for point, vector in zip(points, vectors, strict=True):
        rows[point.layer] = vector.direction
    rows.tofile(path)
    about = {
        "format": FORMAT, "shape": [model.n_layers, model.d_model], "component": component, "model": model.id,
        "note": f"written by saekit for weights {model.fingerprint}",
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    other = "" if component == "ffn_out" else f" {FLAGS['ffn_out']} 0"
    return [f"ds4 --dir-steering-file {path} {FLAGS[component]} {share:.6g}{other}"]

"""Control vectors of llama.cpp in GGUF, which repeng and EasySteer write too.

direction.N is added to the output of the 0-based block N: resid_post.N. llama.cpp cannot steer block 0 and rejects a
whole file with a direction.0, so none is written; EasySteer writes one, and it is read. llama.cpp's own
cvector-generator names a direction that it read from block N - 1 direction.N: what it does is what the name says.
"""

from collections.abc import Sequence
from pathlib import Path

from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt
from steer.formats._gguf import OWN, is_directions, layer_of, read_container, says_glp, write_container
from steer.formats.base import (
    Candidate,
    Direction,
    check_expressible,
    checked_layer,
    checked_number,
    checked_row,
    refused,
    scaled_rows,
)
from steer.vectors import SteeringVector

TITLE = "llama.cpp control vector"
STRENGTH = f"{OWN}strength"
"""what `--control-vector-scaled` is to be given, in files of this project"""


def matches(file: Candidate) -> bool:
    """A GGUF file of directions that says nothing of GLP."""
    return is_directions(file.path) and not says_glp(file.path)


def read(path: Path, model: ModelRef) -> list[Direction]:
    """Its rows, at strength 1 if it is not said: llama.cpp has it from its command line."""
    keys, tensors = read_container(path)
    strength = checked_number(f"{path}: {STRENGTH}", keys.get(STRENGTH, 1.0))
    if any(name.startswith("glp.") for name in keys):
        raise refused(path, "a file without keys of GLP, which may project instead of adding", "one with them")
    if not tensors:
        raise corrupt(path, "a direction", "none")
    return [
        Direction(
            HookPoint("resid_post", checked_layer(f"{path}: {name}", layer_of(path, name), model)),
            checked_row(f"{path}: {name}", values, model),
            coefficient=strength,
        )
        for name, values in tensors.items()
    ]


def write(vectors: Sequence[SteeringVector], path: Path, folded: bool) -> list[str]:
    """One direction a block from block 1 on."""
    check_expressible(vectors, TITLE, first_layer=1)
    rows, strength = scaled_rows(vectors, folded)
    write_container(path, vectors[0].model, rows, {STRENGTH: float(strength)})
    return [f"llama-server -m MODEL.gguf --control-vector-scaled {path}:{strength:.6g}"]

"""GGUF files that hold directions instead of a model: what llama.cpp's control vectors and GLP have in common."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from activations.errors import SaekitError
from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt
from steer.formats.base import checked_size

ARCHITECTURE = "controlvector"
MAGIC = b"GGUF"
OWN = "saekit."
"""prefix of keys that only this project reads"""


class Container(NamedTuple):
    """What such a file holds."""

    keys: dict[str, Any]
    tensors: dict[str, np.ndarray]
    """by name; float32"""


def read_container(path: Path) -> Container:
    """Keys and tensors. Raises: MissingArtefactError, CorruptArtefactError."""
    import gguf

    checked_size(path, "a GGUF file of directions")
    try:
        reader = gguf.GGUFReader(path, "r")
        keys = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {}
        for tensor in reader.tensors:
            if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
                raise corrupt(path, "tensors of F32", f"{tensor.name} in {tensor.tensor_type.name}")
            tensors[tensor.name] = np.array(tensor.data)
    except SaekitError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise corrupt(path, "a GGUF file", f"{type(error).__name__}: {str(error)[:100]}") from error
    return Container(keys, tensors)


def is_directions(path: Path) -> bool:
    """Whether a file is one of these, as far as its beginning tells."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return head.startswith(MAGIC) and ARCHITECTURE.encode() in head


def says_glp(path: Path) -> bool:
    """Whether the beginning of such a file has keys of GLP."""
    with path.open("rb") as file:
        return b"glp." in file.read(1 << 16)


def write_container(
    path: Path, model: ModelRef, rows: Mapping[HookPoint, np.ndarray], keys: Mapping[str, str | int | float]
) -> None:
    """Write direction.N of each 0-based block N, and keys beside those that readers ask for."""
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", model.id)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", model.n_layers)
        writer.add_string(f"{OWN}model_fingerprint", model.fingerprint)
        for name, value in keys.items():
            kind = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            kind(name, value)
        for point, row in sorted(rows.items(), key=lambda each: each[0].layer):
            writer.add_tensor(f"direction.{point.layer}", np.ascontiguousarray(row, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def layer_of(path: Path, name: str) -> int:
    """N of direction.N. Raises: CorruptArtefactError."""
    kind, _, number = name.partition(".")
    if kind != "direction" or not (number.isascii() and number.isdigit()) or len(number) > 6:
        raise corrupt(path, "tensors called direction.N", name[:80])
    return int(number)

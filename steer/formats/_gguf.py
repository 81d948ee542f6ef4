"""GGUF files that hold directions instead of a model: what llama.cpp's control vectors and GLP have in common."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from activations.errors import SaekitError
from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.checked_files import corrupt
from steer.formats.base import checked_size

ARCHITECTURE = "controlvector"
MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, STRING: 8, 10: 8, 11: 8, 12: 8}
"""kind of value -> bytes, of a string those of its length; arrays of arrays are not read"""
MOST = 4096
"""tensors, and keys, that are read: more than a file of directions has"""
LEAST_KEY, LEAST_TENSOR = 13, 32
"""bytes that a key and a tensor take at least"""
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

    _check_header(path, checked_size(path, "a GGUF file of directions"))
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


def _check_header(path: Path, size: int) -> None:
    """Walk keys and tensors, so that gguf, which believes what lengths say, meets none that the file cannot hold.

    Raises: CorruptArtefactError.
    """
    with path.open("rb") as file:
        try:
            _, _, n_tensors, n_keys = struct.unpack("<4sIQQ", file.read(24))
            if max(n_tensors, n_keys) > MOST or n_tensors * LEAST_TENSOR + n_keys * LEAST_KEY > size:
                raise ValueError(f"{n_tensors} tensors and {n_keys} keys in {size} bytes")
            for _ in range(n_keys):
                _skip(file, _whole(file, "<Q"), size)
                kind = _whole(file, "<I")
                if kind == ARRAY:
                    kind, count = _whole(file, "<I"), _whole(file, "<Q")
                    if kind != STRING:
                        _skip(file, count * SIZES[kind], size)
                        continue
                else:
                    count = 1
                if count * SIZES[kind] > size:
                    raise ValueError(f"an array of {count}")
                for _ in range(count):
                    _skip(file, _whole(file, "<Q") if kind == STRING else SIZES[kind], size)
        except (struct.error, ValueError, KeyError) as error:
            raise corrupt(path, "a GGUF file", f"{type(error).__name__}: {error}") from error


def _whole(file: BinaryIO, form: str) -> int:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _skip(file: BinaryIO, n_bytes: int, size: int) -> None:
    """Go on by so many bytes. Raises: ValueError if the file has not so many."""
    if file.tell() + n_bytes > size:
        raise ValueError(f"a length of {n_bytes} in {size} bytes")
    file.seek(n_bytes, 1)


def is_directions(path: Path) -> bool:
    """Whether a file is one of these, as far as its beginning tells."""
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

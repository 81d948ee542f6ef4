"""numpy's `.npz` files of float arrays, whose sizes are compared before memory is taken; no pickle.

An archive is a zip of `.npy` files. 1. The header of each says shape and dtype; 2. the lengths in the zip must be those
that follow, and together at most EXPANSION times the file, since a compressed member can claim to be of any size;
3. data are read with the zip's own checksums. Object arrays, which are pickles, are refused by their header.
"""

import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sae.checked_files import as_float32, check_values, corrupt, missing
from sae.checked_zip import open_zip

EXPANSION = 64
SLACK_BYTES = 1 << 20
DTYPES = ("<f4", "<f2", "<f8")


class NpyHead(NamedTuple):
    """What the header of a `.npy` file says."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    length: int
    """bytes of the header itself"""


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes; no data are read. Raises: MissingArtefactError, CorruptArtefactError."""
    return {name: head.shape for name, head in _heads(path).items()}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays in float32; their shapes should have been compared with `npz_shapes`.

    Raises: CorruptArtefactError, NumericsError naming the array.
    """
    heads, arrays = _heads(path), {}
    for name, head in heads.items():
        count = math.prod(head.shape)
        try:
            with open_zip(path) as archive, archive.open(f"{name}.npy") as file:
                file.read(head.length)
                values = np.frombuffer(file.read(), head.dtype, count)
        except Exception as error:  # zipfile raises whatever a damaged file leads it into
            raise _damaged(path, error) from error
        arrays[name] = as_float32(values.reshape(head.shape, order="F" if head.is_fortran else "C"))
        check_values(str(path), name, arrays[name])
    return arrays


def _heads(path: Path) -> dict[str, NpyHead]:
    if not path.is_file():
        raise missing(path, "the weights")
    try:
        with open_zip(path) as archive:
            members, heads = archive.infolist(), {}
            for member in members:
                heads[member.filename] = _head(archive, member)
    except Exception as error:  # zipfile and numpy raise whatever a damaged file leads them into
        raise _damaged(path, error) from error
    if len(heads) < len(members) or not all(name.endswith(".npy") for name in heads):
        raise corrupt(path, "arrays of different names", ", ".join(member.filename for member in members)[:200])
    if sum(member.file_size for member in members) > EXPANSION * path.stat().st_size + SLACK_BYTES:
        raise corrupt(path, f"arrays at most {EXPANSION} times as large as the file", "larger ones")
    for member in members:
        head = heads[member.filename]
        if head.dtype.str not in DTYPES:
            raise corrupt(f"{path}: {member.filename}", f"one of the dtypes {', '.join(DTYPES)}", str(head.dtype))
        if member.file_size != head.length + math.prod(head.shape) * head.dtype.itemsize:
            raise corrupt(f"{path}: {member.filename}", f"the bytes of {list(head.shape)}", f"{member.file_size}")
    return {name.removesuffix(".npy"): head for name, head in heads.items()}


def _head(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NpyHead:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f".npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
        return NpyHead(shape, dtype, is_fortran, file.tell())


def _damaged(path: Path, error: Exception) -> Exception:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return corrupt(path, "an intact .npz file", reason)

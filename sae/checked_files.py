"""Reading JSON and safetensors files that nobody vouches for, in numpy alone.

Every size is compared before memory is taken: 1. JSON has a limit; 2. names, shapes and dtypes of tensors come from the
header, which safetensors checks against the length of the file; 3. data are read, widened to float32 and compared with
what is finite. Whatever is wrong is one SaekitError that names the file. There is no pickle. Left out: what the content
means, which `sae.artefact` and `sae.formats` know.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from activations.errors import CorruptArtefactError, MissingArtefactError, NumericsError, ShapeError

JSON_BYTES = 64 << 20
"""the largest JSON file that is read"""
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
"""dtypes of safetensors that are read, and how numpy sees their bytes"""


class TensorHead(NamedTuple):
    """What a file says about one tensor."""

    shape: tuple[int, ...]
    dtype: str


def corrupt(where: str | Path, expected: str, got: str) -> CorruptArtefactError:
    """The error for a file that is not what it should be."""
    return CorruptArtefactError(where, expected=expected, got=got, fix="Get an intact copy, or make it again.")


def missing(path: Path, what: str) -> MissingArtefactError:
    """The error for a file that is not there."""
    fix = "Check the path; saekit train makes an SAE, saekit convert reads those of other projects."
    return MissingArtefactError(path, expected=what, got="nothing", fix=fix)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises: MissingArtefactError, CorruptArtefactError."""
    try:
        if path.stat().st_size > JSON_BYTES:
            raise corrupt(path, f"at most {JSON_BYTES >> 20} MiB of JSON", f"{path.stat().st_size} bytes")
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(path, "an SAE directory with this file") from error
    except OSError as error:
        raise corrupt(path, "a readable file", str(error.strerror)) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorruptArtefactError):
            raise
        raise corrupt(path, "valid JSON", "something else") from error
    if not isinstance(content, dict):
        raise corrupt(path, "a JSON object", type(content).__name__)
    return content


def safetensors_heads(path: Path) -> dict[str, TensorHead]:
    """Names, shapes and dtypes from the header; raises MissingArtefactError or CorruptArtefactError."""
    if not path.is_file():
        raise missing(path, "the weights")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: TensorHead(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise corrupt(path, "an intact safetensors file", str(error).splitlines()[0]) from error


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors in float32; their shapes should have been compared with `safetensors_heads`.

    bfloat16, which numpy does not know, is widened from its bits. Raises: CorruptArtefactError for other dtypes,
    NumericsError naming the tensor.
    """
    heads = safetensors_heads(path)
    for name, head in heads.items():
        if head.dtype not in FLOATS:
            raise corrupt(f"{path}: {name}", f"one of the dtypes {', '.join(FLOATS)}", head.dtype)
    tensors = {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, head in heads.items():
            file.seek(8 + length + header[name]["data_offsets"][0])
            bits = np.fromfile(file, FLOATS[head.dtype], math.prod(head.shape))
            if bits.size != math.prod(head.shape):  # it names a tensor twice, or was cut short just now
                raise corrupt(f"{path}: {name}", "as many bytes as the header says", "fewer")
            tensors[name] = as_float32(bits.reshape(head.shape), bfloat16=head.dtype == "BF16")
            check_values(str(path), name, tensors[name])
    return tensors


def as_float32(values: np.ndarray, bfloat16: bool = False) -> np.ndarray:
    """The values in float32, contiguous; what is too large becomes infinite. `bfloat16`: they are its bits."""
    if bfloat16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32, order="C")


def check_shapes(where: str, got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ShapeError naming the first tensor that is missing, too many, or of another shape."""
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise ShapeError(
                f"{where}: tensor '{name}'",
                expected=f"shape {list(expected[name])}" if name in expected else "no such tensor",
                got=list(got[name]) if name in got else "no such tensor",
                fix="The file is not whole, or belongs to another config.",
            )


def check_values(where: str, name: str, tensor: np.ndarray) -> None:
    """Raise NumericsError for NaN and infinity; a threshold may be +inf, which switches its latent off."""
    bad = np.isnan(tensor) | (tensor == -np.inf) if name == "threshold" else ~np.isfinite(tensor)
    if bad.any():
        raise NumericsError(
            f"{where}: tensor '{name}'",
            expected="finite values",
            got=f"{int(bad.sum())} NaN or infinite",
            fix="Train again, or get an intact copy.",
        )

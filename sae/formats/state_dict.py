"""PyTorch's `.pt` files that hold a dict of tensors, read without running what a pickle may say.

1. The file must be a zip whose members are stored as they are: the lengths of all tensors are then bounded by that of
the file; 2. `torch.load` with `weights_only`, which builds tensors and nothing else, mapped from the file; 3. names,
shapes and dtypes, before data are copied. torch is imported here when the first such file is read or written.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae.checked_files import TensorHead, check_values, corrupt, missing
from sae.checked_zip import open_zip

PICKLE_BYTES = 16 << 20
"""the largest list of tensors that is read"""
DTYPES = ("float32", "float16", "bfloat16", "float64", "int32", "int64")
Check = Callable[[Mapping[str, tuple[int, ...]]], None]


def read_state_dict(path: Path, check: Check) -> dict[str, np.ndarray]:
    """All tensors, floats in float32 and whole numbers in int64, once `check` has approved of their shapes.

    Raises: MissingArtefactError, CorruptArtefactError, NumericsError naming the tensor.
    """
    import torch

    state = load_torch(path)
    heads = _heads(path, state)
    check({name: head.shape for name, head in heads.items()})
    tensors = {}
    for name, tensor in state.items():
        wanted = torch.float32 if tensor.is_floating_point() else torch.int64
        tensors[name] = np.array(tensor.detach().to(wanted).numpy(), order="C")
        if tensor.is_floating_point():
            check_values(str(path), name, tensors[name])
    return tensors


def load_torch(path: Path) -> Any:
    """Whatever a file holds, of tensors, numbers, names and containers of them; tensors are mapped from the file.

    Raises: MissingArtefactError, CorruptArtefactError.
    """
    _check_zip(path)
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises whatever a damaged file leads it into
        raise corrupt(path, "tensors alone, as torch.save writes them", _first_line(error)) from error


def write_state_dict(path: Path, tensors: Mapping[str, np.ndarray | int | float]) -> None:
    """Arrays in float32; a whole number becomes an int32 scalar and another number a float32 one."""
    import torch

    def convert(value: np.ndarray | int | float) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.array(value, np.float32, order="C"))
        return torch.tensor(value, dtype=torch.int32 if isinstance(value, int) else torch.float32)

    torch.save({name: convert(value) for name, value in tensors.items()}, path)


def _check_zip(path: Path) -> None:
    if not path.is_file():
        raise missing(path, "the weights")
    try:
        with open_zip(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile raises whatever a damaged file leads it into
        raise corrupt(path, "a file that torch.save wrote", _first_line(error)) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise corrupt(path, "tensors stored as they are", "compressed ones")
    pickles = [member.file_size for member in members if member.filename.endswith(".pkl")]
    if len(pickles) != 1 or pickles[0] > PICKLE_BYTES:
        raise corrupt(path, f"one list of tensors of at most {PICKLE_BYTES} bytes", f"{pickles[:3]}")


def _heads(path: Path, state: object) -> dict[str, TensorHead]:
    import torch

    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise corrupt(path, "a dict of tensors by name", type(state).__name__)
    heads = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise corrupt(f"{path}: {name}", "a tensor", type(tensor).__name__)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            got = f"{dtype}, {tensor.layout}, {tensor.device}"
            raise corrupt(f"{path}: {name}", f"a dense tensor of {', '.join(DTYPES)}", got)
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise corrupt(f"{path}: {name}", "as many numbers as its shape says", "fewer, read again and again")
        heads[name] = TensorHead(tuple(tensor.shape), dtype)
    return heads


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

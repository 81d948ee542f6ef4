"""Files of torch.save that hold tensors, numbers and names alone: read without running anything that is in them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from sae.checked_files import corrupt
from steer.formats.base import checked_size


def read_torch(path: Path) -> Any:
    """What torch.save wrote. Raises: MissingArtefactError, CorruptArtefactError."""
    size = checked_size(path, "a file of torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.infolist()
            is_plain = all(each.compress_type == zipfile.ZIP_STORED for each in inside)
            if not is_plain or sum(each.file_size for each in inside) > size:
                raise corrupt(path, "a file that is as large as what it holds", "a compressed one")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError,
            AttributeError, IndexError, OverflowError, NotImplementedError, UnicodeDecodeError) as error:  # fmt: skip
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise corrupt(path, "tensors, numbers and names in a file of torch.save", got) from error


def is_torch(path: Path) -> bool:
    """Whether a file has the name and the beginning of one."""
    if path.suffix not in (".pt", ".pth") or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"

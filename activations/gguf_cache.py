"""A GGUF file as a folder of safetensors and tokenizer, made once and kept.

Flow: 1. check that the file is a whole GGUF; 2. look for its converted copy in `<cache>/models/<sha256 of the file>`;
3. if absent, check for room, dequantise, write into a folder beside it, flush, and rename. The rename is the only step
that others can see, so an interrupted or doubled conversion leaves either nothing or a whole copy.

Dequantised weights are kept in float32, which is exact, up to EXACT_LIMIT_PARAMS; above that in bfloat16, whose
rounding (2^-9 of a weight) is small beside that of 4 to 6 bit quantisation. Left out: running on quantised weights.
"""

import io
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch

from activations.errors import DiskSpaceError, MissingArtefactError, ModelError
from activations.families import find_family
from activations.fingerprints import cache_dir, file_sha256
from activations.quiet import first_line, quiet_transformers

EXACT_LIMIT_PARAMS = 2_000_000_000
_SPARE_BYTES = 100_000_000
_STALE_S = 24 * 3600


def converted(gguf: Path, on_status: Callable[[str], None]) -> tuple[Path, str]:
    """The folder that holds the converted copy of a GGUF file, made now if need be, and the file's SHA-256.

    Raises: MissingArtefactError; ModelError if the file is not a whole GGUF of a supported model; DiskSpaceError.
    """
    check_magic(gguf)
    sha256 = file_sha256(gguf)
    folder = cache_dir() / "models" / sha256
    if not folder.is_dir():
        on_status(f"converting {gguf.name} once, to keep in {folder.parent}")
        _convert(gguf, folder)
    return folder, sha256


def converted_from(folder: Path) -> str | None:
    """The SHA-256 of the GGUF file that a folder is the converted copy of; None for a folder of another kind."""
    whole = folder.resolve()
    return whole.name if whole.parent == (cache_dir() / "models").resolve() else None


def check_magic(gguf: Path) -> None:
    """Refuse at once what is not a GGUF file."""
    if not gguf.is_file():
        raise MissingArtefactError(gguf, expected="a GGUF file", got="nothing there", fix="Check the path.")
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(gguf, expected="a GGUF file", got=f"a file that starts with {magic!r}", fix="Check the path.")


def _convert(gguf: Path, folder: Path) -> None:
    dtype = _stored_dtype(gguf, folder)
    _remove_stale(folder)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        _write_converted(gguf, part, dtype)
        _flush(part)
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _stored_dtype(gguf: Path, folder: Path) -> torch.dtype:
    n_params = _count_params(gguf)
    dtype = torch.float32 if n_params <= EXACT_LIMIT_PARAMS else torch.bfloat16
    _check_space(folder, n_params * dtype.itemsize + _SPARE_BYTES)
    return dtype


def _count_params(gguf: Path) -> int:
    from gguf import GGUFReader

    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors)
    except Exception as error:  # The reader maps the file and fails in many ways where it is cut short.
        got = f"a file that breaks off or is damaged within its {gguf.stat().st_size} bytes"
        fix = "Copy or download the file again."
        raise ModelError(gguf, expected="a whole GGUF file", got=got, fix=fix) from error


def _check_space(folder: Path, needed_bytes: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < needed_bytes:
        raise DiskSpaceError(
            folder.parent,
            expected=f"{needed_bytes / 1e9:.1f} GB free for the converted model",
            got=f"{free_bytes / 1e9:.1f} GB",
            fix="Free some room, or set SAEKIT_CACHE to a folder on another disk.",
        )


def _write_converted(gguf: Path, part: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    try:
        # Transformers shows its dequantising bar whatever its own settings say, hence the redirection.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **where,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # The tokenizers library raises no narrower class.
        raise _unsupported(gguf, first_line(error)) from error
    model, info = loaded
    if info["missing_keys"]:
        raise _unsupported(gguf, f"no weights for {min(info['missing_keys'])}")
    find_family(model)
    with quiet_transformers():
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def _unsupported(gguf: Path, got: str) -> ModelError:
    return ModelError(
        gguf,
        expected="a GGUF file of a model that transformers can read",
        got=got,
        fix="Use the safetensors version of the model.",
    )


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _publish(part: Path, folder: Path) -> None:
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # Otherwise another process was first, and its copy is as good.
            raise


def _remove_stale(folder: Path) -> None:
    for path in folder.parent.glob(f".{folder.name}.*"):
        with suppress(FileNotFoundError):  # Another process may have just renamed it.
            if time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)

"""Where an index stands: what was found so far and in which texts, in one safetensors file beside the database.

The file is replaced at checkpoints, written whole before it is renamed, so that a run killed at any instant goes on
from the last one. It stays when the run ends: with it more text can be added later. Nothing else needs it.
"""

import os
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from activations.config import Config
from activations.errors import CorruptArtefactError, MismatchError, MissingArtefactError
from sae.index_db import FILE_NAME
from sae.index_pass import PassSettings, Statistics

STATE_NAME = "index_state.safetensors"
_KEY = "progress"


class Cursor(Config):
    """How far a text was read; what `sae.index_source` needs to go on there."""

    sequence: int = Field(default=0, description="sequences read")
    tokens: int = Field(default=0, description="unmasked tokens among them")
    position: tuple[int, int] = Field(default=(0, 0), description="text: document and token where it goes on")
    outlier_limits: dict[str, float] = Field(default={}, description="text: largest norm that counts, by hook point")


class SourceState(Config):
    """One text of the index."""

    name: str = Field(description="the store's path, or the text")
    key: str = Field(description="SHA-256 over what makes it a text: model, tokenizer, documents, length of sequences")
    cursor: Cursor = Field(default_factory=Cursor, description="how far it was read")


class Progress(Config):
    """What the statistics of the file are of."""

    sae_sha256: str = Field(description="hash of the SAE")
    settings: dict[str, int] = Field(description="PassSettings")
    sources: tuple[SourceState, ...] = Field(default=(), description="texts read, in the order of their numbers")

    def with_source(self, number: int, source: SourceState) -> "Progress":
        """The same with one text changed, or one more."""
        sources = (*self.sources[:number], source, *self.sources[number + 1 :])
        return self.model_copy(update={"sources": sources})


def save_state(out: Path, progress: Progress, statistics: Statistics) -> None:
    """Replace the state in directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / (STATE_NAME + ".partial")
    tensors = {name: value.cpu().contiguous() for name, value in statistics.tensors().items()}
    save_file(tensors, partial, metadata={_KEY: progress.model_dump_json()})
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    partial.replace(out / STATE_NAME)


def load_state(
    out: Path, sae_sha256: str, settings: PassSettings, d_sae: int, device: torch.device
) -> tuple[Progress, Statistics]:
    """The state in directory `out`, or the state of nothing read.

    Raises: MismatchError if it is of another SAE or of other settings, MissingArtefactError if there is an index
      without a state, CorruptArtefactError if it cannot be read.
    """
    fresh = Progress(sae_sha256=sae_sha256, settings=settings._asdict())
    statistics = Statistics(settings, d_sae, device)
    path = out / STATE_NAME
    if not path.exists():
        if (out / FILE_NAME).exists():
            fix = "Choose another out, or delete the index."
            raise MissingArtefactError(path, expected="the state of the index beside it", got="nothing", fix=fix)
        return fresh, statistics
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            progress = Progress.model_validate_json((file.metadata() or {})[_KEY])
            _check(out, progress, fresh)
            statistics.load(_read_tensors(file, statistics))
    except (SafetensorError, OSError, KeyError, ValidationError, RuntimeError) as error:
        if isinstance(error, MismatchError | CorruptArtefactError):
            raise
        raise _corrupt(path, str(error).splitlines()[0]) from error
    return progress, statistics


def _check(out: Path, progress: Progress, fresh: Progress) -> None:
    if progress.sae_sha256 != fresh.sae_sha256:
        raise MismatchError(
            out,
            expected="an index of this SAE",
            got="one of another SAE, or of this one before it was trained again",
            fix="Choose another out, or delete the index.",
        )
    for name, value in fresh.settings.items():
        if progress.settings.get(name) != value:
            raise MismatchError(
                out,
                expected=f"{name}={progress.settings.get(name)}, as it was begun with",
                got=value,
                fix="Use that, or choose another out.",
            )


def _read_tensors(file: Any, statistics: Statistics) -> dict[str, Tensor]:
    """Names, shapes and dtypes are compared before memory is taken; the sample of tokens may have any length."""
    expected, tensors = statistics.tensors(), {}
    if set(file.keys()) != set(expected):
        raise _corrupt(STATE_NAME, "other tensors")
    for name, tensor in expected.items():
        shape = tuple(file.get_slice(name).get_shape())
        is_right = len(shape) == tensor.ndim if name.startswith("sample.") else shape == tuple(tensor.shape)
        if not is_right:
            raise _corrupt(STATE_NAME, f"'{name}' of shape {list(shape)}")
        tensors[name] = file.get_tensor(name)
        if tensors[name].dtype != tensor.dtype:
            raise _corrupt(STATE_NAME, f"'{name}' of dtype {tensors[name].dtype}")
    counts, latents = tensors["sample.counts"], tensors["sample.latents"]
    whole = len(counts) == len(tensors["sample.priority"]) and int(counts.sum()) == len(latents)
    if not whole or not ((counts >= 0).all() and (latents >= 0).all() and (latents < statistics.d_sae).all()):
        raise _corrupt(STATE_NAME, "a sample of tokens that cannot be")
    return tensors


def _corrupt(path: str | Path, got: str) -> CorruptArtefactError:
    fix = "Delete the index and build it again."
    return CorruptArtefactError(path, expected="the state of a feature index", got=got, fix=fix)

"""Where an index stands: what was found so far and in which texts, in one safetensors file beside the database.

The file is replaced at checkpoints, written whole before it is renamed, so that a run killed at any instant goes on
from the last one. It stays when the run ends: with it more text can be added later, and two indices be compared on the
same tokens (`sae.same_tokens`). Tensors are compressed, which leaves a third of them; their shapes are in the metadata,
and compared before memory is taken.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Zstd
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from activations.config import Config
from activations.errors import CorruptArtefactError, MismatchError, MissingArtefactError, SaekitError
from sae import coactivation
from sae.artefact import SaeArtefact
from sae.index_db import FILE_NAME
from sae.index_pass import PassSettings, Statistics

STATE_NAME = "index_state.safetensors"
_KEY, _SAMPLE = "state", "sample."
_ZSTD = Zstd(level=1)


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

    sae_sha256: str = Field(description="hash of the SAE's weights")
    hook_point: str = Field(description="what the SAE reads and writes, which its weights do not say")
    settings: dict[str, int] = Field(description="PassSettings")
    sources: tuple[SourceState, ...] = Field(default=(), description="texts read, in the order of their numbers")

    def with_source(self, number: int, source: SourceState) -> "Progress":
        """The same with one text changed, or one more."""
        sources = (*self.sources[:number], source, *self.sources[number + 1 :])
        return self.model_copy(update={"sources": sources})


class _Head(Config):
    """The metadata of the file; under one key, since several come in any order."""

    progress: Progress = Field(description="what its statistics are of")
    shapes: dict[str, tuple[int, ...]] = Field(description="shapes of its tensors before they were packed")


def save_state(out: Path, progress: Progress, statistics: Statistics) -> None:
    """Replace the state in directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / (STATE_NAME + ".partial")
    tensors = {name: value.cpu() for name, value in statistics.tensors().items()}
    head = _Head(progress=progress, shapes={name: tuple(value.shape) for name, value in tensors.items()})
    packed = {name: _packed(value) for name, value in tensors.items()}
    save_file(packed, partial, metadata={_KEY: head.model_dump_json()})
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    partial.replace(out / STATE_NAME)


def load_state(
    out: Path, artefact: SaeArtefact, settings: PassSettings, device: torch.device
) -> tuple[Progress, Statistics]:
    """The state in directory `out`, or the state of nothing read.

    Raises: MismatchError if it is of another SAE, hook point or settings, MissingArtefactError if there is an index
      without a state, CorruptArtefactError if it cannot be read.
    """
    fresh = Progress(sae_sha256=str(artefact.sha256), hook_point=artefact.hook_point, settings=settings._asdict())
    statistics = Statistics(settings, artefact.d_sae, device)
    path = out / STATE_NAME
    if not path.exists():
        if (out / FILE_NAME).exists():
            raise _missing(path, "Choose another out, or delete the index.")
        return fresh, statistics
    with _opened(path) as (file, head):
        _check(out, head.progress, fresh)
        expected = statistics.tensors()
        if set(file.keys()) != set(expected):
            raise _corrupt(STATE_NAME, "other tensors")
        wholes = {name: value for name, value in expected.items() if not name.startswith(_SAMPLE)}
        for name, value in wholes.items():
            if head.shapes.get(name) != tuple(value.shape):
                raise _corrupt(STATE_NAME, f"'{name}' of shape {head.shapes.get(name)}")
        tensors = {name: _unpacked(file, name, value.shape, value.dtype) for name, value in wholes.items()}
        sample = _read_sample(file, head, artefact.d_sae)
        statistics.load(tensors | {_SAMPLE + name: value for name, value in sample._asdict().items()})
    return head.progress, statistics


def load_sample(out: Path, d_sae: int) -> coactivation.TokenSample:
    """The sample of tokens in the state in directory `out`, with the active latents of an SAE that has `d_sae`.

    Raises: MissingArtefactError if there is no state, CorruptArtefactError if it cannot be read.
    """
    path = out / STATE_NAME
    if not path.exists():
        raise _missing(path, "Build the index again.")
    with _opened(path) as (file, head):
        return _read_sample(file, head, d_sae)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, _Head]]:
    """The file and its metadata; whatever goes wrong with it is a CorruptArtefactError."""
    try:
        with safe_open(path, framework="np") as file:
            yield file, _Head.model_validate_json((file.metadata() or {})[_KEY])
    except SaekitError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _corrupt(path, str(error).splitlines()[0]) from error


def _check(out: Path, progress: Progress, fresh: Progress) -> None:
    if progress.sae_sha256 != fresh.sae_sha256:
        raise MismatchError(
            out,
            expected="an index of this SAE",
            got="one of another SAE, or of this one before it was trained again",
            fix="Choose another out, or delete the index.",
        )
    begun = {**progress.settings, "hook_point": progress.hook_point}
    for name, value in {**fresh.settings, "hook_point": fresh.hook_point}.items():
        if begun.get(name) != value:
            raise MismatchError(
                out,
                expected=f"{name}={begun.get(name)}, as it was begun with",
                got=value,
                fix="Use that, or choose another out.",
            )


def _read_sample(file: Any, head: _Head, d_sae: int) -> coactivation.TokenSample:
    """The sample of tokens, of which nothing has a size that is known before."""
    like = coactivation.empty("cpu")
    (n_tokens,), (n_entries,) = head.shapes[_SAMPLE + "counts"], head.shapes[_SAMPLE + "latents"]
    if not (0 <= n_tokens <= head.progress.settings["coactivation_tokens"] and 0 <= n_entries <= n_tokens * d_sae):
        raise _corrupt(STATE_NAME, f"a sample of {n_tokens} tokens and {n_entries} active latents")
    sizes = {"priority": (n_tokens,), "counts": (n_tokens,), "latents": (n_entries,), "bound": ()}
    tensors = {
        name: _unpacked(file, _SAMPLE + name, torch.Size(sizes[name]), value.dtype)
        for name, value in like._asdict().items()
    }
    sample = coactivation.TokenSample(**tensors)
    counts, latents = sample.counts, sample.latents
    is_whole = int(counts.sum()) == len(latents) and bool((counts >= 0).all())
    if not is_whole or not bool(((latents >= 0) & (latents < d_sae)).all()):
        raise _corrupt(STATE_NAME, "a sample of tokens that cannot be")
    return sample


def _packed(tensor: Tensor) -> np.ndarray:
    """A tensor as a zstd frame of its first bytes, then its second ones, and so on: like bytes beside each other."""
    values = tensor.contiguous().numpy().reshape(-1)
    planes = values.view(np.uint8).reshape(-1, values.itemsize).T
    return np.frombuffer(_ZSTD.encode(np.ascontiguousarray(planes)), np.uint8)


def _unpacked(file: Any, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What `_packed` made of a tensor of this shape and dtype. Raises: ValueError if it is another."""
    planes = np.empty((dtype.itemsize, shape.numel()), np.uint8)
    if planes.size:
        packed = file.get_tensor(name)
        if packed.dtype != np.uint8 or packed.ndim != 1:
            raise _corrupt(STATE_NAME, f"'{name}' of dtype {packed.dtype}")
        if np.asarray(_ZSTD.decode(packed, out=planes)).size != planes.size:
            raise _corrupt(STATE_NAME, f"'{name}' of another length")
    return torch.from_numpy(np.ascontiguousarray(planes.T)).view(-1).view(dtype).view(shape)


def _missing(path: Path, fix: str) -> MissingArtefactError:
    return MissingArtefactError(path, expected="the state of the index beside it", got="nothing", fix=fix)


def _corrupt(path: str | Path, got: str) -> CorruptArtefactError:
    fix = "Delete the index and build it again."
    return CorruptArtefactError(path, expected="the state of a feature index", got=got, fix=fix)

"""A trained SAE on disk and in memory, in numpy alone.

The directory has the layout that SAELens 6 reads and writes, and one file more:

    cfg.json                   what SAELens needs to run the SAE
    sae_weights.safetensors    W_enc [d_model, d_sae], b_enc, W_dec [d_sae, d_model], b_dec, and threshold for jumprelu
    saekit.json                where it came from: store, model, hook point, config, versions, metrics, weight hash

Saving: 1. write all files into a new directory beside the target; 2. rename it into place. Loading, which trusts
nothing: 1. parse the JSON; 2. compare shapes and dtypes from the safetensors header; 3. read, and check the hash and
that all values are finite. There is no pickle. All of SAELens's own names are in this module.

Left out: arithmetic (`sae.torch_view`, `sae.architectures`) and other projects' formats.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from activations.errors import (
    ArtefactError,
    CorruptArtefactError,
    MismatchError,
    MissingArtefactError,
    NumericsError,
    ShapeError,
)
from activations.hook_points import HookPoint

SavedArchitecture = Literal["topk", "jumprelu"]
SAELENS_VERSION = "6.54.12"
# The hook_attn_in and hook_mlp_in of TransformerLens are something else than the sites of these names here.
_TRANSFORMER_LENS_NAMES = {"attn_in": "attn_hc.hook_out", "mlp_in": "mlp_hc.hook_out"}
CONFIG, WEIGHTS, PROVENANCE = "cfg.json", "sae_weights.safetensors", "saekit.json"
# What a cfg.json must say, if it says anything, for its weights to mean what the class below says they mean.
_ONLY = {
    "apply_b_dec_to_input": (True,),
    "normalize_activations": ("none",),
    "reshape_activations": ("none",),
    "rescale_acts_by_decoder_norm": (False,),
}


@dataclass(frozen=True, eq=False)
class SaeArtefact:
    """A sparse autoencoder that reads and writes raw activations.

    pre = (x - b_dec) @ W_enc + b_enc, and latents = the k largest of relu(pre) for topk, or relu(pre) where
    pre > threshold for jumprelu; x_hat = latents @ W_dec + b_dec. Decoder rows of trained SAEs have norm 1, so a latent
    is the length of its part of x. Raises: ShapeError naming the tensor, NumericsError for values that are not finite.
    """

    architecture: SavedArchitecture
    """which rule picks the active latents"""
    W_enc: Float[np.ndarray, "d_model d_sae"]
    """encoder, a column a latent"""
    b_enc: Float[np.ndarray, " d_sae"]
    """added to pre-activations"""
    W_dec: Float[np.ndarray, "d_sae d_model"]
    """decoder, a row a latent"""
    b_dec: Float[np.ndarray, " d_model"]
    """subtracted before the encoder and added after the decoder"""
    threshold: Float[np.ndarray, " d_sae"] | None = None
    """jumprelu: a latent is active strictly above it; +inf switches the latent off"""
    k: int | None = None
    """topk: active latents a token"""
    metadata: dict[str, Any] = field(default_factory=dict)
    """the content of saekit.json"""

    def __post_init__(self) -> None:
        """Check kind, shapes and values."""
        _check_kind("SaeArtefact", self.architecture, self.k, self.d_sae)
        tensors = self.tensors()
        _check_shapes("SaeArtefact", self.architecture, {name: tensor.shape for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            _check_values("SaeArtefact", name, tensor)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def hook_point(self) -> str:
        """Where it reads and writes the residual stream. Raises: CorruptArtefactError if saekit.json does not say."""
        name = self.metadata.get("hook_point")
        if not isinstance(name, str):
            raise _corrupt(PROVENANCE, "a hook_point", str(name))
        return name

    @property
    def sha256(self) -> str | None:
        """SHA-256 of its weights file; none before it was saved."""
        return self.metadata.get("weights_sha256")

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights by name."""
        named = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return named if self.threshold is None else named | {"threshold": self.threshold}

    def save(self, path: str | Path) -> None:
        """Write the directory in one step; an SAE that is there already is replaced.

        Raises: MismatchError if `path` holds something else than an SAE.
        """
        path = Path(path)
        if path.exists() and not (path / CONFIG).is_file() and (not path.is_dir() or any(path.iterdir())):
            raise MismatchError(path, expected="an empty directory", got="other files", fix="Choose another path.")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            self._write(new)
            _replace(new, path)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    @classmethod
    def load(cls, path: str | Path) -> "SaeArtefact":
        """Read the directory.

        Raises: MissingArtefactError, CorruptArtefactError, ShapeError naming the tensor, MismatchError for SAELens
        options that change what the weights mean.
        """
        path = Path(path)
        config = _read_json(path / CONFIG)
        metadata = _read_json(path / PROVENANCE) if (path / PROVENANCE).exists() else {}
        architecture, k = _read_kind(path / CONFIG, config)
        tensors = _read_weights(path / WEIGHTS, config, architecture)
        expected = metadata.get("weights_sha256")
        if expected is not None and expected != file_sha256(path / WEIGHTS):
            raise _corrupt(path / WEIGHTS, f"SHA-256 {expected}", "another, so the file changed after it was saved")
        return cls(architecture=architecture, k=k, metadata=metadata, **tensors)

    def _write(self, directory: Path) -> None:
        tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in self.tensors().items()}
        save_file(tensors, directory / WEIGHTS)
        hashed = {**self.metadata, "weights_sha256": file_sha256(directory / WEIGHTS)}
        for name, content in ((CONFIG, _saelens_config(self)), (PROVENANCE, hashed)):
            (directory / name).write_text(json.dumps(content, indent=2) + "\n")
        directory.chmod(0o755)  # mkdtemp keeps others out


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _saelens_config(artefact: SaeArtefact) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architecture": artefact.architecture,
        "d_in": artefact.d_model,
        "d_sae": artefact.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # Without this version SAELens takes the file for one of its old layouts.
        "metadata": {"sae_lens_version": SAELENS_VERSION, **_saelens_names(artefact.metadata)},
    }
    if artefact.architecture == "topk":
        config |= {"k": artefact.k, "rescale_acts_by_decoder_norm": False}
    return config


def _saelens_names(metadata: dict[str, Any]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    if "model" in metadata:
        names["model_name"] = metadata["model"]["id"]
    if "hook_point" in metadata:
        site, layer = HookPoint.parse(metadata["hook_point"])
        names["hook_name"] = f"blocks.{layer}.{_TRANSFORMER_LENS_NAMES.get(site, f'hook_{site}')}"
    return names


def _replace(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        fix = "Check the path, or make one with: saekit train"
        raise MissingArtefactError(path, expected="an SAE directory with this file", got="nothing", fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "valid JSON", "something else") from error
    if not isinstance(content, dict):
        raise _corrupt(path, "a JSON object", type(content).__name__)
    return content


def _read_kind(path: Path, config: dict[str, Any]) -> tuple[SavedArchitecture, int | None]:
    architecture: Any = config.get("architecture")
    k = config.get("k")
    for key, allowed in _ONLY.items():
        if key in config and config[key] not in allowed:
            raise MismatchError(
                f"{path}: {key}",
                expected=repr(allowed[0]),
                got=repr(config[key]),
                fix="Save it in a form that saekit reads, see docs/formats.md.",
            )
    for key in ("d_in", "d_sae"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise _corrupt(f"{path}: {key}", "a positive whole number", repr(config.get(key)))
    _check_kind(str(path), architecture, k, config["d_sae"])
    return architecture, k


def _read_weights(path: Path, config: dict[str, Any], architecture: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise MissingArtefactError(path, expected="the weights", got="nothing", fix="Copy the whole directory.")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            _check_shapes(str(path), architecture, shapes, config["d_in"], config["d_sae"])
            for name, part in slices.items():
                if part.get_dtype() != "F32":
                    raise _corrupt(f"{path}: {name}", "dtype F32", part.get_dtype())
            tensors = {name: file.get_tensor(name) for name in slices}
    except (SafetensorError, OSError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise _corrupt(path, "an intact safetensors file", str(error).splitlines()[0]) from error
    for name, tensor in tensors.items():
        _check_values(str(path), name, tensor)
    return tensors


def _check_kind(where: str, architecture: object, k: object, d_sae: int) -> None:
    if architecture not in get_args(SavedArchitecture):
        raise MismatchError(
            f"{where}: architecture",
            expected="topk or jumprelu",
            got=repr(architecture),
            fix="Save it in a form that saekit reads, see docs/formats.md.",
        )
    if architecture == "topk" and not (isinstance(k, int) and 1 <= k <= d_sae):
        raise _corrupt(f"{where}: k", f"a whole number from 1 to d_sae={d_sae}", repr(k))


def _check_shapes(
    where: str, architecture: str, shapes: dict[str, tuple[int, ...]], d_model: int = 0, d_sae: int = 0
) -> None:
    """Compare with the given widths, or with those of W_enc where none are given."""
    if not d_model:
        d_model, d_sae = shapes["W_enc"] if len(shapes["W_enc"]) == 2 else (0, 0)
    expected = {"W_enc": (d_model, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_model), "b_dec": (d_model,)}
    if architecture == "jumprelu":
        expected["threshold"] = (d_sae,)
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ShapeError(
                f"{where}: tensor '{name}'",
                expected=f"shape {list(expected[name])}" if name in expected else "no such tensor",
                got=list(shapes[name]) if name in shapes else "no such tensor",
                fix="The file is not whole, or belongs to another cfg.json.",
            )


def _check_values(where: str, name: str, tensor: np.ndarray) -> None:
    bad = np.isnan(tensor) | (tensor == -np.inf) if name == "threshold" else ~np.isfinite(tensor)
    if bad.any():
        raise NumericsError(
            f"{where}: tensor '{name}'",
            expected="finite values",
            got=f"{int(bad.sum())} NaN or infinite",
            fix="Train again, or get an intact copy.",
        )


def _corrupt(where: str | Path, expected: str, got: str) -> CorruptArtefactError:
    return CorruptArtefactError(where, expected=expected, got=got, fix="Get an intact copy, or train again.")

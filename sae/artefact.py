"""A trained SAE on disk and in memory, in numpy alone.

The directory has the layout that SAELens 6 reads and writes, and one file more:

    cfg.json                   what SAELens needs to run the SAE
    sae_weights.safetensors    W_enc [d_model, d_sae], b_enc, W_dec [d_sae, d_out], b_dec, and threshold for jumprelu,
                               W_skip [d_out, d_model] for a skip transcoder
    saekit.json                where it came from: store, model, hook point, config, versions, metrics, weight hash

Saving: 1. write all files into a new directory beside the target; 2. rename it into place. Loading, which trusts
nothing: 1. parse the JSON; 2. compare shapes and dtypes from the safetensors header; 3. read, and check the hash and
that all values are finite. There is no pickle. SAELens's own names are in this module and in `sae.formats.saelens`.

Left out: arithmetic (`sae.torch_view`, `sae.architectures`), other projects' formats, and what SAELens can say beyond
this class (`sae.formats`).
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from activations.errors import CorruptArtefactError, MismatchError
from sae.checked_files import check_shapes, check_values, corrupt, read_json, read_safetensors, safetensors_heads
from sae.hook_names import to_transformer_lens
from sae.wiring import Wiring

SavedArchitecture = Literal["standard", "topk", "jumprelu"]
Dtype = Literal["float32", "float16"]
DTYPES: dict[Dtype, str] = {"float32": "F32", "float16": "F16"}
"""dtypes that weights are kept in -> their name in a safetensors file"""
SAELENS_VERSION = "6.54.12"
CONFIG, WEIGHTS, PROVENANCE = "cfg.json", "sae_weights.safetensors", "saekit.json"
# What a cfg.json must say, if it says anything, for its weights to mean what the class below says they mean.
_ONLY = {"normalize_activations": "none", "reshape_activations": "none", "rescale_acts_by_decoder_norm": False}


class Kind(NamedTuple):
    """What the one word `architecture` of a cfg.json says."""

    architecture: SavedArchitecture
    transcodes: bool = False
    skips: bool = False


KINDS: dict[str, Kind] = {
    "standard": Kind("standard"),
    "topk": Kind("topk"),
    "jumprelu": Kind("jumprelu"),
    "transcoder": Kind("standard", transcodes=True),
    "skip_transcoder": Kind("standard", transcodes=True, skips=True),
    "jumprelu_transcoder": Kind("jumprelu", transcodes=True),
    "jumprelu_skip_transcoder": Kind("jumprelu", transcodes=True, skips=True),
    "topk_transcoder": Kind("topk", transcodes=True),
    "topk_skip_transcoder": Kind("topk", transcodes=True, skips=True),
}
"""`architecture` of cfg.json -> what it is here. SAELens has no TopK transcoder: it refuses the last two names, whereas
`transcoder` would make it leave the k out and compute something else."""


@dataclass(frozen=True, eq=False)
class SaeArtefact:
    """A sparse autoencoder or transcoder that reads and writes raw activations.

    pre = x @ W_enc + b_enc, with x - b_dec in place of x if apply_b_dec_to_input; latents = relu(pre) for standard, the
    k largest of it for topk, what of it has pre > threshold for jumprelu; x_hat = latents @ W_dec + b_dec, and
    x @ W_skip.T more if there is a W_skip. A gated SAE is a jumprelu (`sae.formats.folds.gated`); a crosscoder is one
    whose widths are those of all its hook points together. Decoder rows of SAEs trained here have norm 1, so that a
    latent is the length of its part of x. Raises: ShapeError naming the tensor, NumericsError for values that are not
    finite, CorruptArtefactError for flags that contradict each other.
    """

    architecture: SavedArchitecture
    """which rule picks the active latents"""
    W_enc: Float[np.ndarray, "d_model d_sae"]
    """encoder, a column a latent"""
    b_enc: Float[np.ndarray, " d_sae"]
    """added to pre-activations"""
    W_dec: Float[np.ndarray, "d_sae d_out"]
    """decoder, a row a latent"""
    b_dec: Float[np.ndarray, " d_out"]
    """added after the decoder"""
    threshold: Float[np.ndarray, " d_sae"] | None = None
    """jumprelu: a latent is active strictly above it; +inf switches the latent off"""
    k: int | None = None
    """topk: active latents a token"""
    W_skip: Float[np.ndarray, "d_out d_model"] | None = None
    """skip transcoder: what the input itself adds to the output"""
    apply_b_dec_to_input: bool = True
    """whether b_dec is subtracted before the encoder; a transcoder, whose b_dec belongs to its output, never does"""
    transcodes: bool = False
    """whether it writes another hook point than it reads; otherwise d_out is d_model"""
    metadata: dict[str, Any] = field(default_factory=dict)
    """the content of saekit.json"""

    def __post_init__(self) -> None:
        """Check kind, shapes and values."""
        where = "SaeArtefact"
        _check_rule(where, self.architecture, self.k, self.d_sae)
        if self.transcodes and self.apply_b_dec_to_input:
            raise corrupt(f"{where}: apply_b_dec_to_input", "False for a transcoder", "True")
        shapes = {name: tensor.shape for name, tensor in self.tensors().items()}
        kind = Kind(self.architecture, self.transcodes, self.transcodes and self.W_skip is not None)
        check_shapes(where, shapes, expected_shapes(kind, self.d_model, self.d_sae, self.d_out))
        for name, tensor in self.tensors().items():
            check_values(where, name, tensor)

    @property
    def d_model(self) -> int:
        """Width of what it reads."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what it writes; d_model unless it transcodes."""
        return self.W_dec.shape[-1] if self.transcodes else self.d_model

    @property
    def saved_name(self) -> str:
        """`architecture` of its cfg.json."""
        kind = Kind(self.architecture, self.transcodes, self.W_skip is not None)
        return next(name for name, known in KINDS.items() if known == kind)

    @property
    def hook_point(self) -> str:
        """What it reads and writes, in the form of `sae.wiring`.

        Raises: CorruptArtefactError if saekit.json does not say.
        """
        name = self.metadata.get("hook_point")
        if not isinstance(name, str):
            fix = "Convert it with: saekit convert SOURCE TARGET --to saekit --hook-point resid_post.12"
            raise CorruptArtefactError(PROVENANCE, expected="a hook_point", got=name, fix=fix)
        return name

    @property
    def sha256(self) -> str | None:
        """SHA-256 of its weights file; none before it was saved."""
        return self.metadata.get("weights_sha256")

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights by name."""
        named = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        optional = {"threshold": self.threshold, "W_skip": self.W_skip}
        return named | {name: tensor for name, tensor in optional.items() if tensor is not None}

    def save(self, path: str | Path, dtype: Dtype = "float32") -> None:
        """Write the directory in one step; an SAE that is there already is replaced.

        Args:
          dtype: that the weights are kept in; float16 halves the file, and rounds them to 11 bits.
        Raises: MismatchError if `path` holds something else than an SAE, NumericsError for weights beyond float16.
        """
        path = Path(path)
        if path.exists() and not (path / CONFIG).is_file() and (not path.is_dir() or any(path.iterdir())):
            raise MismatchError(path, expected="an empty directory", got="other files", fix="Choose another path.")
        with written_in_one_step(path) as new:
            write_weights_and_config(self, new, dtype)
            hashed = {**self.metadata, "weights_sha256": file_sha256(new / WEIGHTS)}
            write_json(new / PROVENANCE, hashed)

    @classmethod
    def load(cls, path: str | Path) -> "SaeArtefact":
        """Read a directory that saekit wrote, or one of SAELens that is no different.

        Raises: MissingArtefactError, CorruptArtefactError, ShapeError naming the tensor, MismatchError for what only
        `sae.formats` reads: other architectures, dtypes, and options that change what the weights mean.
        """
        path = Path(path)
        config, metadata = read_json(path / CONFIG), read_provenance(path)
        kind, k, is_centred = _read_kind(path / CONFIG, config)
        heads = safetensors_heads(path / WEIGHTS)
        d_model, d_sae = config["d_in"], config["d_sae"]
        expected = expected_shapes(kind, d_model, d_sae, config["d_out"] if kind.transcodes else d_model)
        check_shapes(str(path / WEIGHTS), {name: head.shape for name, head in heads.items()}, expected)
        for name, head in heads.items():
            if head.dtype not in DTYPES.values():
                raise _unlike_ours(f"{path / WEIGHTS}: {name}", f"dtype {' or '.join(DTYPES.values())}", head.dtype)
        tensors = read_safetensors(path / WEIGHTS)
        digest = metadata.get("weights_sha256")
        if digest is not None and digest != file_sha256(path / WEIGHTS):
            raise corrupt(path / WEIGHTS, f"SHA-256 {digest}", "another, so the file changed after it was saved")
        return cls(
            architecture=kind.architecture,
            k=k,
            apply_b_dec_to_input=is_centred,
            transcodes=kind.transcodes,
            metadata=metadata,
            **tensors,
        )


def expected_shapes(kind: Kind, d_model: int, d_sae: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that an SAE of this kind has."""
    shapes = {"W_enc": (d_model, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    optional = {"threshold": ((d_sae,), kind.architecture == "jumprelu"), "W_skip": ((d_out, d_model), kind.skips)}
    return shapes | {name: shape for name, (shape, is_there) in optional.items() if is_there}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_in_one_step(path: Path) -> Iterator[Path]:
    """A new directory to fill, which then takes the place of `path`; after an error everything is as before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield new
        new.chmod(0o755)  # mkdtemp keeps others out
        _replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_weights_and_config(artefact: SaeArtefact, directory: Path, dtype: Dtype = "float32") -> None:
    """The two files that SAELens reads; it computes in float32 in either case."""
    with np.errstate(over="ignore"):
        tensors = {name: np.ascontiguousarray(tensor, dtype) for name, tensor in artefact.tensors().items()}
    for name, tensor in tensors.items():
        check_values(f"{directory.name} in {dtype}", name, tensor)
    save_file(tensors, directory / WEIGHTS)
    config: dict[str, Any] = {
        "architecture": artefact.saved_name,
        "d_in": artefact.d_model,
        "d_sae": artefact.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": artefact.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # Without this version SAELens takes the file for one of its old layouts.
        "metadata": {"sae_lens_version": SAELENS_VERSION, **_saelens_names(artefact.metadata)},
    }
    if artefact.architecture == "topk":
        config |= {"k": artefact.k, "rescale_acts_by_decoder_norm": False}
    if artefact.transcodes:
        config["d_out"] = artefact.d_out
    write_json(directory / CONFIG, config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, for people too."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_provenance(directory: Path) -> dict[str, Any]:
    """The content of saekit.json, or nothing if there is none. Raises: CorruptArtefactError."""
    path = directory / PROVENANCE
    metadata = read_json(path) if path.exists() else {}
    types = {"hook_point": str} | dict.fromkeys(("model", "store", "config", "metrics", "source"), dict)
    for key, expected in types.items():
        if not isinstance(metadata.get(key, expected()), expected):
            raise corrupt(f"{path}: {key}", f"a value of type {expected.__name__}", type(metadata[key]).__name__)
    return metadata


def _saelens_names(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What SAELens calls the model and the hook points; several are joined by a plus."""
    names: dict[str, str] = {}
    model = metadata.get("model", {}).get("id", metadata.get("source", {}).get("model_name"))
    if isinstance(model, str):
        names["model_name"] = model
    if "hook_point" in metadata:
        wiring = Wiring.parse(metadata["hook_point"])
        names["hook_name"] = "+".join(map(to_transformer_lens, wiring.reads))
        if wiring.transcodes:
            names["hook_name_out"] = "+".join(map(to_transformer_lens, wiring.writes))
    return names


def _replace(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old)


def _read_kind(path: Path, config: Mapping[str, Any]) -> tuple[Kind, int | None, bool]:
    """Kind, k, and whether b_dec is subtracted from the input."""
    for key, ours in _ONLY.items():
        if config.get(key, ours) != ours:
            raise _unlike_ours(f"{path}: {key}", repr(ours), repr(config[key]))
    name = config.get("architecture")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise _unlike_ours(f"{path}: architecture", f"one of {', '.join(KINDS)}", repr(name))
    for key in ("d_in", "d_sae", *(("d_out",) if kind.transcodes else ())):
        if type(config.get(key)) is not int or config[key] < 1:
            raise corrupt(f"{path}: {key}", "a positive whole number", repr(config.get(key)))
    is_centred = config.get("apply_b_dec_to_input", not kind.transcodes)
    if type(is_centred) is not bool or (kind.transcodes and is_centred):
        allowed = "false for a transcoder" if kind.transcodes else "true or false"
        raise corrupt(f"{path}: apply_b_dec_to_input", allowed, repr(is_centred))
    k = config.get("k") if kind.architecture == "topk" else None
    _check_rule(str(path), kind.architecture, k, config["d_sae"])
    return kind, k, is_centred


def _check_rule(where: str, architecture: object, k: object, d_sae: int) -> None:
    if architecture not in get_args(SavedArchitecture):
        raise _unlike_ours(f"{where}: architecture", " or ".join(get_args(SavedArchitecture)), repr(architecture))
    if architecture == "topk" and not (type(k) is int and 1 <= k <= d_sae):
        raise corrupt(f"{where}: k", f"a whole number from 1 to d_sae={d_sae}", repr(k))


def _unlike_ours(where: str, expected: str, got: str) -> MismatchError:
    return MismatchError(where, expected=expected, got=got, fix="Convert it with: saekit convert SOURCE TARGET")

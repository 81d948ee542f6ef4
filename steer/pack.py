"""What a library says of itself besides its vectors: a name, labelled features, the SAE they are of, and kits.

All of it is JSON in the manifest, read strictly: unknown keys, other types and sizes beyond those below are errors.
Left out: files and hashes (`steer.library`), and where features come from (`steer.making.features`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""of a library: what a directory, a file and a repository may be called everywhere"""
VERSION = r"^(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})$"
"""MAJOR.MINOR.PATCH"""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=4000)]
Logit = Annotated[tuple[str, Finite], Field(strict=False)]  # JSON has lists for tuples
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """A part of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class About(Part):
    """What a library is called, and by whom it was made; without a name it is a folder that somebody works in."""

    name: Annotated[str, Field(pattern=NAME)] | None = None
    version: Annotated[str, Field(pattern=VERSION)] | None = None
    summary: Text = ""
    licence: Annotated[str, Field(max_length=200)] | None = None
    """SPDX expression"""
    authors: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=100)] = []


class SaeRef(Part):
    """The SAE that features are latents of."""

    sha256: Sha256
    """of its weights and what decides what they mean, `SaeArtefact.sha256`"""
    architecture: str
    d_model: int = Field(gt=0)
    d_sae: int = Field(gt=0)
    hook_point: str
    model_id: str
    model_fingerprint: str
    n_layers: int | None = Field(default=None, gt=0)
    """blocks of the model, once an index told of it"""
    fvu: Finite | None = None
    """on text that it was not trained on"""
    l0: Finite | None = None
    dtype: Literal["float16", "float32"] | None = None
    """of the copy in `sae/`; none: it is not in the library"""


class Label(Part):
    """What somebody said of a latent, or did with a label; never changed, only answered by a later one."""

    text: Text
    author: Annotated[str, Field(max_length=200)]
    created: str
    """ISO 8601"""
    kind: str
    """explanation, tokens, logits, or what a person did: accept, reject, edit"""


class Example(Part):
    """A text on which a latent is active."""

    tokens: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=256)]
    activations: Annotated[list[Finite], Field(max_length=256)]
    """one a token, in units of the residual stream"""

    @model_validator(mode="after")
    def _check_lengths(self) -> "Example":
        if not self.tokens or len(self.tokens) != len(self.activations):
            raise ValueError("as many activations as tokens, and one at least")
        return self


class Feature(Part):
    """A latent that somebody interpreted."""

    latent: int = Field(ge=0)
    label: Text
    author: Annotated[str, Field(max_length=200)]
    density: Finite
    """share of tokens on which it is active"""
    max_activation: Finite
    mean_activation: Finite = 0.0
    """over the tokens on which it is active"""
    histogram: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=4096)] = []
    """active tokens by activation, in the bins of `sae.histogram` from `histogram_start` on"""
    histogram_start: int = 0
    logit_entropy: Finite | None = None
    output_score: Finite | None = None
    confidence_change: Finite | None = None
    stability: Finite | None = None
    """as `sae.index_db.LatentRow` has them"""
    history: list[Label] = []
    """oldest first"""
    top_logits: list[Logit] = []
    """tokens that its decoder row raises most, with the rise per unit of activation"""
    bottom_logits: list[Logit] = []
    examples: list[Example] = []
    """strongest first"""
    scores: dict[str, Finite] = {}
    """how well the label does, by method; chance and controls have rows of their own"""
    vector: str | None = None
    """the vector of this library that was made of it"""


FIGURES = (
    "latent", "density", "max_activation", "mean_activation", "histogram", "histogram_start", "logit_entropy",
    "output_score", "confidence_change", "stability", "top_logits", "bottom_logits",
)  # fmt: skip
"""what a feature has as the row of its latent in an index (`sae.index_db.LatentRow`) has it"""


class Kit(Part):
    """Vectors that are used together, each at a coefficient of its own."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    summary: Text = ""
    vectors: dict[str, Finite] = Field(min_length=1)
    """name of a vector or of a group NAME@... -> factor of its own coefficient; 1 is as it is kept"""
    receipts: list[dict[str, JsonValue]] = []
    """measured effects of all together, newest last"""


class FileRef(Part):
    """A file of a library."""

    bytes: int = Field(ge=0)
    sha256: Sha256


def as_json(part: Part) -> dict[str, Any]:
    """As the manifest has it."""
    return part.model_dump(mode="json")

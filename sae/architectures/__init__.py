"""Kinds of sparse autoencoder: one row of ARCHITECTURES each, and one file for each kind or pair of close relatives.

To add one, write a class that inherits from `selecting.Selecting` or `penalised.Penalised` and says only which latents
are active, and add its row; the conformance suite then runs over it.
"""

from typing import Any, Protocol

from jaxtyping import Array, Float, Key

from activations.errors import ConfigError, UnknownNameError
from sae.architectures.base import Context, Means, Output, Scaling, SparseCoder
from sae.architectures.batchtopk import BatchTopK
from sae.architectures.crosscoder import Crosscoder
from sae.architectures.gated import Gated
from sae.architectures.jumprelu import JumpReLU, TanhJumpReLU
from sae.architectures.matryoshka import Matryoshka
from sae.architectures.standard import Standard
from sae.architectures.topk import TopK
from sae.architectures.transcoder import SkipTranscoder, Transcoder
from sae.artefact import SaeArtefact
from sae.config import SaeConfig
from sae.wiring import Wiring


class Architecture(Protocol):
    """What the trainer asks of an SAE, which is also a `flax.nnx.Module`."""

    def __init__(self, config: SaeConfig, means: Means, key: Key[Array, ""]) -> None:
        """Initial weights."""

    def loss(self, x: Float[Array, "batch d_in"], y: Float[Array, "batch d_out"], context: Context) -> Output:
        """Losses of a training batch."""
        ...

    def observe(self, output: Output, context: Context) -> None:
        """Update running statistics after a step."""

    def to_artefact(self, scaling: Scaling, metadata: dict[str, Any]) -> SaeArtefact:
        """The saved form, for raw activations."""
        ...

    def adopt(self, artefact: SaeArtefact, scaling: Scaling) -> None:
        """Start from a saved SAE."""


ARCHITECTURES: dict[str, type[SparseCoder]] = {
    "standard": Standard,
    "gated": Gated,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "jumprelu_tanh": TanhJumpReLU,
    "matryoshka": Matryoshka,
    "transcoder": Transcoder,
    "skip_transcoder": SkipTranscoder,
    "crosscoder": Crosscoder,
}

_READS = {
    "one": ("one hook point, such as resid_post.12", lambda w: len(w.reads) == 1 and not w.transcodes),
    "pair": (
        "two hook points with an arrow, such as resid_mid.12->mlp_out.12",
        lambda w: w.transcodes and len(w.reads) == len(w.writes) == 1,
    ),
    "several": (
        "several hook points, such as resid_post.10+resid_post.12",
        lambda w: len(w.reads) > 1 and not w.transcodes,
    ),
}


def find(name: str) -> type[SparseCoder]:
    """The architecture called `name`; raises UnknownNameError."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnknownNameError("sae.architecture", expected=f"one of {known}", got=f"'{name}'", fix="Choose one.")
    return ARCHITECTURES[name]


def check_wiring(name: str, wiring: Wiring) -> None:
    """Raise ConfigError unless the architecture called `name` reads and writes so many hook points."""
    expected, fits = _READS[find(name).reads]
    if not fits(wiring):
        raise ConfigError(
            "hook_points", expected=f"{expected}, for {name}", got=str(wiring), fix="Change it, or sae.architecture."
        )

"""Kinds of sparse autoencoder: one file and one row of ARCHITECTURES each.

To add one, write a class with the methods of `Architecture` (most inherit from `base.SparseCoder` and say only which
latents stay active) and add its row; the conformance suite then runs over it.
"""

from typing import Any, Protocol

from jaxtyping import Array, Float, Int, Key

from activations.errors import UnknownNameError
from sae.architectures.base import Output, SparseCoder
from sae.architectures.batchtopk import BatchTopK
from sae.architectures.topk import TopK
from sae.artefact import SaeArtefact
from sae.config import SaeConfig
from sae.kernels import Codes


class Architecture(Protocol):
    """What the trainer asks of an SAE, which is also a `flax.nnx.Module`."""

    def __init__(self, config: SaeConfig, mean: Float[Array, " d_model"], key: Key[Array, ""]) -> None:
        """Initial weights, with b_dec at `mean`."""

    def loss(
        self, x: Float[Array, "batch d_model"], variance: float, idle: Int[Array, " d_sae"], dead_after: int
    ) -> Output:
        """Losses and codes of a training batch."""
        ...

    def observe(self, codes: Codes) -> None:
        """Update running statistics after a step."""

    def encode(self, x: Float[Array, "batch d_model"]) -> Float[Array, "batch d_sae"]:
        """Latents at inference."""
        ...

    def decode(self, latents: Float[Array, "batch d_sae"]) -> Float[Array, "batch d_model"]:
        """Activations from latents."""
        ...

    def to_artefact(self, scale: float, metadata: dict[str, Any]) -> SaeArtefact:
        """The saved form, for raw activations."""
        ...

    @classmethod
    def from_artefact(cls, artefact: SaeArtefact) -> "Architecture":
        """The same SAE from its saved form."""
        ...


ARCHITECTURES: dict[str, type[SparseCoder]] = {"topk": TopK, "batchtopk": BatchTopK}


def find(name: str) -> type[SparseCoder]:
    """The architecture called `name`; raises UnknownNameError."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnknownNameError("sae.architecture", expected=f"one of {known}", got=f"'{name}'", fix="Choose one.")
    return ARCHITECTURES[name]

"""Steering vectors: a unit direction at a hook point, and where it came from.

    h' = h + coefficient * direction            coefficient > 0 adds, 0 changes nothing at all
    dose = |coefficient| * ||direction|| / mean ||h||

The dose makes coefficients comparable between layers and models: the mean norm is taken at the hook point, over tokens
that are neither the first of a text nor padding. A direction comes from a latent, as the decoder row of an SAE at the
hook point that the SAE writes, or from contrast pairs (`steer.contrast`).

Left out: applying them (`steer.runtime`), measuring them (`steer.effect`), keeping them (`steer.library`).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import MismatchError, UnknownNameError
from activations.hook_points import HookPoint
from activations.store_schema import ModelRef
from sae.artefact import SaeArtefact
from sae.wiring import Wiring


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A unit direction at one hook point of one model."""

    name: str
    """how a person refers to it"""
    direction: Float[np.ndarray, " d_model"]
    """unit norm, float32"""
    hook_point: str
    """where it is added"""
    model: ModelRef
    """the model it was made from"""
    mean_norm: float
    """mean ||h|| at the hook point; turns a coefficient into a dose"""
    source: dict[str, Any]
    """kind `latent` or `contrast`, and what it was made from"""
    coefficient: float = 0.0
    """suggested coefficient; 0 until one was measured"""
    receipts: list[dict[str, Any]] = field(default_factory=list)
    """measured effects, newest last"""
    operation: str = "add"
    """what it is used for: a key of `steer.operations.VECTOR_OPERATIONS`"""
    scope: str = "all"
    """on which tokens, in the words of `steer.scopes`"""
    window: tuple[float, float] | None = None
    """coefficients between which it was found to work and to do no harm (`steer.calibrate`); none: not calibrated"""

    def dose(self, coefficient: float) -> float:
        """|coefficient| in units of the mean norm of the residual stream."""
        return abs(coefficient) / self.mean_norm

    def coefficient_of(self, dose: float) -> float:
        """The positive coefficient of a dose."""
        return dose * self.mean_norm


class Places(NamedTuple):
    """The two hook points of an SAE, which differ if it transcodes."""

    reads: HookPoint
    """where its latents are read"""
    writes: HookPoint
    """where its decoder rows belong"""


def places_of(artefact: SaeArtefact) -> Places:
    """Where an SAE is read and steered with. Raises: MismatchError if it reads or writes several hook points."""
    wiring = Wiring.parse(artefact.hook_point)
    for verb, names in (("reads", wiring.reads), ("writes", wiring.writes)):
        if len(names) > 1:
            raise MismatchError(
                f"SAE of {wiring}",
                expected="one hook point that it reads and one that it writes, to steer at",
                got=f"one that {verb} {len(names)}",
                fix="Choose an autoencoder or a transcoder.",
            )
    return Places(HookPoint.parse(wiring.reads[0]), HookPoint.parse(wiring.writes[0]))


class EncoderRow(NamedTuple):
    """How one latent is read: z = s where s = weight·x + bias is above the threshold, else 0."""

    weight: Float[Tensor, " d_model"]
    bias: float
    threshold: float
    """at least 0; a TopK SAE asks besides that s be one of the k largest"""


def encoder_row(artefact: SaeArtefact, latent: int) -> EncoderRow:
    """The encoder of a latent, b_dec folded into its bias. Raises: UnknownNameError if there is no such latent."""
    _check_latent(artefact, latent)
    weight = torch.tensor(artefact.W_enc[:, latent])
    bias = float(artefact.b_enc[latent])
    if artefact.apply_b_dec_to_input:
        bias -= float(torch.tensor(artefact.b_dec).double() @ weight.double())
    threshold = 0.0 if artefact.threshold is None else max(0.0, float(artefact.threshold[latent]))
    return EncoderRow(weight, bias, threshold)


def _check_latent(artefact: SaeArtefact, latent: int) -> None:
    if not 0 <= latent < artefact.d_sae:
        raise UnknownNameError(
            f"latent {latent}", expected=f"0 to {artefact.d_sae - 1}", got=latent, fix="Choose a latent of this SAE."
        )


def from_latent(artefact: SaeArtefact, latent: int, model: ModelRef, mean_norm: float) -> SteeringVector:
    """The decoder row of one latent, at the hook point that the SAE writes.

    Raises: UnknownNameError if the SAE has no such latent, MismatchError if it has several hook points.
    """
    _check_latent(artefact, latent)
    row = artefact.W_dec[latent].astype(np.float32)
    source = {"kind": "latent", "latent": latent, "sae_sha256": artefact.sha256}
    direction, hook_point = row / np.linalg.norm(row), str(places_of(artefact).writes)
    return SteeringVector(f"latent-{latent}", direction, hook_point, model, mean_norm, source)

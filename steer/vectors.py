"""Steering vectors: a unit direction at a hook point, and where it came from.

    h' = h + coefficient * direction            coefficient > 0 adds, 0 changes nothing at all
    dose = |coefficient| * ||direction|| / mean ||h||

The dose makes coefficients comparable between layers and models: the mean norm is taken at the hook point, over tokens
that are neither the first of a text nor padding. A direction comes from a latent, as the decoder row of an SAE at the
hook point that the SAE writes, as a sum of several, from contrast pairs (`steer.making.contrast`), from an instruction
(`steer.making.modifier`), or from other vectors (`steer.making.arithmetic`).

Left out: applying them (`steer.runtime`), measuring them (`steer.measures.effect`), keeping them (`steer.library`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from activations.errors import NumericsError
from activations.store_schema import ModelRef
from sae.artefact import SaeArtefact
from steer.gates import Condition, Gate, energy
from steer.latents import check_latent, places_of

NAMED = 3
"""latents of a sum that are in its name"""


@dataclass(frozen=True, eq=False)
class Reader:
    """Where a vector's concept shows, if not along the vector itself: beyond a midpoint of a direction of its own."""

    direction: Float[np.ndarray, " d_model"]
    """unit norm, float32"""
    hook_point: str
    """where the unsteered model is read"""
    midpoint: float
    """projection from which on the concept shows"""


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
    """kind, a key of `steer.making.make.KINDS` or `combination`, and what it was made from"""
    coefficient: float = 0.0
    """suggested coefficient; 0 until one was measured"""
    receipts: list[dict[str, Any]] = field(default_factory=list)
    """measured effects, newest last"""
    operation: str = "add"
    """what it is used for: a key of `steer.operations.VECTOR_OPERATIONS`"""
    scope: str = "all"
    """on which tokens, in the words of `steer.scopes`"""
    gate: Condition | None = None
    """only while it is open; none: always"""
    window: tuple[float, float] | None = None
    """coefficients between which it works and does no harm (`steer.receipts.calibrate`); none: not calibrated"""
    reader: Reader | None = None
    """what its concept is read with; none: its own direction or latents, as `source` tells"""

    @property
    def reads(self) -> Reader | None:
        """`reader`, or else its own direction beyond the midpoint that its source keeps; none if it keeps none."""
        if self.reader is None and "midpoint" in self.source:
            return Reader(self.direction, self.hook_point, self.source["midpoint"])
        return self.reader

    def random(self, rng: np.random.Generator) -> "SteeringVector":
        """The same with a random unit direction."""
        drawn = rng.standard_normal(len(self.direction)).astype(np.float32)
        return replace(self, direction=drawn / np.linalg.norm(drawn))

    def dose(self, coefficient: float) -> float:
        """|coefficient| in units of the mean norm of the residual stream."""
        return abs(coefficient) / self.mean_norm

    def coefficient_of(self, dose: float) -> float:
        """The positive coefficient of a dose."""
        return dose * self.mean_norm

    def energy_gate(self, on: float, off: float | None = None, min_tokens: int = 1) -> Gate:
        """Open while the energy of its own direction is above `on`, as `steer.gates.Gate` has it."""
        readout = energy(torch.from_numpy(self.direction), self.hook_point)
        return Gate(readout, on, off, min_tokens, self.name, self.model.fingerprint)

    @property
    def sha256(self) -> str:
        """Of what it writes and where: direction, hook point and model; a name or a receipt does not change it."""
        place = f"{self.hook_point} {self.model.fingerprint}".encode()
        return hashlib.sha256(np.ascontiguousarray(self.direction, "<f4").tobytes() + place).hexdigest()


def from_latent(artefact: SaeArtefact, latent: int, model: ModelRef, mean_norm: float) -> SteeringVector:
    """The decoder row of one latent, at the hook point that the SAE writes.

    Raises: UnknownNameError if the SAE has no such latent, MismatchError if it has several hook points.
    """
    vector = from_latents(artefact, {latent: 1.0}, model, mean_norm)
    source = {"kind": "latent", "latent": latent, "sae_sha256": artefact.sha256}
    return replace(vector, name=f"latent-{latent}", source=source)


def from_latents(
    artefact: SaeArtefact, weights: Mapping[int, float], model: ModelRef, mean_norm: float
) -> SteeringVector:
    """The direction of Σ weight * decoder row, at the hook point that the SAE writes.

    Weights are in units of activation: with those that latents have on a token, the sum is their part in what the SAE
    makes of it.

    Raises: as `from_latent`, and NumericsError if the sum has no direction.
    """
    for latent in weights:
        check_latent(artefact, latent)
    rows = artefact.W_dec[list(weights)].astype(np.float64)
    total = np.array([*weights.values()], np.float64) @ rows
    length = float(np.linalg.norm(total))
    if not length > 1e-6 * max(float(np.linalg.norm(rows, axis=1).max()), 1e-12) or not np.isfinite(length):
        fix = "Choose other weights."
        raise NumericsError("sum of latents", expected="a direction", got=f"a length of {length:g}", fix=fix)
    source = {
        "kind": "latents",
        "latents": {str(latent): weight for latent, weight in weights.items()},
        "sae_sha256": artefact.sha256,
    }
    name = "-".join(["latents", *map(str, list(weights)[:NAMED])]) + ("-etc" if len(weights) > NAMED else "")
    direction, hook_point = (total / length).astype(np.float32), str(places_of(artefact).writes)
    return SteeringVector(name, direction, hook_point, model, mean_norm, source)

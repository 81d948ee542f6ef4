"""What steering does to a token, as rows of one table.

Every operation is one or several `Slot`s, and every slot is the same formula, per token h of a hook point:

    s  = w·h + c                                what it reads, in float32
    z  = s where s > threshold, else 0          threshold -inf for a projection; of a TopK SAE, its k-th largest s
    δ  = a + strength * (clip(gain * z, low, high) - z)
    h' = h + Σ δ u                              over all slots that act on the token

| operation | a | strength | w, c, threshold | gain, low, high | u |
|---|---|---|---|---|---|
| Add, Rotate | coefficient | 0 | | | direction |
| Ablate | 0 | strength | u | 1, 0, 0 | each of an orthonormal basis |
| Clamp | 0 | strength | u | 1, low, high | unit direction |
| ClampLatents | 0 | strength | encoder column, bias, threshold | 1, target, target | decoder row |
| ScaleLatents | 0 | 1 | the same | gain, -inf, inf | decoder row |

All slots read the same h and what they write is summed, so the order of operations at one hook point does not matter.
A latent is clamped with the SAE's error left as it is: h' - h = decode(z') - decode(z) = Σ (z' - z) W_dec, where z' are
the latents with the clamped ones replaced. Rotate adds and then gives h its length back, which turns it towards the
direction in the plane of both.

Left out: applying slots (`steer.runtime`); crosscoders, which read and write several hook points at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import ConfigError, MismatchError, NumericsError, ShapeError, UnknownNameError
from activations.hook_points import HookPoint
from sae.artefact import SaeArtefact
from steer.gates import Condition
from steer.latents import encoder_row, places_of
from steer.scopes import EVERYWHERE, Scope
from steer.vectors import SteeringVector

INF = math.inf


@dataclass(frozen=True, eq=False)
class Slot:
    """One row of a table: see the formula above."""

    writes: Float[Tensor, " d_out"]
    """u"""
    constant: float = 0.0
    """a"""
    reads: Float[Tensor, " d_model"] | None = None
    """w; none: nothing is read, and strength is 0"""
    bias: float = 0.0
    """c"""
    threshold: float = -INF
    gain: float = 1.0
    low: float = -INF
    high: float = INF
    strength: float = 0.0
    latent: int = 0
    """which latent is read, for an SAE whose threshold depends on the token"""

    @property
    def acts(self) -> bool:
        """Whether it can change anything."""
        return self.constant != 0 or self.strength != 0


@runtime_checkable
class Operation(Protocol):
    """What a row of `docs/extending.md` has to be."""

    def slots(self) -> list[Slot]:
        """Its rows. Raises: NumericsError or ShapeError for vectors that are not finite or not of one dimension."""
        ...

    def scaled(self, factor: float) -> "Operation":
        """The same at so many times its coefficient or strength."""
        ...

    @property
    def reach(self) -> float:
        """The largest length it asks the residual stream to have along what it writes; 0 if it only takes away."""
        ...

    @property
    def keeps_norm(self) -> bool:
        """Whether h gets its length back."""
        ...

    @property
    def sae(self) -> SaeArtefact | None:
        """The SAE whose latents it reads, if it does."""
        ...


@dataclass(frozen=True, eq=False)
class Add:
    """h + coefficient * direction."""

    direction: Float[Tensor, " d_model"]
    coefficient: float = 1.0
    keeps_norm = False
    sae = None

    def slots(self) -> list[Slot]:
        return [Slot(_checked("direction", self.direction), self.coefficient)]

    def scaled(self, factor: float) -> "Add":
        return replace(self, coefficient=factor * self.coefficient)

    @property
    def reach(self) -> float:
        return abs(self.coefficient) * float(self.direction.norm())


@dataclass(frozen=True, eq=False)
class Rotate(Add):
    """‖h‖ (h + coefficient * direction) / ‖h + coefficient * direction‖.

    Where several operations act on one token at one hook point and one of them is a Rotate, the length is that from
    before all of them.
    """

    keeps_norm = True


@dataclass(frozen=True, eq=False)
class Ablate:
    """h without what it has along one or several directions, or with only a part of that taken away.

    Several directions are made orthonormal first, so that strength 1 leaves nothing in the space that they span.
    """

    directions: Float[Tensor, " d_model"] | Float[Tensor, "n d_model"]
    strength: float = 1.0
    """share that is taken away; a negative one amplifies"""
    keeps_norm = False
    sae = None
    reach = 0.0

    def slots(self) -> list[Slot]:
        rows = torch.atleast_2d(torch.as_tensor(self.directions))
        basis, sizes = torch.linalg.qr(torch.stack([_unit(row) for row in rows]).double().T)
        if float(sizes.diagonal().abs().min()) < 1e-6:
            raise NumericsError(
                "ablated directions",
                expected="directions none of which is a combination of the others",
                got="some that are",
                fix="Leave one out.",
            )
        return [Slot(u, reads=u, low=0.0, high=0.0, strength=self.strength) for u in basis.T.float()]

    def scaled(self, factor: float) -> "Ablate":
        return replace(self, strength=factor * self.strength)


@dataclass(frozen=True, eq=False)
class Clamp:
    """h with its projection on a direction moved into [low, high]; both equal: moved to that value."""

    direction: Float[Tensor, " d_model"]
    low: float = -INF
    high: float = INF
    strength: float = 1.0
    """share of the way that it is moved"""
    keeps_norm = False
    sae = None

    def slots(self) -> list[Slot]:
        _check_range("clamp", self.low, self.high)
        u = _unit(self.direction)
        return [Slot(u, reads=u, low=self.low, high=self.high, strength=self.strength)]

    def scaled(self, factor: float) -> "Clamp":
        return replace(self, strength=factor * self.strength)

    @property
    def reach(self) -> float:
        # What is asked of it, not the bound that it starts from: a floor of -5 pulls nothing to 5.
        return max(0.0, self.low if math.isfinite(self.low) else 0.0, -self.high if math.isfinite(self.high) else 0.0)


@dataclass(frozen=True, eq=False)
class ClampLatents:
    """Latents of an SAE set to targets, active or not, with all that the SAE does not explain left as it is."""

    sae: SaeArtefact
    targets: Mapping[int, float]
    """latent -> activation"""
    strength: float = 1.0
    """share of the way that they are moved"""
    keeps_norm = False

    def slots(self) -> list[Slot]:
        return [
            replace(_latent_slot(self.sae, latent), low=target, high=target, strength=self.strength)
            for latent, target in self.targets.items()
        ]

    def scaled(self, factor: float) -> "ClampLatents":
        return replace(self, strength=factor * self.strength)

    @property
    def reach(self) -> float:
        rows = torch.tensor(self.sae.W_dec[list(self.targets)]).double()
        return float((torch.tensor(list(self.targets.values())).double() @ rows).norm())


@dataclass(frozen=True, eq=False)
class ScaleLatents:
    """Latents of an SAE times factors, where they are active; 0 switches them off."""

    sae: SaeArtefact
    factors: Mapping[int, float]
    """latent -> factor"""
    keeps_norm = False
    reach = 0.0

    def slots(self) -> list[Slot]:
        return [
            replace(_latent_slot(self.sae, latent), gain=factor, strength=float(factor != 1))
            for latent, factor in self.factors.items()
        ]

    def scaled(self, factor: float) -> "ScaleLatents":
        """Factors that are so many times as far from 1."""
        return replace(self, factors={latent: 1 + factor * (by - 1) for latent, by in self.factors.items()})


def _latent_slot(sae: SaeArtefact, latent: int) -> Slot:
    row = encoder_row(sae, latent)
    writes = torch.tensor(sae.W_dec[latent])
    return Slot(writes, reads=row.weight, bias=row.bias, threshold=row.threshold, latent=latent)


@dataclass(frozen=True, eq=False)
class Intervention:
    """An operation at a hook point, on some tokens."""

    operation: Operation
    hook_point: HookPoint | None = None
    """where it acts; none: where the operation's SAE writes"""
    scope: Scope = EVERYWHERE
    """on which tokens"""
    gate: Condition | None = None
    """only while it is open; none: always"""
    model: str | None = None
    """fingerprint of the only model that it may steer; none: any of the right width"""
    mean_norm: float | None = None
    """mean ‖h‖ at the hook point, which bounds the dose; none: not known, and not bounded"""
    max_reach: float | None = None
    """the largest `reach` of its operation that was found to do no harm; none: not known, and not bounded"""
    name: str | None = None
    """in messages"""

    def __str__(self) -> str:
        """What a message calls it."""
        return self.name or type(self.operation).__name__

    @classmethod
    def of(
        cls,
        vector: SteeringVector,
        coefficient: float | None = None,
        *,
        scope: Scope | None = None,
        gate: Condition | None = None,
    ) -> "Intervention":
        """Steer with a vector as it was made to be used; a coefficient, scope or gate given here comes before its own.

        Without the gate that it has: `Intervention.of(replace(vector, gate=None))`. A vector with a window is bounded
        by its end that lies further from 0, in size: what was measured one way is what it may have the other way too.
        """
        make, direction = vector_operation(vector.operation), torch.from_numpy(vector.direction)
        operation = make(direction, vector.coefficient if coefficient is None else coefficient)
        max_reach = None if vector.window is None else max(make(direction, end).reach for end in vector.window)
        return cls(
            operation,
            HookPoint.parse(vector.hook_point),
            scope or Scope.parse(vector.scope),
            gate or vector.gate,
            vector.model.fingerprint,
            vector.mean_norm,
            max_reach,
            f"vector '{vector.name}'",
        )

    @property
    def acts_at(self) -> HookPoint:
        """The hook point. Raises: ConfigError if none was given and there is no SAE, MismatchError if the SAE writes
        another one or several."""
        if self.operation.sae is None:
            if self.hook_point is None:
                raise ConfigError(
                    str(self),
                    expected="a hook point",
                    got="none",
                    fix="Write for example hook_point=HookPoint.parse('resid_post.12').",
                )
            return self.hook_point
        writes = places_of(self.operation.sae).writes
        if self.hook_point not in (None, writes):
            fix = "Leave the hook point out."
            raise MismatchError(f"{self} at {self.hook_point}", expected=str(writes), got="another", fix=fix)
        return writes

    @property
    def reads_at(self) -> HookPoint | None:
        """The hook point that it reads, if it reads: an earlier one for a transcoder's latents."""
        if self.operation.sae is not None:
            return places_of(self.operation.sae).reads
        return self.acts_at if any(slot.reads is not None for slot in self.slots) else None

    @cached_property
    def slots(self) -> list[Slot]:
        """Those of its operation, made once. Raises: as `Operation.slots` does."""
        return self.operation.slots()


def schedule(intervention: Intervention, weights: Mapping[int, float]) -> list[Intervention]:
    """The same at several layers, at so many times its coefficient or strength each: layer -> weight."""
    site = intervention.acts_at.site
    return [
        replace(intervention, operation=intervention.operation.scaled(weight), hook_point=HookPoint(site, layer))
        for layer, weight in weights.items()
    ]


VECTOR_OPERATIONS: dict[str, Any] = {"add": Add, "rotate": Rotate, "ablate": Ablate}
"""What a vector of a library may be made for -> the operation, which takes a direction and a coefficient."""


def vector_operation(name: str) -> Any:
    """One of VECTOR_OPERATIONS; raises UnknownNameError listing them."""
    if name not in VECTOR_OPERATIONS:
        expected = f"one of {', '.join(VECTOR_OPERATIONS)}"
        raise UnknownNameError(f"operation '{name}'", expected=expected, got=f"'{name}'", fix="Correct the name.")
    return VECTOR_OPERATIONS[name]


def folded(slots: Sequence[Slot]) -> list[Slot]:
    """Slots that read nothing summed into one, which does the same."""
    constant = [slot for slot in slots if slot.reads is None and slot.acts]
    rest = [slot for slot in slots if slot.reads is not None and slot.acts]
    if not constant:
        return rest
    total = torch.stack([slot.constant * slot.writes.double() for slot in constant]).sum(0)
    return [Slot(total.float(), 1.0), *rest]


def _unit(direction: Tensor) -> Tensor:
    checked = _checked("direction", direction)
    length = float(checked.norm())
    if length == 0:
        fix = "Use a direction that is not zero."
        raise NumericsError("direction", expected="a length above 0", got="0", fix=fix)
    return checked / length


def _checked(where: str, values: Tensor) -> Tensor:
    found = torch.as_tensor(values).detach().float().cpu()
    if found.ndim != 1:
        fix = "Give one direction."
        raise ShapeError(where, expected="one dimension", got=f"shape {tuple(found.shape)}", fix=fix)
    if not bool(found.isfinite().all()):
        fix = "Make the vector again."
        raise NumericsError(where, expected="finite numbers", got="NaN or infinity", fix=fix)
    return found


def _check_range(where: str, low: float, high: float) -> None:
    if not low <= high:
        raise ConfigError(where, expected="low <= high", got=f"{low} and {high}", fix="Swap them.")

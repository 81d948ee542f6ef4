"""What somebody asks to be steered with, as a request says it: how a vector is used, and what a list shows of one.

The feature browser's bench and the server read the same words; where a vector is found is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from steer.chat.state import Steer
    from steer.gates import Condition, Gate
    from steer.vectors import SteeringVector

MOST_ITEMS = 8
MOST_KEYS = 100
"""of an object, more than any has; each that is not known would be an error by itself"""
Ref = Annotated[str, Field(max_length=300)]
Dose = Annotated[float, Field(ge=-16, le=16, allow_inf_nan=False)]
Level = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


def few(given: dict[str, Any], most: int = MOST_KEYS) -> dict[str, Any]:
    """The same. Raises: ValueError if it has more keys than are worth looking at."""
    if len(given) > most:
        raise ValueError(f"at most {most} keys")
    return given


class Body(BaseModel):
    """What a request says, of exactly the types that its schema tells: no 0 for false, no field that is not read."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, given: Any) -> Any:
        """Whole numbers however JSON spells them: 5.0 is 5 there."""
        if not isinstance(given, dict):
            return given
        return {key: int(x) if isinstance(x, float) and x.is_integer() else x for key, x in few(given).items()}


class Levels(Body):
    """Energies between which a gate opens and shuts."""

    on: Level = Field(description="energy |cos(vector, h)| above which it opens")
    off: Level | None = Field(default=None, description="energy at which it shuts, or below; none: at on")
    tokens: int = Field(default=1, ge=1, le=1024, description="tokens that it stays open at least")

    def of(self, vector: SteeringVector) -> Gate:
        """The gate of a vector's own energy. Raises: ConfigError if `off` is above `on`."""
        return vector.energy_gate(self.on, self.off, self.tokens)


class Use(Body):
    """How something that steers is used; what is not said is as it was made to be used."""

    dose: Dose | None = Field(
        default=None, description="coefficient over mean norm, below 0 the other way; of an ablation, its share"
    )
    operation: Literal["add", "rotate", "ablate"] | None = Field(default=None, description="what is done with it")
    scope: Annotated[str, Field(max_length=200)] | None = Field(default=None, description="on which tokens, in words")
    gate: Levels | None = Field(default=None, description="steer only while its energy is above this")


class Entry(BaseModel):
    """A vector, or a group, as a list shows it; doses are coefficients over the mean norm, of a group the lead's."""

    ref: str
    name: str
    hook_points: list[str]
    coefficient: float
    dose: float
    window: tuple[float, float] | None
    operation: str
    scope: str
    gated: bool
    headline: str


def entry_of(ref: str, vectors: Sequence[SteeringVector]) -> Entry:
    """A vector, or a group, for a list."""
    from steer.groups import group_of
    from steer.library import group_name

    lead = group_of(vectors).lead
    unit = 1.0 if lead.operation == "ablate" else lead.mean_norm
    low, high = lead.window or (0.0, 0.0)
    receipts = len(lead.receipts)
    return Entry(
        ref=ref, name=lead.name if len(vectors) == 1 else group_name(lead.name),
        hook_points=[vector.hook_point for vector in vectors], coefficient=lead.coefficient,
        dose=lead.coefficient / unit, window=None if lead.window is None else (low / unit, high / unit),
        operation=lead.operation, scope=lead.scope, gated=any(vector.gate is not None for vector in vectors),
        headline=f"{receipts} receipt{'' if receipts == 1 else 's'}" if receipts else "not measured",
    )  # fmt: skip


def steer_of(number: int, use: Use, vectors: Sequence[SteeringVector]) -> Steer:
    """Vectors that belong together, used so.

    Its name begins with the item's number, and so do those of its gates: the runtime takes two of one name for a
    mistake, and one vector may be asked for twice.

    Raises: ConfigError for levels of a gate that contradict each other.
    """
    from steer.chat.state import Steer
    from steer.library import group_name

    known: dict[Gate, Gate] = {}

    def used(vector: SteeringVector) -> SteeringVector:
        gate = vector.gate if use.gate is None else use.gate.of(vector)
        is_other = use.operation not in (None, vector.operation)
        return replace(vector, gate=_numbered(gate, number, known), window=None if is_other else vector.window)

    name = vectors[0].name if len(vectors) == 1 else group_name(vectors[0].name)
    return Steer(f"{number} {name}", tuple(used(each) for each in vectors), use.dose, use.operation, use.scope)


def _numbered(condition: Condition | None, number: int, known: dict[Gate, Gate]) -> Condition | None:
    """The same with the number in front of the names of its gates."""
    from steer.gates import Gate, joined, parts_of

    if condition is None:
        return None
    if isinstance(condition, Gate):
        return known.setdefault(condition, replace(condition, name=f"{number} {condition.name}"))
    how, parts = parts_of(condition)
    return joined(how, [each for part in parts if (each := _numbered(part, number, known)) is not None])

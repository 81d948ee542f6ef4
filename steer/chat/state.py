"""The state of a chat, and how commands change it: nothing here runs a model, reads a file or prints.

Every function takes a state and gives a new one, so that a mistake leaves the old one whole.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from activations.errors import ConfigError, UnknownNameError
from steer.composition import joint_doses
from steer.gates import Gate, gates_of
from steer.operations import Intervention, vector_operation
from steer.scopes import Scope
from steer.vectors import SteeringVector


@dataclass(frozen=True)
class GateLevels:
    """When a vector's energy opens and shuts it."""

    on: float
    off: float | None = None
    tokens: int = 1


@dataclass(frozen=True, eq=False)
class Steer:
    """One name that steers: a vector, or several that belong together."""

    name: str
    vectors: tuple[SteeringVector, ...]
    dose: float | None = None
    """none: as suggested. Of several vectors, the largest one's, the others in proportion; of an ablation, its share"""
    operation: str | None = None
    """none: what the vectors are made for"""
    scope: str | None = None
    """none: the vectors' own"""
    gate: GateLevels | None = None
    """none: the vectors' own, if they may have one"""
    may_have_own_gate: bool = True

    def interventions(self) -> list[Intervention]:
        """What it does to the model. Raises: as Scope.parse, Gate and vector_operation do."""
        scope = None if self.scope is None else Scope.parse(self.scope)
        pairs = zip(self.vectors, self.coefficients, strict=True)
        return [Intervention.of(self.used(v), c, scope=scope, gate=self._gate(v)) for v, c in pairs]

    @property
    def coefficients(self) -> list[float]:
        """One for each vector; the share of what is taken out, if it is ablated."""
        own = [self._own(vector) for vector in self.vectors]
        if self.dose is None:
            return own
        ablates = [self._operation(vector) == "ablate" for vector in self.vectors]
        largest = max(v.dose(c) for v, c in zip(self.vectors, own, strict=True))
        if len(self.vectors) > 1 and not any(ablates) and largest > 0:
            return [coefficient * self.dose / largest for coefficient in own]
        return [
            self.dose if is_share else v.coefficient_of(self.dose)
            for v, is_share in zip(self.vectors, ablates, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        """What a transcript keeps of it."""
        return {
            "name": self.name,
            "vectors": [
                {
                    "name": vector.name,
                    "hook_point": vector.hook_point,
                    "operation": self._operation(vector),
                    "coefficient": coefficient,
                    "dose": 0.0 if self._operation(vector) == "ablate" else vector.dose(coefficient),
                    "scope": self.scope or vector.scope,
                    "own_gate": [gate.name for gate in gates_of(self.used(vector).gate)],
                }
                for vector, coefficient in zip(self.vectors, self.coefficients, strict=True)
            ],
            "gate": None if self.gate is None else asdict(self.gate),
        }

    def _operation(self, vector: SteeringVector) -> str:
        return self.operation or vector.operation

    def used(self, vector: SteeringVector) -> SteeringVector:
        """A vector of it as it is used, but for the coefficient."""
        has_own_gate = self.gate is None and self.may_have_own_gate
        return replace(vector, operation=self._operation(vector), gate=vector.gate if has_own_gate else None)

    def _own(self, vector: SteeringVector) -> float:
        """What is suggested; a vector that was made to be added has no share to ablate, so all of it."""
        changed = (self._operation(vector) == "ablate") != (vector.operation == "ablate")
        if not changed:
            return vector.coefficient
        return 1.0 if self._operation(vector) == "ablate" else 0.0

    def _gate(self, vector: SteeringVector) -> Gate | None:
        if self.gate is None:
            return None
        return vector.energy_gate(self.gate.on, self.gate.off, self.gate.tokens)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    system: str | None
    temperature: float
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and what the answer was written under."""

    user: str
    answer: str
    unsteered: str | None
    """what the unsteered model answered, if it was asked too"""
    is_whole: bool
    """False if somebody stopped it"""
    sampling: Sampling
    steering: list[dict[str, Any]]
    fired: dict[str, list[int]]
    """gate -> tokens on which it was open, by their index"""
    n_prompt: int
    """tokens in front of the answer"""
    pieces: tuple[str, ...]
    """the answer by its tokens"""

    def record(self) -> dict[str, Any]:
        """A line of a transcript."""
        kept = asdict(self) | asdict(self.sampling)
        return {key: value for key, value in kept.items() if key not in ("sampling", "pieces")}


@dataclass(frozen=True, eq=False)
class ChatState:
    """All that commands change."""

    sampling: Sampling
    steers: tuple[Steer, ...] = ()
    turns: tuple[Turn, ...] = ()
    compares: bool = False

    def interventions(self) -> list[Intervention]:
        """Of everything that steers."""
        return [each for steer in self.steers for each in steer.interventions()]

    def steering(self) -> list[dict[str, Any]]:
        """The records of everything that steers."""
        return [steer.record() for steer in self.steers]

    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as a chat template reads it."""
        roles = [(("user", turn.user), ("assistant", turn.answer)) for turn in self.turns]
        return [{"role": role, "content": text} for pair in roles for role, text in pair]

    def last(self) -> Turn:
        """The last turn. Raises: ConfigError if there is none."""
        if not self.turns:
            raise ConfigError("chat", expected="a question before", got="none so far", fix="Say something first.")
        return self.turns[-1]

    def steer(self, name: str) -> Steer:
        """Raises: UnknownNameError if nothing of that name steers."""
        for each in self.steers:
            if each.name == name:
                return each
        names = ", ".join(each.name for each in self.steers)
        expected = f"one of {names}, which steer now" if names else "a vector that steers now, and none does"
        raise UnknownNameError(f"vector '{name}'", expected=expected, got=f"'{name}'", fix="Add it first, with /add.")


def added(state: ChatState, steer: Steer) -> ChatState:
    """With one more name. Raises: ConfigError if it steers already."""
    if any(each.name == steer.name for each in state.steers):
        fix = "Change it with /dose, /op, /scope or /gate."
        raise ConfigError(
            f"vector '{steer.name}'", expected="one that does not steer yet", got="one that does", fix=fix
        )
    return replace(state, steers=(*state.steers, steer))


def changed(state: ChatState, name: str, **fields: Any) -> ChatState:
    """With other fields of the Steer of that name. Raises: UnknownNameError if there is none."""
    new = replace(state.steer(name), **fields)
    return replace(state, steers=tuple(new if each.name == name else each for each in state.steers))


def operated(state: ChatState, name: str, operation: str) -> ChatState:
    """With that name used for something else; a dose and an ablated share are not each other's.

    Raises: UnknownNameError if there is no such operation, or the name does not steer.
    """
    vector_operation(operation)
    steer = state.steer(name)
    before = {steer.operation or vector.operation for vector in steer.vectors}
    keeps = ("ablate" in before) == (operation == "ablate")
    return changed(state, name, operation=operation, dose=steer.dose if keeps else None)


def removed(state: ChatState, name: str) -> ChatState:
    """Without that name. Raises: UnknownNameError if it does not steer."""
    gone = state.steer(name)
    return replace(state, steers=tuple(each for each in state.steers if each is not gone))


def undone(state: ChatState) -> ChatState:
    """Without the last turn. Raises: ConfigError if there is none."""
    state.last()
    return replace(state, turns=state.turns[:-1])


def sampled(state: ChatState, **fields: Any) -> ChatState:
    """With other fields of Sampling. Raises: ConfigError for numbers out of range."""
    new = replace(state.sampling, **fields)
    if new.temperature < 0 or new.max_new_tokens < 1:
        got = f"{new.temperature:g} and {new.max_new_tokens}"
        fix = "Give other numbers."
        raise ConfigError("sampling", expected="a temperature of at least 0, and a token or more", got=got, fix=fix)
    return replace(state, sampling=new)


def for_retry(state: ChatState) -> ChatState:
    """Without the last turn; with the next seed, if the last answer would come again. Raises: as `undone`."""
    turn, back = state.last(), undone(state)
    is_same = turn.is_whole and (turn.sampling, turn.steering) == (state.sampling, state.steering())
    return sampled(back, seed=state.sampling.seed + 1) if is_same and state.sampling.temperature > 0 else back


def doses_together(steers: Sequence[Steer]) -> dict[str, float]:
    """By hook point, the joint dose of all that is added there."""
    used = [
        replace(steer.used(vector), coefficient=coefficient)
        for steer in steers
        for vector, coefficient in zip(steer.vectors, steer.coefficients, strict=True)
    ]
    return joint_doses([vector for vector in used if vector.operation != "ablate"])


def open_pieces(turn: Turn, gate: str) -> list[str]:
    """The parts of an answer on whose tokens a gate was open; neighbours are one part."""
    parts: list[str] = []
    before = None
    for index in turn.fired.get(gate, []):
        place = index - turn.n_prompt
        if 0 <= place < len(turn.pieces):
            if before == place - 1 and parts:
                parts[-1] += turn.pieces[place]
            else:
                parts.append(turn.pieces[place])
            before = place
    return parts

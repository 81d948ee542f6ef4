"""Gates: steer only while something shows in the model, not on every token.

    r_t = readout of token t at a hook point            a projection, an energy, a probe, an SAE latent
    opens  where r_t > on                               and steers that very token
    shuts  where r_t <= off, once it was open for `min_tokens` tokens; off <= on, so that it does not flicker

    Gate(energy(direction, "resid_post.8"), on=0.4, off=0.3) & ~Gate(probe(weight, bias, "resid_post.8"), on=0.0)

A gate is an automaton of a few states, shut or open for so many tokens. One token moves it by a map of states to
states, and maps compose, so that the tokens of a prefill are gone over in log2(pos) steps and a decoded token in one;
the result is that of a loop over tokens. The first token of a sequence resets it, and padding leaves it alone.

A threshold is chosen by `calibrate` on texts where the gate should stay shut, for a share of false alarms; it is
refused on other weights. Left out: readouts of several tokens at once; gates that act on later tokens only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations.errors import ConfigError, TextError
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from steer.latents import encoder_row, places_of

INF = math.inf


@dataclass(frozen=True, eq=False)
class Readout:
    """r = w·h + bias, 0 unless above `floor`, then |r| if `absolute`, then r / ‖h‖ if `relative`; float32."""

    hook_point: HookPoint
    """where it is read"""
    weight: Float[Tensor, " d_model"]
    bias: float = 0.0
    floor: float = -INF
    absolute: bool = False
    relative: bool = False


def energy(direction: Float[Tensor, " d_model"], hook_point: str) -> Readout:
    """|cos(direction, h)|: the share of a token's length that lies along a direction, either way; 0 to 1."""
    return Readout(HookPoint.parse(hook_point), direction / direction.norm(), absolute=True, relative=True)


def cosine(direction: Float[Tensor, " d_model"], hook_point: str) -> Readout:
    """cos(direction, h); -1 to 1."""
    return Readout(HookPoint.parse(hook_point), direction / direction.norm(), relative=True)


def probe(weight: Float[Tensor, " d_model"], bias: float, hook_point: str) -> Readout:
    """The logit of a linear probe; for a direction of norm 1 and bias 0, the projection."""
    return Readout(HookPoint.parse(hook_point), weight, bias)


def latent(sae: SaeArtefact, index: int) -> Readout:
    """The activation of a latent of an SAE; of a TopK SAE, what it would be if it were among the k largest.

    Raises: UnknownNameError if there is no such latent, MismatchError for a crosscoder.
    """
    row = encoder_row(sae, index)
    return Readout(places_of(sae).reads, row.weight, row.bias, row.threshold)


class Condition:
    """Gates joined by `&`, `|` and `~`."""

    def __and__(self, other: "Condition") -> "Condition":
        """Both."""
        return _Joined("and", (self, other))

    def __or__(self, other: "Condition") -> "Condition":
        """Either."""
        return _Joined("or", (self, other))

    def __invert__(self) -> "Condition":
        """Where it is shut."""
        return _Joined("not", (self,))


@dataclass(frozen=True, eq=False)
class Gate(Condition):
    """Open or shut, token by token."""

    readout: Readout
    on: float
    """opens above it"""
    off: float | None = None
    """shuts at it or below; none: at `on`"""
    min_tokens: int = 1
    """tokens that it stays open at least"""
    name: str = "gate"
    """in the log"""
    model: str | None = None
    """fingerprint of the only weights that it was calibrated for; none: set by hand, for any of the right width"""
    calibration: dict[str, Any] = field(default_factory=dict)
    """what `calibrate` found"""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (self.shuts_at <= self.on and self.min_tokens >= 1):
            raise ConfigError(
                f"gate '{self.name}'",
                expected="off <= on and min_tokens >= 1",
                got=f"on {self.on}, off {self.off}, min_tokens {self.min_tokens}",
                fix="Lower off, or give more tokens.",
            )

    @property
    def shuts_at(self) -> float:
        """`off`, or else `on`."""
        return self.on if self.off is None else self.off


@dataclass(frozen=True, eq=False)
class _Joined(Condition):
    how: str
    parts: tuple[Condition, ...]


def joined(how: str, parts: Sequence[Condition]) -> Condition:
    """Conditions joined by `and` or `or`, or one turned round by `not`."""
    return _Joined(how, tuple(parts))


def parts_of(condition: Condition) -> tuple[str, tuple[Condition, ...]]:
    """How a condition that is not a single gate is joined, and of what."""
    assert isinstance(condition, _Joined)
    return condition.how, condition.parts


Clause = dict[Gate, bool]
"""Gates that have to be open (True) or shut (False), all of them"""


def clauses(condition: Condition | None, wanted: bool = True) -> list[Clause]:
    """A condition as clauses one of which has to hold; a clause that contradicts itself is left out."""
    if condition is None:
        return [{}]
    if isinstance(condition, Gate):
        return [{condition: wanted}]
    assert isinstance(condition, _Joined)
    if condition.how == "not":
        return clauses(condition.parts[0], not wanted)
    left, right = (clauses(part, wanted) for part in condition.parts)
    if (condition.how == "or") == wanted:
        return left + right
    pairs = [(a, b) for a in left for b in right if all(b.get(gate, value) == value for gate, value in a.items())]
    return [a | b for a, b in pairs]


def gates_of(condition: Condition | None) -> list[Gate]:
    """The gates in a condition, once each, also those that it does not depend on."""
    if condition is None:
        return []
    if isinstance(condition, Gate):
        return [condition]
    assert isinstance(condition, _Joined)
    return list(dict.fromkeys(gate for part in condition.parts for gate in gates_of(part)))


# --- readouts and automata over tokens -------------------------------------------------------------------------------


class GateTable(NamedTuple):
    """Gates of one hook point as tensors."""

    weight: Float[Tensor, "gate d_model"]
    bias: Float[Tensor, " gate"]
    floor: Float[Tensor, " gate"]
    absolute: Bool[Tensor, " gate"]
    relative: Bool[Tensor, " gate"]
    on: Float[Tensor, " gate"]
    off: Float[Tensor, " gate"]
    min_tokens: Int[Tensor, " gate"]


def gate_table(gates: Sequence[Gate]) -> GateTable:
    """The table of some gates that read one hook point, in this order."""
    readouts = [gate.readout for gate in gates]
    return GateTable(
        torch.stack([readout.weight.detach().float().cpu() for readout in readouts]),
        torch.tensor([readout.bias for readout in readouts], dtype=torch.float32),
        torch.tensor([readout.floor for readout in readouts], dtype=torch.float32),
        torch.tensor([readout.absolute for readout in readouts]),
        torch.tensor([readout.relative for readout in readouts]),
        torch.tensor([gate.on for gate in gates], dtype=torch.float32),
        torch.tensor([gate.shuts_at for gate in gates], dtype=torch.float32),
        torch.tensor([gate.min_tokens for gate in gates]),
    )


def read(table: GateTable, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos gate"]:
    """The readout of each gate on each token of x, which is float32."""
    value = x @ table.weight.T + table.bias
    value = torch.where(value > table.floor, value, 0.0)
    value = torch.where(table.absolute, value.abs(), value)
    length = x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.where(table.relative, value / length, value)


def run_gates(
    table: GateTable,
    values: Float[Tensor, "batch pos gate"],
    index: Int[Tensor, "batch pos"],
    ages: Int[Tensor, "batch gate"],
    max_age: int,
) -> Int[Tensor, "batch pos gate"]:
    """For how many tokens each gate has been open behind each token, 0 if it is shut, `max_age` if for that or longer.

    Args:
      index: of each token in its sequence; -1 for padding.
      ages: the same before the first token of this pass.
      max_age: at least the largest `min_tokens`.
    """
    moved = moves(table, values, index, max_age)
    start = ages[:, None, :, None].expand(-1, moved.shape[1], -1, -1)
    return composed(moved).gather(-1, start)[..., 0]


def moves(
    table: GateTable, values: Float[Tensor, "batch pos gate"], index: Int[Tensor, "batch pos"], max_age: int
) -> Int[Tensor, "batch pos gate state"]:
    """What each token makes of each state; as `run_gates` has it, or with a table that has rows of gates by token."""
    state = torch.arange(max_age + 1, device=values.device)
    value, first = values[..., None], (index == 0)[..., None, None]
    opens = value > table.on[..., None]
    may_shut = (value <= table.off[..., None]) & (state >= table.min_tokens[..., None])
    moved = torch.where(state == 0, opens.long(), torch.where(may_shut, 0, (state + 1).clamp(max=max_age)))
    return torch.where(first, 0, torch.where((index < 0)[..., None, None], state, moved))


def composed(
    moved: Int[Tensor, "batch pos gate state"], longest: int | None = None
) -> Int[Tensor, "batch pos gate state"]:
    """What all tokens up to each one, together, make of each state.

    Args:
      longest: tokens behind which one makes one state of all, whatever came before; none: all.
    """
    shift, length = 1, moved.shape[1] if longest is None else min(longest, moved.shape[1])
    while shift < length:  # moved[t] becomes the map over tokens t - 2 * shift + 1 to t
        later = moved[:, shift:].gather(-1, moved[:, :-shift])
        moved = torch.cat([moved[:, :shift], later], dim=1)
        shift *= 2
    return moved


# --- calibration -----------------------------------------------------------------------------------------------------


def calibrate(
    loaded: LoadedModel,
    readout: Readout,
    texts: Sequence[str],
    rate: float,
    *,
    off_rate: float | None = None,
    min_tokens: int = 1,
    name: str = "gate",
) -> Gate:
    """The gate that opens on a share of at most `rate` of texts like these, on which it should stay shut.

    `on` is an order statistic: with n texts, the ceil((n + 1)(1 - rate))-th smallest of their highest readouts. For a
    text that is exchangeable with them, P(it opens) <= rate, whatever their distribution (split conformal prediction,
    Vovk et al. 2005); that is over the choice of texts too. For the texts at hand, the true share is below
    `calibration["bound95"]` with a probability of 95%: it is distributed as Beta(n - j + 1, j), if j is that order.

    Args:
      off_rate: the same for `off`; none: five times `rate`, at most half.
    Raises: ConfigError if there are too few texts for that rate, TextError if one has a single token.
    """
    wide = min(0.5, 5 * rate) if off_rate is None else off_rate
    if not 0 < rate <= wide < 1:
        fix = "Choose rates such as 0.01 and 0.05."
        raise ConfigError("calibrate", expected="0 < rate <= off_rate < 1", got=f"{rate} and {wide}", fix=fix)
    peaks = sorted(peak(loaded, readout, text) for text in texts)
    order, order_off = _order(len(peaks), rate), _order(len(peaks), wide)
    calibration = {"n": len(peaks), "rate": rate, "off_rate": wide, "bound95": _bound(len(peaks), order)}
    on, off = peaks[order - 1], peaks[order_off - 1]
    return Gate(readout, on, off, min_tokens, name, loaded.fingerprint, calibration)


def _order(n: int, rate: float) -> int:
    order = math.ceil((n + 1) * (1 - rate) - 1e-9)
    if order > n:
        needed = math.ceil(1 / rate - 1 - 1e-9)
        raise ConfigError("calibrate", expected=f"{needed} texts or more for a rate of {rate}", got=n, fix="Give more.")
    return max(order, 1)


def _bound(n: int, order: int) -> float:
    from scipy.stats import beta

    return float(beta.ppf(0.95, n - order + 1, order))


def peak(loaded: LoadedModel, readout: Readout, text: str) -> float:
    """The highest readout of a text's tokens, but the first."""
    ids = loaded.tokenizer(text)["input_ids"]
    if len(ids) < 2:
        raise TextError(f"text '{text[:40]}'", expected="two tokens or more", got=len(ids), fix="Leave it out.")
    points = [readout.hook_point]
    with capture(loaded.model, loaded.family, points, stop_after_last=True) as captured:
        run_until(loaded.model, {"input_ids": torch.tensor([ids], device=loaded.device)})
    x = captured[readout.hook_point].float()
    table = gate_table([Gate(readout, 0.0)])
    on_device = GateTable(*(tensor.to(x.device) for tensor in table))
    return float(read(on_device, x)[0, 1:].max())

"""From interventions to the contents of tables, and how much room those need.

Flow: 1. every intervention is checked against the model; 2. gates and the latches of scopes become flags, in the order
in which a forward pass comes by them; 3. the slots of each sequence are sorted into lanes, and what only adds, under
one scope and gate, is summed into one slot; 4. what a sequence asks for beyond its budget is scaled down to it; 5. the
fullest sequence says how many slots a lane has room for.

A budget bounds the joint dose of a sequence at each hook point: the length of the longest sum that scopes and gates may
let through at once, whether or not they ever do, and beside it what clamps ask for, over mean ‖h‖. Scaling all that
is added by one factor, rather than refusing it, keeps the proportions that somebody chose. A clamp has a target that is
either reached or not, so it is counted and never scaled, and refused if it leaves nothing.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from activations.errors import ConfigError, HookPointError, MismatchError, NumericsError, ShapeError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.composition import longest_sum
from steer.gates import Gate, clauses, gates_of
from steer.operations import Intervention, Slot, folded
from steer.scopes import Latch, Scope, latches_of
from steer.tables import Lane, LaneKey, Row, Where

MAX_DOSE = 2.0
"""length that an intervention may ask for, in mean ‖h‖ at its hook point; text falls apart well below it"""
ROUNDING = 1e-6
"""share by which directions in float32 may miss their length: as much beyond a budget is within it"""
RESERVE = "Name it in `reserve` when steering starts."

Interventions = Sequence[Intervention]
Contents = dict[LaneKey, list[list[Row]]]
"""lane -> the slots of each row of its table"""
Budget = float | Sequence[float | None] | None
"""joint dose that no sequence goes beyond at any hook point, or one for each sequence; none: not bounded"""
_Groups = dict[tuple[LaneKey, Scope, Where], list[Intervention]]


class _Group(NamedTuple):
    """Interventions of one lane that act on the same tokens, and what they come to."""

    lane: LaneKey
    where: Where
    members: list[Intervention]
    slots: list[Slot]

    @property
    def asked(self) -> float:
        """Length that those that read ask for."""
        return max((each.operation.reach for each in self.members if each.reads_at is not None), default=0.0)


class Plan:
    """What is fixed when steering starts: flags, lanes, and their sizes."""

    def __init__(
        self,
        loaded: LoadedModel,
        interventions: Interventions,
        rows: Sequence[Interventions] | None,
        prompt_lengths: Sequence[int] | None,
        reserve: Interventions,
        force: bool,
        budget: Budget = None,
    ):
        """Check everything; raises as `steer.runtime.steering` says."""
        self._loaded, self._force = loaded, force
        everything = [*interventions, *(each for row in rows or () for each in row), *reserve]
        found = dict.fromkeys(gate for each in everything for gate in gates_of(each.gate))
        self.gates: list[Gate] = sorted(found, key=lambda gate: gate.readout.hook_point.depth)
        self._check_names()
        self._literals = {each.scope: latches_of(each.scope, loaded.tokenizer) for each in everything}
        pairs = [pair for literals in self._literals.values() for pair in literals]
        self.latches: list[Latch] = list(dict.fromkeys(latch for latch, _ in pairs))
        self._flags: dict[Latch | Gate, int] = {flag: i for i, flag in enumerate([*self.latches, *self.gates])}
        self._n_clauses = max((len(clauses(each.gate)) for each in everything), default=1)
        self._lengths = prompt_lengths if any(each.scope.part for each in everything) else None
        self.is_by_row = rows is not None or self._lengths is not None
        self.n_rows = len(rows if rows is not None else self._lengths or [0])
        self._budgets = _budgets(budget, self.n_rows, self.is_by_row)
        self.scales: list[dict[HookPoint, float]] = []
        by_row = [self._needed([*interventions, *row], 1) for row in (rows or [[]])]
        spare = self._needed(reserve, 1)
        keys = dict.fromkeys(key for needed in (*by_row, spare) for key in needed)
        self._room = {key: max(needed[key] for needed in by_row) + spare[key] for key in keys}

    @property
    def has_flags(self) -> bool:
        """Whether a pass leaves something for the next one."""
        return bool(self._flags)

    @property
    def points(self) -> list[HookPoint]:
        """Where something is read or acts, in the order of a pass."""
        points = {gate.readout.hook_point for gate in self.gates}
        points |= {point for key in self._room for point in (key.acts, key.reads) if point is not None}
        return sorted(points, key=lambda point: point.depth)

    def lanes(self) -> list[Lane]:
        """Empty tables of the right sizes."""
        sizes = (self.n_rows, self._n_clauses, len(self._flags), self._loaded.d_model)
        return [Lane(key, n_slots, *sizes) for key, n_slots in self._room.items()]

    def contents(
        self,
        interventions: Interventions,
        rows: Sequence[Interventions] | None,
        prompt_lengths: Sequence[int] | None,
    ) -> Contents:
        """What each lane is to hold.

        Raises: ConfigError for a gate, or a scope's markers, that were not known at the start; ShapeError for other
          numbers of sequences than then; and what is wrong with an intervention.
        """
        lengths = (prompt_lengths or self._lengths) if self._lengths is not None else None
        for what, given in (("rows", rows), ("prompt_lengths", lengths)):
            if given is not None and (len(given) != self.n_rows or not self.is_by_row):
                fix = "Give one for each sequence of the batch, and as many as when steering started."
                raise ShapeError(f"steering: {what}", expected=str(self.n_rows), got=len(given), fix=fix)
        found: Contents = {}
        scales = []
        for r in range(self.n_rows):
            own = [*interventions, *(rows[r] if rows is not None else ())]
            groups = self._slotted(own, None if lengths is None else lengths[r])
            scales.append(_scales(groups, self._budgets[r]))
            for key, slots in self._sorted(groups, scales[r]).items():
                found.setdefault(key, [[] for _ in range(self.n_rows)])[r] = slots
        self.scales = scales
        return found

    def _groups(self, interventions: Iterable[Intervention], n_prompt: int | None) -> _Groups:
        """The interventions of one sequence by lane and by where they act."""
        groups: _Groups = {}
        for each in interventions:
            key = (self._lane(each), each.scope, self._where(each, n_prompt))
            groups.setdefault(key, []).append(each)
        return groups

    def _needed(self, interventions: Iterable[Intervention], n_prompt: int) -> Counter[LaneKey]:
        """Slots that each lane needs, also for what has coefficient 0 for the time being."""
        needed: Counter[LaneKey] = Counter()
        for (lane, *_), group in self._groups(interventions, n_prompt).items():
            slots = [slot for each in group for slot in each.slots]
            needed[lane] += len(slots) if lane.reads is not None else 1
        return needed

    def _slotted(self, interventions: Iterable[Intervention], n_prompt: int | None) -> list[_Group]:
        """The interventions of one sequence as slots."""
        return [
            _Group(lane, where, group, folded([slot for each in group for slot in self._slots(each)]))
            for (lane, _, where), group in self._groups(interventions, n_prompt).items()
        ]

    def _sorted(self, groups: Sequence[_Group], scales: dict[HookPoint, float]) -> dict[LaneKey, list[Row]]:
        """The slots of one sequence by lane, what adds at so many times what was asked for."""
        found: dict[LaneKey, list[Row]] = {}
        for group in groups:
            slots = [_scaled(slot, scales.get(group.lane.acts, 1.0)) for slot in group.slots]
            self._check_dose(group, slots)
            self._check_windows(group.members)
            if slots:
                found.setdefault(group.lane, []).extend(Row(slot, group.where) for slot in slots)
        return found

    def _where(self, each: Intervention, n_prompt: int | None) -> Where:
        literals = self._known(each)
        low, high = each.scope.bounds(n_prompt)
        in_scope = {(self._flags[latch], wanted) for latch, wanted in literals}
        joined = (in_scope | {(self._flags[gate], wanted) for gate, wanted in c.items()} for c in clauses(each.gate))
        found = tuple(frozenset(clause) for clause in joined)
        if len(found) > self._n_clauses:
            expected = f"a gate of at most {self._n_clauses} alternatives, as many as at the start"
            raise ConfigError(f"gate of {each}", expected=expected, got=len(found), fix=RESERVE)
        return Where(low, high if found else low, found)

    def _known(self, each: Intervention) -> list[tuple[Latch, bool]]:
        """The latches of its scope, if those and its gates are among the flags."""
        unknown = [gate.name for gate in gates_of(each.gate) if gate not in self._flags]
        if unknown:
            raise ConfigError(
                f"gate '{unknown[0]}'", expected="one that runs since the start", got="a new one", fix=RESERVE
            )
        literals = self._literals.get(each.scope)
        literals = latches_of(each.scope, self._loaded.tokenizer) if literals is None else literals
        has_no_lengths = each.scope.part is not None and each.scope not in self._literals and self._lengths is None
        if has_no_lengths or any(latch not in self._flags for latch, _ in literals):
            expected = "a scope that asks for no more than those at the start"
            raise ConfigError(f"scope '{each.scope}'", expected=expected, got="a new one", fix=RESERVE)
        return literals

    def _lane(self, each: Intervention) -> LaneKey:
        self._check(each)
        return LaneKey.of(each.acts_at, each.reads_at, each.operation.sae, each.operation.keeps_norm)

    def _slots(self, each: Intervention) -> list[Slot]:
        where = f"{each} at {each.acts_at}"
        for slot in each.slots:
            for tensor in (slot.writes, slot.reads):
                if tensor is not None:
                    self._check_vector(where, tensor)
            numbers = (slot.constant, slot.strength, slot.bias, slot.gain)
            if not all(map(math.isfinite, numbers)) or any(map(math.isnan, (slot.low, slot.high, slot.threshold))):
                raise _not_finite(where)
        return each.slots

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_names(self) -> None:
        names = [gate.name for gate in self.gates]
        for name in names:
            if names.count(name) > 1:
                fix = "Give them names, by which the log tells them apart."
                raise ConfigError(f"gate '{name}'", expected="one of this name", got=names.count(name), fix=fix)

    def _check(self, each: Intervention) -> None:
        loaded = self._loaded
        self._check_model(str(each), each.model)
        sites = loaded.family.sites(loaded.model.config)
        acts = each.acts_at.check(loaded.n_layers, sites)
        reads = [(f"{each} at {acts}", each.reads_at)] if each.reads_at is not None else []
        for gate in gates_of(each.gate):
            self._check_model(f"gate '{gate.name}'", gate.model)
            self._check_vector(f"gate '{gate.name}'", gate.readout.weight)
            reads.append((f"gate '{gate.name}'", gate.readout.hook_point))
        for where, point in reads:
            assert point is not None
            if point.check(loaded.n_layers, sites).depth > acts.depth:
                expected = f"a hook point no later than {acts}, where it acts"
                raise HookPointError(where, expected=expected, got=point, fix="Read it earlier, or act later.")

    def _check_model(self, where: str, fingerprint: str | None) -> None:
        if fingerprint not in (None, self._loaded.fingerprint):
            raise MismatchError(
                where,
                expected=f"one of {self._loaded.id}",
                got=f"one of other weights, {str(fingerprint)[:12]}",
                fix="Load the model that it was made from.",
            )

    def _check_vector(self, where: str, vector: Any) -> None:
        if vector.ndim != 1 or len(vector) != self._loaded.d_model:
            raise ShapeError(
                where,
                expected=f"vectors of d_model {self._loaded.d_model}",
                got="x".join(map(str, vector.shape)),
                fix="Use what was made from this model.",
            )
        if not bool(vector.isfinite().all()):
            raise _not_finite(where)

    def _check_dose(self, group: _Group, slots: Sequence[Slot]) -> None:
        norms = _mean_norms(group.members)
        if self._force or not norms:
            return
        added = max((float(slot.constant * slot.writes.norm()) for slot in slots if slot.reads is None), default=0.0)
        reach = max(added, group.asked)
        if reach > MAX_DOSE * min(norms):
            raise ConfigError(
                f"{', '.join(map(str, group.members))} at {group.lane.acts}",
                expected=f"a dose of at most {MAX_DOSE:g}",
                got=f"{reach / min(norms):.3g}",
                fix="Lower the coefficient, or say force if you mean it.",
            )

    def _check_windows(self, group: Sequence[Intervention]) -> None:
        for each in group:
            reach, most = each.operation.reach, each.max_reach
            if most is not None and reach > most and not self._force:
                raise ConfigError(
                    f"{each} at {each.acts_at}",
                    expected=f"a coefficient of at most {most:.4g} either way, where its calibrated window ends",
                    got=f"{reach:.4g}",
                    fix="Lower it, calibrate again with other bounds, or say force if you mean it.",
                )


# --- budgets ---------------------------------------------------------------------------------------------------------


def _budgets(budget: Budget, n_rows: int, is_by_row: bool) -> Sequence[float | None]:
    """One budget for each row."""
    found = [*budget] if isinstance(budget, Sequence) else [budget] * n_rows
    if len(found) != n_rows or (isinstance(budget, Sequence) and not is_by_row):
        fix = "Give one number for all, or rows and as many budgets."
        raise ShapeError("steering: budget", expected=str(n_rows if is_by_row else 1), got=len(found), fix=fix)
    for each in found:
        if each is not None and not 0 < each < math.inf:
            fix = "Give a dose such as 1.0, or none."
            raise ConfigError("steering: budget", expected="a number above 0", got=each, fix=fix)
    return found


def _scales(groups: Sequence[_Group], budget: float | None) -> dict[HookPoint, float]:
    """By hook point, what has to be scaled: by how much, so that no sequence of gates and scopes goes beyond."""
    found: dict[HookPoint, float] = {}
    for point in dict.fromkeys(group.lane.acts for group in groups) if budget is not None else ():
        at = [group for group in groups if group.lane.acts == point]
        sums: dict[Where, Any] = {}
        for group in at:
            for slot in group.slots:
                if slot.reads is None:
                    sums[group.where] = sums.get(group.where, 0.0) + slot.constant * slot.writes.double()
        added = longest_sum(torch.stack([*sums.values()]).numpy()) if sums else 0.0
        asked = sum(group.asked for group in at)
        if added == asked == 0:
            continue
        assert budget is not None
        room = budget * _mean_norm(at) - asked
        if room <= 0:
            raise ConfigError(
                f"{', '.join(str(each) for group in at for each in group.members if group.asked)} at {point}",
                expected=f"targets within the budget of {budget:g}",
                got=f"{asked / _mean_norm(at):.3g}",
                fix="Lower the targets, which cannot be scaled, or raise the budget.",
            )
        if added > room * (1 + ROUNDING):
            found[point] = room / added
    return found


def _scaled(slot: Slot, factor: float) -> Slot:
    return slot if factor == 1 or slot.reads is not None else replace(slot, constant=factor * slot.constant)


def _mean_norms(interventions: Iterable[Intervention]) -> list[float]:
    return [each.mean_norm for each in interventions if each.mean_norm is not None]


def _mean_norm(groups: Sequence[_Group]) -> float:
    """The smallest that is known at a hook point."""
    norms = _mean_norms(each for group in groups for each in group.members)
    if not norms:
        where = f"{', '.join(str(each) for group in groups for each in group.members)} at {groups[0].lane.acts}"
        fix = "Say mean_norm of one of them, or steer without a budget."
        raise ConfigError(where, expected="mean ‖h‖, which a budget is measured in", got="none", fix=fix)
    return min(norms)


def _not_finite(where: str) -> NumericsError:
    return NumericsError(where, expected="finite numbers", got="NaN or infinity", fix="Make the vector again.")

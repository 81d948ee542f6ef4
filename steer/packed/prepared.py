"""What one request comes to, ready to be packed beside others, and what there is room for.

Left out: where it lies while it runs (`steer.packed.rows`).
"""

from typing import NamedTuple

from activations.errors import ConfigError
from activations.models import LoadedModel
from steer.gates import Gate
from steer.plan import Contents, Interventions, Plan
from steer.scopes import Latch

MAX_FLAGS = 4
"""gates of one request, and latches of its scopes"""
MAX_CLAUSES = 4
"""alternatives of one condition"""
MAX_AGE = 16
"""most tokens that a gate may be asked to stay open for at least"""


class Prepared(NamedTuple):
    """What a request comes to, for a prompt of so many tokens."""

    contents: Contents
    """lane -> its slots, as the only row"""
    latches: list[Latch]
    gates: list[Gate]
    """behind the latches, in the order of the flags that slots ask for"""
    bounds: list[tuple[int, int]]
    """lowest index, and the index behind the highest one, of every scope"""
    scaled: dict[str, float]
    """by hook point, what a budget left of what was asked for, where that is less than all of it"""

    @property
    def steers(self) -> bool:
        """Whether any token may be steered, or any gate is to be told of."""
        return bool(self.gates) or any(rows[0] for rows in self.contents.values())

    @property
    def n_flags(self) -> int:
        """Gates and latches."""
        return len(self.latches) + len(self.gates)

    @property
    def n_clauses(self) -> int:
        """Alternatives of the condition that has most."""
        return max((len(row.where.clauses) for rows in self.contents.values() for row in rows[0]), default=0)


def prepared(
    loaded: LoadedModel, interventions: Interventions, n_prompt: int, budget: float | None
) -> tuple[Plan, Prepared]:
    """The plan of one request, and its contents. Raises: as `steer.plan.Plan` does."""
    plan = Plan(loaded, interventions, None, [n_prompt], (), False, budget)
    contents = plan.contents(interventions, None, [n_prompt])
    bounds = dict.fromkeys(each.scope.bounds(n_prompt) for each in interventions)
    scaled = {str(point): share for point, share in plan.scales[0].items()}
    return plan, Prepared(contents, plan.latches, plan.gates, list(bounds), scaled)


def check_room(request: Prepared) -> None:
    """Raise ConfigError for what does not fit into packed tables."""
    if request.n_flags > MAX_FLAGS:
        expected, fix = f"at most {MAX_FLAGS} gates, roles, phases and tool calls a request", "Leave some out."
        raise ConfigError("gates and scopes", expected=expected, got=request.n_flags, fix=fix)
    for gate in request.gates:
        if gate.min_tokens > MAX_AGE:
            got, fix = gate.min_tokens, "Ask for fewer."
            raise ConfigError(f"gate '{gate.name}'", expected=f"at most {MAX_AGE} tokens", got=got, fix=fix)
    if request.n_clauses > MAX_CLAUSES:
        fix = "Simplify the condition."
        raise ConfigError("gate", expected=f"at most {MAX_CLAUSES} alternatives", got=request.n_clauses, fix=fix)

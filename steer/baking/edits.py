"""What vectors do to what a sub-layer writes, as one affine map, or the reason why they are none.

    y' = y - Σ strength u (u·y) + constant              y: what attention or the MLP adds to the residual stream

Flow: 1. what depends on the token, or is no affine map, is refused; 2. each vector gets a home, the sub-layer that
writes the last term before its hook point; 3. the maps of one home are put together.

| vector | home | why it is exact |
|---|---|---|
| ablate at attn_out, mlp_out | that sub-layer | a projection of a sum of linear maps is that of each |
| add at attn_out, mlp_out | that sub-layer | a constant |
| add at resid_mid.L | attention of block L | nothing reads the stream between what attention adds and resid_mid |
| add at resid_post.L, resid_pre.L+1 | MLP of block L | the same, behind the MLP |

An ablation of the residual stream has no home: what is in it already was written by all blocks before. Neither has a
rotation, which is not linear, nor an add to several residual streams, each of which gets another share of what a
sub-layer writes. At one hook point the runtime lets all vectors read the same value and sums what they write, so that
the order of what is baked does not matter.

Left out: the weights themselves (`steer.baking.weights`, `steer.baking.adapter`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from activations.errors import MismatchError
from activations.families.base import Writer
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.vectors import SteeringVector

HOMES = {"attn_out": "attn_out", "resid_mid": "attn_out", "mlp_out": "mlp_out", "resid_post": "mlp_out"}
"""site -> the site that is written last before it"""


@dataclass
class Edit:
    """The affine map of one home, in float64."""

    ablations: list[tuple[float, Float[Tensor, " d_model"]]] = field(default_factory=list)
    """strength and unit direction of each"""
    constant: Float[Tensor, " d_model"] | None = None

    def taken(self, y: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Σ strength u (u·y)."""
        return sum((s * (y @ u)[..., None] * u for s, u in self.ablations), torch.zeros_like(y))


class Linear(NamedTuple):
    """A linear map that writes, wherever its weight is."""

    path: str
    """of the module in the model"""
    module: nn.Module
    weight: str
    """name of its parameter"""
    bias: str
    """name of its parameter, which may be None, or absent"""
    axis: int
    """that of the weight which is d_model wide"""
    is_plain: bool

    @property
    def is_expert(self) -> bool:
        """Whether it is the maps of many experts in one tensor."""
        return self.weight != "weight"


def edits_of(vectors: Sequence[SteeringVector], loaded: LoadedModel) -> dict[HookPoint, Edit]:
    """The map of each home. Raises: MismatchError for what no weights do exactly, or does nothing."""
    found: dict[HookPoint, Edit] = {}
    for vector in vectors:
        _check(vector)
        edit = found.setdefault(_home(vector, loaded), Edit())
        direction = torch.from_numpy(vector.direction).double()
        direction = direction / direction.norm()
        if vector.operation == "ablate":
            edit.ablations.append((vector.coefficient, direction))
        else:
            edit.constant = (0 if edit.constant is None else edit.constant) + vector.coefficient * direction
    return found


def writers_of(loaded: LoadedModel, home: HookPoint) -> list[Linear]:
    """The linear maps whose sum is what a sub-layer writes. Raises: MismatchError if there are none that are known."""
    block = loaded.family.block(loaded.model, home.layer)
    inside = dict(block.named_modules())
    prefix = next(name for name, module in loaded.model.named_modules() if module is block)
    known: Mapping[str, tuple[Writer, ...]] = loaded.family.writers
    found = [
        _linear(f"{prefix}.{writer.path}", inside[writer.path], writer)
        for writer in known.get(home.site, ())
        if writer.path in inside
    ]
    if not found:
        got = f"a norm behind it, or none that is known, in {loaded.id}"
        raise unbakeable(f"{home}", "a sub-layer whose linear maps write to the residual stream as they are", got)
    return found


def changed_by(edit: Edit, linears: list[Linear], home: HookPoint) -> list[tuple[Linear, Tensor | None]]:
    """The linear maps that an edit changes, and the constant that the bias of each gets.

    Raises: MismatchError for a constant where what each map writes is weighed by the token.
    """
    plain = next((linear for linear in linears if linear.is_plain), None)
    if edit.constant is not None and plain is None:
        raise unbakeable(f"{home}", "a linear map whose bias every token gets", "experts, weighed by the token")
    given = [(linear, edit.constant if linear is plain else None) for linear in linears]
    return [(linear, constant) for linear, constant in given if edit.ablations or constant is not None]


def unbakeable(where: object, expected: str, got: object) -> MismatchError:
    """The error for what weights cannot do exactly."""
    return MismatchError(where, expected=expected, got=got, fix="Steer with it while the model runs: saekit chat.")


def _linear(path: str, module: nn.Module, writer: Writer) -> Linear:
    if not isinstance(getattr(module, "weight", None), Tensor):
        axis = 2 if getattr(module, "is_transposed", False) else 1
        return Linear(path, module, "down_proj", "down_proj_bias", axis, writer.is_plain)
    is_transposed = type(module).__name__ == "Conv1D"  # of GPT-2: [in, out]
    return Linear(path, module, "weight", "bias", 1 if is_transposed else 0, writer.is_plain)


def _check(vector: SteeringVector) -> None:
    where = f"vector '{vector.name}'"
    if vector.gate is not None:
        raise unbakeable(where, "no gate: weights do not look at the token", "one")
    if vector.scope != "all":
        raise unbakeable(where, "the scope all: weights do not look at the token", vector.scope)
    if vector.operation not in ("add", "ablate"):
        raise unbakeable(where, "the operation add or ablate, which are affine", vector.operation)
    if vector.coefficient == 0:
        fix = "Calibrate it, or say coefficient=."
        raise MismatchError(where, expected="a coefficient other than 0", got="0", fix=fix)


def _home(vector: SteeringVector, loaded: LoadedModel) -> HookPoint:
    """The sub-layer that can do exactly what the vector does."""
    where, point = f"vector '{vector.name}'", HookPoint.parse(vector.hook_point)
    places = loaded.family.sites(loaded.model.config)
    point.check(loaded.n_layers, places)
    if vector.operation == "ablate" and point.site not in ("attn_out", "mlp_out"):
        expected = "an ablation at attn_out or mlp_out"
        got = f"{point}, which holds what all sub-layers before it wrote"
        raise unbakeable(where, expected, got)
    if places[point.site].streams:
        raise unbakeable(where, "a hook point with one residual stream", f"{point}, where there are several")
    last = HookPoint("resid_post", point.layer - 1) if point.site == "resid_pre" and point.layer else point
    if last.site not in HOMES:
        raise unbakeable(where, "a hook point behind a sub-layer", f"{point}, in front of which nothing has a bias")
    return HookPoint(HOMES[last.site], last.layer)

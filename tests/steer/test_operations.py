"""Operations: what they do to a token, next to the same worked out by hand in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from activations.errors import ConfigError, MismatchError, NumericsError, UnknownNameError
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from sae.torch_view import TorchSae
from steer.operations import (
    Ablate,
    Add,
    Clamp,
    ClampLatents,
    Intervention,
    Operation,
    Rotate,
    ScaleLatents,
    Slot,
    folded,
    schedule,
    vector_operation,
)
from steer.runtime import steering

D, POINT = 32, HookPoint("resid_post", 1)
N_TOKENS = 9


def unit(seed: int) -> Tensor:
    v = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def ids() -> Tensor:
    return torch.randint(3, 200, (2, N_TOKENS), generator=torch.Generator().manual_seed(1))


def values(loaded: LoadedModel, *interventions: Intervention, points=(POINT,), decode: bool = False) -> dict:
    """What is at the hook points: all tokens but the first, in one pass or a token at a time."""
    parts: list[dict] = []
    with torch.no_grad(), steering(loaded, interventions), capture(loaded.model, loaded.family, points) as captured:
        if not decode:
            run_until(loaded.model, {"input_ids": ids()})
            parts.append(dict(captured))
        else:
            cache = None
            for token in ids().split(1, dim=1):
                cache = loaded.model(token, past_key_values=cache, use_cache=True).past_key_values
                parts.append(dict(captured))
    return {point: torch.cat([part[point] for part in parts], dim=1)[:, 1:].double() for point in points}


def sae(kind: str, hook_point: str = "resid_post.1", n: int = 24) -> SaeArtefact:
    """Random, with biases that matter, and about half of the latents active."""
    rng = np.random.default_rng(3)
    W = rng.standard_normal((D, n)).astype(np.float32)
    transcodes = "->" in hook_point
    options: dict[str, Any] = {"k": 5} if kind == "topk" else {}
    if kind == "jumprelu":
        options["threshold"] = rng.uniform(-1, 3, n).astype(np.float32)
    return SaeArtefact(
        kind, W, rng.standard_normal(n).astype(np.float32), rng.standard_normal((n, D)).astype(np.float32) / 4,
        rng.standard_normal(D).astype(np.float32), transcodes=transcodes, apply_b_dec_to_input=not transcodes,
        metadata={"hook_point": hook_point}, **options,
    )  # fmt: skip


def project(h: Tensor, v: Tensor) -> Tensor:
    return (h @ v.double())[..., None] * v.double()


BY_HAND: dict[str, tuple[Operation, Callable[[Tensor], Tensor]]] = {
    "add": (Add(2 * unit(0), 3.0), lambda h: h + 6 * unit(0).double()),
    "subtract": (Add(unit(0), -3.0), lambda h: h - 3 * unit(0).double()),
    "ablate": (Ablate(3 * unit(0)), lambda h: h - project(h, unit(0))),
    "ablate a part": (Ablate(unit(0), 0.25), lambda h: h - 0.25 * project(h, unit(0))),
    "amplify": (Ablate(unit(0), -1.0), lambda h: h + project(h, unit(0))),
    "clamp to a value": (
        Clamp(5 * unit(0), 2.5, 2.5),
        lambda h: h - project(h, unit(0)) + 2.5 * unit(0).double(),
    ),
    "clamp into a range": (
        Clamp(unit(0), -0.2, 0.2),
        lambda h: h - project(h, unit(0)) + (h @ unit(0).double()).clamp(-0.2, 0.2)[..., None] * unit(0).double(),
    ),
    "clamp half the way from below": (
        Clamp(unit(0), low=1.0, strength=0.5),
        lambda h: h + 0.5 * (1 - h @ unit(0).double()).clamp(min=0)[..., None] * unit(0).double(),
    ),
    "rotate": (
        Rotate(unit(0), 4.0),
        lambda h: (h + 4 * unit(0).double()) * (h.norm(dim=-1) / (h + 4 * unit(0).double()).norm(dim=-1))[..., None],
    ),
}


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", BY_HAND)
def test_operations_are_what_they_are_by_hand(tiny: LoadedModel, name: str, decode: bool) -> None:
    operation, by_hand = BY_HAND[name]
    before = values(tiny)[POINT]
    after = values(tiny, Intervention(operation, POINT), decode=decode)[POINT]
    assert (before - by_hand(before)).abs().max() > 0.1
    torch.testing.assert_close(after, by_hand(before), atol=2e-5, rtol=1e-5)


def test_several_read_the_same_and_add_up_in_any_order(tiny: LoadedModel) -> None:
    h = values(tiny)[POINT]
    several = [
        Intervention(operation, POINT) for operation in (Add(unit(0), 3.0), Ablate(unit(1)), Clamp(unit(0), 1.0))
    ]
    expected = h + 3 * unit(0).double() - project(h, unit(1))
    expected = expected + (1 - h @ unit(0).double()).clamp(min=0)[..., None] * unit(0).double()
    for order in (several, several[::-1]):
        torch.testing.assert_close(values(tiny, *order)[POINT], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_ablation_leaves_nothing_along_any_of_its_directions(tiny: LoadedModel, n: int) -> None:
    directions = torch.stack([unit(0) + 0.5 * unit(seed) for seed in range(1, n + 1)])
    left = values(tiny, Intervention(Ablate(directions), POINT))[POINT] @ directions.double().T
    assert left.abs().max() < 1e-5


def test_directions_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(NumericsError, match="combination of the others"):
        Ablate(torch.stack([unit(0), unit(1), unit(0) - 2 * unit(1)])).slots()


@pytest.mark.parametrize("coefficient", [-2.0, 0.5, 7.0])
def test_what_is_added_is_linear_in_the_coefficient(tiny: LoadedModel, coefficient: float) -> None:
    base = values(tiny)[POINT]
    one, many = (values(tiny, Intervention(Add(unit(0), c), POINT))[POINT] - base for c in (1.0, coefficient))
    torch.testing.assert_close(many, coefficient * one, atol=1e-5, rtol=1e-4)


def test_a_value_inside_the_range_is_left_alone(tiny: LoadedModel) -> None:
    base = values(tiny)[POINT]
    s = base @ unit(0).double()
    middle = float(s.median())
    after = values(tiny, Intervention(Clamp(unit(0), high=middle), POINT))[POINT]
    inside = s < middle - 1e-4
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(after[inside], base[inside], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        after[~inside] @ unit(0).double(), torch.full_like(s[~inside], middle), atol=1e-5, rtol=0
    )


# --- latents ---------------------------------------------------------------------------------------------------------

TARGETS = {3: 4.0, 7: 0.0, 11: 1.5, 0: 2.0, 19: 0.5}
FACTORS = {3: 0.0, 7: 3.0, 11: 1.0, 0: -1.0, 19: 2.0, 20: 0.5}


def clamped(z: Tensor) -> Tensor:
    new = z.clone()
    for latent, target in TARGETS.items():
        new[..., latent] = target
    return new


def scaled(z: Tensor) -> Tensor:
    return z * torch.tensor([FACTORS.get(i, 1.0) for i in range(z.shape[-1])])


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("hook_point", ["resid_post.1", "resid_mid.1->mlp_out.1"])
def test_latents_change_and_the_error_stays(tiny: LoadedModel, kind: str, hook_point: str, decode: bool) -> None:
    """h' - h is decode(z') - decode(z), with every latent of the SAE worked out."""
    artefact = sae(kind, hook_point)
    reads, writes = (HookPoint.parse(name) for name in (hook_point.split("->") * 2)[:2])
    before = values(tiny, points=(reads, writes))
    view = TorchSae(artefact)
    z = view.encode(before[reads].float())
    assert 0.05 < (z > 0).float().mean() < 0.9
    for operation, new in (
        (ClampLatents(artefact, TARGETS), clamped(z)),
        (ClampLatents(artefact, TARGETS, 0.5), (z + clamped(z)) / 2),
        (ClampLatents(artefact, {3: 4.0}), torch.where(torch.arange(24) == 3, 4.0, z)),
        (ScaleLatents(artefact, FACTORS), scaled(z)),
    ):
        after = values(tiny, Intervention(operation), points=(writes,), decode=decode)[writes]
        expected = before[writes] + (view.decode(new) - view.decode(z)).double()
        torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


def test_latents_that_are_left_as_they_are_change_nothing(tiny: LoadedModel) -> None:
    artefact = sae("topk")
    off = [i for i in range(24) if float(TorchSae(artefact).encode(values(tiny)[POINT].float())[..., i].max()) == 0]
    assert off
    for operation in (
        ScaleLatents(artefact, {3: 1.0}),
        ScaleLatents(artefact, {off[0]: 5.0}),
        ClampLatents(artefact, {}),
    ):
        assert torch.equal(values(tiny, Intervention(operation))[POINT], values(tiny)[POINT])


def test_what_an_sae_cannot_do_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="0 to 23"):
        ClampLatents(sae("topk"), {24: 1.0}).slots()
    with pytest.raises(MismatchError, match=r"resid_post\.1"):
        _ = Intervention(ClampLatents(sae("topk"), {1: 1.0}), HookPoint("resid_post", 2)).acts_at
    both = replace(sae("topk"), metadata={"hook_point": "resid_post.1+resid_post.2"})
    with pytest.raises(MismatchError, match="one hook point"):
        _ = Intervention(ClampLatents(both, {1: 1.0})).acts_at


# --- doses, schedules, folding ---------------------------------------------------------------------------------------


def test_how_far_operations_reach() -> None:
    assert Add(3 * unit(0), -2.0).reach == pytest.approx(6)
    assert Rotate(unit(0), 2.0).reach == pytest.approx(2)
    assert [Clamp(unit(0), *bounds).reach for bounds in ((4.0, 4.0), (-5.0, -5.0), (-3.0, 3.0), (-math.inf, 2.0))] == [
        4, 5, 0, 0,
    ]  # fmt: skip
    artefact = sae("standard")
    expected = np.linalg.norm(2 * artefact.W_dec[3] - artefact.W_dec[5])
    assert ClampLatents(artefact, {3: 2.0, 5: -1.0}).reach == pytest.approx(expected, rel=1e-5)
    assert Ablate(unit(0)).reach == ScaleLatents(artefact, {3: 2.0}).reach == 0


@given(st.floats(-3, 3))
def test_scaled_operations_add_or_take_so_many_times_as_much(factor: float) -> None:
    artefact = sae("standard")
    h = torch.linspace(-2, 2, D).double()
    for operation in (
        Add(unit(0), 2.0),
        Ablate(unit(0)),
        Clamp(unit(0), 3.0),
        ScaleLatents(artefact, {3: 2.0, 4: 0.0}),
    ):
        one, many = (sum(change(slot, h) for slot in each.slots()) for each in (operation, operation.scaled(factor)))
        torch.testing.assert_close(many, factor * torch.as_tensor(one), atol=1e-6, rtol=1e-6)


def change(slot: Slot, h: Tensor) -> Tensor:
    """The formula of the module, for one token."""
    z = 0.0
    if slot.reads is not None:
        s = float(slot.reads.double() @ h) + slot.bias
        z = s if s > slot.threshold else 0.0
    wanted = min(max(slot.gain * z, slot.low), slot.high)
    return (slot.constant + slot.strength * (wanted - z)) * slot.writes.double()


def test_a_schedule_scales_and_moves(tiny: LoadedModel) -> None:
    found = schedule(Intervention(Ablate(unit(0)), POINT), {0: 0.5, 3: 1.0})
    assert [(each.hook_point, each.operation.strength) for each in found] == [  # type: ignore[attr-defined]
        (HookPoint("resid_post", 0), 0.5),
        (HookPoint("resid_post", 3), 1.0),
    ]


def test_what_only_adds_is_one_slot_and_what_does_nothing_is_none() -> None:
    slots = [
        *Add(unit(0), 2.0).slots(),
        *Ablate(unit(2)).slots(),
        *Add(unit(1), -1.0).slots(),
        *Add(unit(3), 0.0).slots(),
    ]
    total, ablation = folded(slots)
    torch.testing.assert_close(total.constant * total.writes, 2 * unit(0) - unit(1))
    assert ablation.reads is not None
    assert folded([*Add(unit(0), 0.0).slots(), *Ablate(unit(0), 0.0).slots()]) == []


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="low <= high"):
        Clamp(unit(0), 2.0, 1.0).slots()
    with pytest.raises(NumericsError, match="length above 0"):
        Ablate(torch.zeros(D)).slots()


def test_unknown_operations_of_vectors_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="add, rotate, ablate"):
        vector_operation("push")

"""Budgets: the joint dose of a sequence is bounded whatever scopes and gates do; what is within it is left alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from activations.errors import ConfigError, NumericsError, ShapeError
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from steer.composition import within_budget
from steer.gates import Gate, probe
from steer.generate import generate
from steer.operations import Ablate, Add, Clamp, Intervention, Rotate
from steer.runtime import steering
from steer.scopes import Scope
from steer.vectors import SteeringVector

POINT, OTHER = HookPoint("resid_post", 1), HookPoint("resid_post", 2)
E, NORM = torch.eye(32), 4.0
TEXT = "The river ran past the mill and on to the sea."


def add(axis: int, dose: float, point: HookPoint = POINT, **changes: Any) -> Intervention:
    """So many mean norms along one of the model's 32 dimensions."""
    return replace(Intervention(Add(E[axis], dose * NORM), point, mean_norm=NORM), **changes)


def change(loaded: LoadedModel, *interventions: Intervention, point: HookPoint = POINT, **limits: Any) -> Tensor:
    """What is added at a hook point in mean norms, token by token but the first."""
    x = torch.tensor([loaded.tokenizer(TEXT)["input_ids"]])
    found = []
    for some in ((), interventions):
        with steering(loaded, some, **limits), capture(loaded.model, loaded.family, [point]) as captured:
            run_until(loaded.model, {"input_ids": x})
        found.append(captured[point][0, 1:])
    return (found[1] - found[0]) / NORM


def test_the_joint_dose_is_scaled_down_to_the_budget_in_proportion(tiny: LoadedModel) -> None:
    moved = change(tiny, add(0, 0.6), add(1, -0.8), budget=0.5)
    torch.testing.assert_close(moved, (0.3 * E[0] - 0.4 * E[1]).expand_as(moved), atol=2e-6, rtol=0)


def test_what_cancels_out_takes_nothing_of_the_budget(tiny: LoadedModel) -> None:
    moved = change(tiny, add(0, 1.5), add(0, -1.2), budget=0.5)
    torch.testing.assert_close(moved, (0.3 * E[0]).expand_as(moved), atol=2e-6, rtol=0)


def test_within_the_budget_every_bit_is_as_without(tiny: LoadedModel) -> None:
    some = [add(0, 0.3), add(1, 0.4), add(2, 0.4, OTHER), Intervention(Ablate(E[3]), POINT)]
    for budget in (0.501, 100.0):
        assert torch.equal(change(tiny, *some, budget=budget), change(tiny, *some))
    assert not torch.equal(change(tiny, *some, budget=0.499), change(tiny, *some))


def test_a_dose_that_is_the_budget_is_left_alone(tiny: LoadedModel) -> None:
    drawn = torch.nn.functional.normalize(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    for u in drawn:
        whole = Intervention(Add(u, 0.3 * NORM), POINT, mean_norm=NORM)
        with steering(tiny, [whole], budget=0.3) as steered:
            assert steered.scales() == [{}], "which lengths of float32 miss by 1e-8"


def test_each_row_has_its_own_budget_and_does_not_see_the_others(tiny: LoadedModel) -> None:
    rows = [[add(1, 0.1)], [add(1, 1.9)], [add(1, 1.9)], []]
    x = torch.tensor([tiny.tokenizer(TEXT)["input_ids"]]).expand(4, -1)
    logits, scales = {}, {}
    for name, budget in {"none": None, "one": 0.5, "each": [None, 0.5, 1.0, 0.01]}.items():
        with torch.no_grad(), steering(tiny, [add(0, 0.2)], rows=rows, budget=budget) as steered:
            logits[name], scales[name] = tiny.model(x).logits, [row.get(POINT, 1.0) for row in steered.scales()]
    length = (0.2**2 + 1.9**2) ** 0.5
    assert scales["none"] == [1.0] * 4
    assert scales["one"] == pytest.approx([1.0, 0.5 / length, 0.5 / length, 1.0])
    assert scales["each"] == pytest.approx([1.0, 0.5 / length, 1.0 / length, 0.05])
    assert torch.equal(logits["one"][[0, 3]], logits["none"][[0, 3]])
    assert torch.equal(logits["each"][:2], logits["one"][:2])
    for row in (2, 3):
        assert not torch.equal(logits["each"][row], logits["one"][row])


def test_hook_points_have_a_budget_each(tiny: LoadedModel) -> None:
    some = [add(0, 1.0), add(0, 0.4, OTHER, mean_norm=2 * NORM)]
    with steering(tiny, some, budget=0.25) as steered:
        assert steered.scales() == [{POINT: pytest.approx(0.25)}]
    with steering(tiny, some, budget=0.1) as steered:
        assert steered.scales() == [{POINT: pytest.approx(0.1), OTHER: pytest.approx(0.5)}]
    with steering(tiny, some, budget=1.0) as steered:
        assert steered.scales() == [{}]


def test_scopes_and_gates_are_taken_to_let_the_worst_through(tiny: LoadedModel) -> None:
    """Opposite pushes on different tokens do not save each other; nor do they add up to what they never are."""
    gate = Gate(probe(E[5], 0.0, "resid_post.0"), 0.0)
    for other in ({"scope": Scope.parse("after:5")}, {"gate": gate}):
        with steering(tiny, [add(0, 1.0), add(0, -0.6, **other)], budget=0.5) as steered:
            assert steered.scales() == [{POINT: pytest.approx(0.5)}]
        with steering(tiny, [add(0, 0.6), add(1, 0.8, **other)], budget=0.5) as steered:
            assert steered.scales() == [{POINT: pytest.approx(0.5)}]
    same = {"scope": Scope.parse("after:5"), "gate": gate}
    with steering(tiny, [add(0, 1.0, **same), add(0, -0.6, **same)], budget=0.5) as steered:
        assert steered.scales() == [{}], "what always acts together is summed first: 0.4"


def test_no_token_gets_more_than_the_budget_whatever_acts_on_it(tiny: LoadedModel) -> None:
    scopes = ["all", "after:2", "before:6", "after:4"]
    some = [add(i % 3, (-1) ** i * (0.5 + 0.2 * i), scope=Scope.parse(s)) for i, s in enumerate(scopes)]
    some.append(add(1, 0.7, gate=Gate(probe(E[5], 0.0, "resid_post.0"), 0.0)))
    assert float(change(tiny, *some).norm(dim=1).max()) > 0.8
    assert float(change(tiny, *some, budget=0.8).norm(dim=1).max()) <= 0.8 + 1e-5


def test_rotating_counts_and_ablating_does_not(tiny: LoadedModel) -> None:
    some = [Intervention(Rotate(E[0], NORM), POINT, mean_norm=NORM), add(0, 1.0), Intervention(Ablate(E[1]), POINT)]
    with steering(tiny, some, budget=0.5) as steered:
        assert steered.scales() == [{POINT: pytest.approx(0.25)}]
    with steering(tiny, some[2:], budget=0.01) as steered:
        assert steered.scales() == [{}]


def test_targets_are_counted_and_never_scaled(tiny: LoadedModel) -> None:
    clamp = Intervention(Clamp(E[1], 0.3 * NORM, 0.3 * NORM), POINT, mean_norm=NORM, name="clamp to 0.3")
    with steering(tiny, [clamp, add(0, 1.0)], budget=0.5) as steered:
        assert steered.scales() == [{POINT: pytest.approx(0.2)}]
    x = torch.tensor([tiny.tokenizer(TEXT)["input_ids"]])
    with (
        steering(tiny, [clamp, add(0, 1.0)], budget=0.5),
        capture(tiny.model, tiny.family, [POINT]) as captured,
    ):
        run_until(tiny.model, {"input_ids": x})
    torch.testing.assert_close(captured[POINT][0, 1:, 1], torch.full((x.shape[1] - 1,), 0.3 * NORM))
    with pytest.raises(ConfigError, match=r"clamp to 0.3 at resid_post.1: expected targets within the budget of 0.2"):
        change(tiny, clamp, add(0, 1.0), budget=0.2)


def test_changes_between_tokens_stay_within_the_budget(tiny: LoadedModel) -> None:
    with steering(tiny, [add(0, 0.1)], budget=0.5) as steered:
        steered.set([add(0, 2.0)])
        assert steered.scales() == [{POINT: pytest.approx(0.25)}]
        steered.set([add(0, 0.5)])
        assert steered.scales() == [{}]


def test_a_budget_is_no_leave_to_go_beyond_the_cap_and_force_is_none_to_go_beyond_a_budget(tiny: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="dose of at most 2"):
        change(tiny, add(0, 3.0), budget=2.5)
    assert float(change(tiny, add(0, 3.0), budget=2.0).norm(dim=1).max()) == pytest.approx(2.0, rel=1e-4)
    assert float(change(tiny, add(0, 9.0), budget=2.5, force=True).norm(dim=1).max()) == pytest.approx(2.5, rel=1e-4)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_a_number_above_zero(tiny: LoadedModel, budget: float) -> None:
    with pytest.raises(ConfigError, match="steering: budget: expected a number above 0"):
        change(tiny, add(0, 1.0), budget=budget)


def test_what_a_budget_cannot_be_measured_in_or_given_to_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"Add at resid_post.1: expected mean ‖h‖"):
        change(tiny, add(0, 1.0, mean_norm=None), budget=1.0)
    with pytest.raises(ShapeError, match="steering: budget: expected 1, got 2"):
        change(tiny, add(0, 1.0), budget=[1.0, 1.0])
    with pytest.raises(ShapeError, match="steering: budget: expected 2, got 3"):
        change(tiny, rows=[[], []], budget=[1.0, 1.0, 1.0])
    with pytest.raises(NumericsError, match="finite"):
        change(tiny, add(0, float("nan")), budget=1.0)


def test_text_is_written_within_a_budget(tiny: LoadedModel, vector: SteeringVector) -> None:
    """As with vectors that `within_budget` scaled beforehand."""
    two = [replace(vector, coefficient=5.0), replace(vector, name="b", direction=-E[0].numpy(), coefficient=3.0)]
    rows = [[], [Intervention.of(each) for each in two]]
    scaled = [[], [Intervention.of(each) for each in within_budget(two, 0.7)]]
    limits: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    got = generate(tiny, [TEXT] * 2, rows=rows, budget=0.7, **limits)
    assert got == generate(tiny, [TEXT] * 2, rows=scaled, **limits)
    assert got != generate(tiny, [TEXT] * 2, rows=rows, **limits)
    assert got[0] == generate(tiny, [TEXT], **limits)[0]

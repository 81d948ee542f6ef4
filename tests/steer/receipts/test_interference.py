"""Interference: planted axes that push one token each, so what a stack keeps is known, and limits by hand."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.errors import ConfigError, UnknownNameError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer import cli
from steer.composition import joint_doses
from steer.generate import generate_conditions
from steer.library import save_library
from steer.measures.effect import Concept, kl_of, kl_per_token
from steer.operations import Intervention
from steer.receipts import interference as module
from steer.receipts.config import InterferenceConfig
from steer.receipts.interference import CONTROL, Bounds, interference, limit_of, stack_axes, verdict
from steer.vectors import SteeringVector

PROMPTS = ["The river ran", "A cat sat on the", "Numbers such as 12", "In the town"]
TOKENS = (40, 41, 42)
BOUNDS = Bounds(0.5, 3.0, 1.0, 0.1)
EMBEDDING = HookPoint("resid_pre", 0)


def config(**changes: Any) -> InterferenceConfig:
    return InterferenceConfig(**{"prompts": 4, "max_new_tokens": 6, "orders": 2, "budget": 3.0} | changes)


@pytest.fixture(scope="module")
def planted(tiny: LoadedModel) -> tuple[list[SteeringVector], list[Concept]]:
    """Vectors that make the last block ask for one token each, and concepts that count that token."""
    embedding = tiny.model.get_input_embeddings().weight.detach()
    rows = tiny.model.get_output_embeddings().weight.detach()
    vectors, concepts = [], []
    for token in TOKENS:
        unit = (rows[token] / rows[token].norm()).numpy()
        coefficient = float(400 / rows[list(TOKENS)].norm(dim=1).mean())
        vectors.append(SteeringVector(f"t{token}", unit, "resid_post.3", tiny.ref, coefficient / 2, {}, coefficient))
        own = embedding[token]
        # a model in bfloat16 has it rounded
        concepts.append(Concept(EMBEDDING, lambda x, own=own: (x.float() - own).norm(dim=-1) < 0.01 * own.norm()))
    return vectors, concepts


@pytest.fixture(scope="module")
def result(tiny: LoadedModel, planted: Any) -> dict[str, Any]:
    return stack_axes(tiny, *planted, PROMPTS, config())


def test_planted_axes_do_alone_what_they_were_planted_for(result: Any) -> None:
    assert result["left_out"] == []
    for row in result["vectors"].values():
        assert row["effect_alone"] > 0.9
        assert row["effect_alone_low"] <= row["effect_alone"] <= row["effect_alone_high"]
        assert row["kl_alone"] > 1
        assert row["dose"] == pytest.approx(2.0)


def test_tokens_are_shared_among_stacked_axes_and_taken_from_no_other(result: Any) -> None:
    """Each token of a text is one axis's or another's, so k axes keep 1/k of their effects on average."""
    curve = result["arms"]["as_is"]["curve"]
    assert list(curve) == ["0", "1", "2", "3"]
    for k in (1, 2, 3):
        assert curve[str(k)]["retention"] == pytest.approx(1 / k, abs=0.06)
        assert curve[str(k)]["retention_low"] <= curve[str(k)]["retention"] <= curve[str(k)]["retention_high"]
    assert [row["crosstalk"] for row in curve.values()] == [pytest.approx(0, abs=0.05)] * 3 + [None]
    assert curve["0"] | {"crosstalk": 0} == {
        "n_orders": 1, "joint_dose": 0, "retention": None, "retention_low": None, "retention_high": None,
        "crosstalk": 0, "kl": 0, "nll_rise": pytest.approx(0, abs=0.5), "repetition_rise": pytest.approx(0, abs=0.2),
    }  # fmt: skip
    each = result["arms"]["as_is"]["axes"]
    assert np.mean([by_k["3"] for by_k in each.values()]) == pytest.approx(curve["3"]["retention"])


def test_company_is_random_and_as_long_as_the_axes_it_stands_for(planted: Any) -> None:
    vectors, _ = planted
    axes = [replace(v, coefficient=c, hook_point=p) for v, c, p in zip(vectors, (1.0, -2.0, 3.0), "abc", strict=True)]
    orders = module._orders(3, 2, 0)
    stacks = [stack for stack in module._stacks(axes, orders, config()) if stack.arm == CONTROL]
    assert [(stack.order, stack.k) for stack in stacks] == [(o, k) for o in (0, 1) for k in (1, 2, 3)]
    for stack in stacks:
        order = orders[stack.order]
        assert stack.axes == (order[0],)
        assert stack.vectors[0] is axes[order[0]]
        for stranger, i in zip(stack.vectors[1:], order[1:], strict=False):
            assert (stranger.coefficient, stranger.hook_point) == (axes[i].coefficient, axes[i].hook_point)
            assert np.linalg.norm(stranger.direction) == pytest.approx(1, rel=1e-6)
            assert abs(stranger.direction @ axes[i].direction) < 0.7
    one, other = stacks[2].vectors, stacks[5].vectors
    assert np.array_equal(stacks[1].vectors[1].direction, one[1].direction), "it stays as the stack grows"
    assert not np.array_equal(one[1].direction, other[1].direction), "each order has its own"


def test_kl_is_that_of_the_stack_over_the_unsteered_texts(tiny: LoadedModel, planted: Any, result: Any) -> None:
    vectors, _ = planted
    plain = [example["texts"][0]["text"] for example in result["examples"]]
    texts = generate_conditions(tiny, [[], *[[Intervention.of(v)] for v in vectors]], PROMPTS, max_new_tokens=6, seed=0)
    assert texts[0][:2] == plain
    stack = [Intervention.of(vector) for vector in vectors]
    expected = kl_of(tiny, [stack], PROMPTS, texts[0])
    assert [result["arms"]["as_is"]["curve"]["3"]["kl"]] == pytest.approx(expected, rel=1e-4)
    alone = [kl_per_token(tiny, vector, vector.coefficient, PROMPTS, texts[0]) for vector in vectors]
    assert [row["kl_alone"] for row in result["vectors"].values()] == pytest.approx(alone, rel=1e-4)


def test_a_budget_holds_in_its_arm_and_right_angles_in_theirs(tiny: LoadedModel, planted: Any, result: Any) -> None:
    budgeted = result["arms"]["within_budget"]["curve"]
    assert all(row["joint_dose"] <= 3.0 + 1e-6 for row in budgeted.values())
    assert budgeted["1"] == result["arms"]["as_is"]["curve"]["1"], "below the budget it is the same stack"
    right = result["arms"]["orthogonalised"]["curve"]
    for k in (1, 2, 3):
        assert right[str(k)]["joint_dose"] == pytest.approx(2 * np.sqrt(k), rel=1e-4)
    assert set(result["orthogonalised_cosines"]) == {vector.name for vector in planted[0]}
    assert result["composition"]["points"]["resid_post.3"]["joint_dose"] == pytest.approx(
        joint_doses(planted[0])["resid_post.3"]
    )


def test_a_stack_that_comes_up_again_is_measured_once(
    tiny: LoadedModel, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(loaded: Any, conditions: Any, prompts: Any, **limits: Any) -> Any:
        seen.extend(conditions)
        return generate_conditions(loaded, conditions, prompts, **limits)

    monkeypatch.setattr(module, "generate_conditions", spy)
    found = stack_axes(tiny, *planted, PROMPTS, config(arms=("as_is",), orders=6, max_new_tokens=2, batch=9))
    # the empty stack and 3 alone; again those, the pairs, the three; 6 orders of 2 sizes in random company
    n_pairs = len({frozenset(order[:2]) for order in found["orders"]})
    assert n_pairs < 6
    assert (len(seen) - 4, found["n_stacks"]) == (1 + 3 + n_pairs + 1 + 12,) * 2
    assert {order[0] for order in found["orders"]} == {"t40", "t41", "t42"}, "they take turns in coming first"


def test_everything_is_a_function_of_the_seed_and_json(tiny: LoadedModel, planted: Any, result: Any) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert stack_axes(tiny, *planted, PROMPTS, config()) == result
    assert stack_axes(tiny, *planted, PROMPTS, config(seed=1))["arms"] != result["arms"]


def test_axes_that_do_nothing_alone_are_left_out(tiny: LoadedModel, planted: Any) -> None:
    vectors, concepts = planted
    idle = replace(vectors[2], coefficient=1e-3)
    found = stack_axes(tiny, [*vectors[:2], idle], concepts, PROMPTS, config(arms=("as_is",), max_new_tokens=3))
    assert found["left_out"] == ["t42"]
    assert set(found["arms"]["as_is"]["axes"]) == {"t40", "t41"}
    assert list(found["arms"]["as_is"]["curve"]) == ["0", "1", "2"]
    with pytest.raises(ConfigError, match=r"two or more whose effect alone can be told from none, got t40 \+1"):
        stack_axes(tiny, [vectors[0], idle], [concepts[0], concepts[2]], PROMPTS, config(max_new_tokens=3))


def test_concepts_are_read_at_their_own_hook_points(tiny: LoadedModel, planted: Any) -> None:
    """The second concept asks the same of the last block's output, where it is never so."""
    vectors, concepts = planted
    elsewhere = [concepts[0], Concept(HookPoint("resid_post", 3), concepts[1].shows), concepts[2]]
    found = stack_axes(tiny, vectors, elsewhere, PROMPTS, config(arms=("as_is",), orders=1, max_new_tokens=3))
    assert found["left_out"] == ["t41"]
    assert found["vectors"]["t41"]["effect_alone"] == 0


# --- limits ----------------------------------------------------------------------------------------------------------


def rows(*retention: float, kl: float = 1.0, nll: float = 0.5, again: float = 0.0) -> list[dict[str, float]]:
    """Figures of one k, an order each."""
    return [{"retention": float(r), "kl": kl, "nll_rise": nll, "repetition_rise": again} for r in retention]


def test_the_limit_is_the_last_k_before_the_first_that_breaks_a_bound() -> None:
    found = limit_of({1: rows(1, 1), 2: rows(0.6, 0.6), 3: rows(0.4, 0.4), 4: rows(0.9, 0.9)}, BOUNDS, 0)
    assert found == {"k": 2, "ci95": [2, 2], "stopped_by": ["retention"]}
    assert verdict("as_is", found, 4) == "as_is: 2; 3 are too many for retention"
    for key, value in {"kl": 3.1, "nll": 1.1, "again": 0.11}.items():
        found = limit_of({1: rows(1), 2: rows(1, **{key: value})}, BOUNDS, 0)
        assert found["k"] == 1
        assert found["stopped_by"] == [{"kl": "kl", "nll": "nll_rise", "again": "repetition_rise"}[key]]
    assert limit_of({1: rows(0.4, 0.4)}, BOUNDS, 0)["k"] == 0
    assert limit_of({1: rows(1), 2: rows(0.5, kl=3.0, nll=1.0, again=0.1)}, BOUNDS, 0)["k"] == 2, "on a bound is within"


def test_a_library_that_is_too_small_is_said_to_be() -> None:
    found = limit_of({1: rows(1), 2: rows(0.8)}, BOUNDS, 0)
    assert found == {"k": 2, "ci95": [2, 2], "stopped_by": []}
    assert verdict("as_is", found, 2) == "as_is: 2 or more; the 2 axes of this library are too few to reach the limit"
    assert verdict("as_is", found, 5) == "as_is: 2 or more; max_k was reached"


def test_the_limits_interval_is_over_orders() -> None:
    spread: Mapping[int, Any] = {1: rows(1, 1, 1, 1), 2: rows(1, 1, 0.3, 0.3), 3: rows(1, 0.2, 0.2, 0.2)}
    found = limit_of(spread, BOUNDS, 0)
    assert (found["k"], found["ci95"]) == (2, [1, 3])
    assert "2 (1 to 3 over orders); 3 are too many for retention" in verdict("as_is", found, 3)
    assert limit_of(spread, BOUNDS, 0) == found


# --- from a library --------------------------------------------------------------------------------------------------


def write(folder: Path, vectors: list[SteeringVector]) -> Path:
    save_library(folder / "library", vectors)
    return folder / "library"


def test_names_and_kinds_that_cannot_be_stacked_are_refused(tiny: LoadedModel, planted: Any, tmp_path: Path) -> None:
    vectors, _ = planted
    library = write(tmp_path, [replace(v, source={"kind": "contrast", "midpoint": 0.0}) for v in vectors])
    with pytest.raises(UnknownNameError, match="vector 'nobody': expected one of t40, t41, t42"):
        interference(config(library=library, vectors=("t40", "nobody")), tiny)
    with pytest.raises(ConfigError, match="two vectors or more, to stack, got 1"):
        interference(config(library=library, vectors=("t40", "t40")), tiny)
    odd = write(tmp_path / "odd", [replace(v, source={"kind": "learned"}) for v in vectors])
    with pytest.raises(ConfigError, match=r"vector 't40'.*the kind 'learned'"):
        interference(config(library=odd), tiny)


def test_the_page_and_the_figures_are_written(
    tiny: LoadedModel, planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, concepts = planted
    evil = "<script>alert(1)</script>"
    library = write(tmp_path, [replace(vectors[0], name=evil), *vectors[1:]])
    known = dict(zip([evil, *(v.name for v in vectors[1:])], concepts, strict=True))
    monkeypatch.setattr(module, "concept_of", lambda vector, sae: known[vector.name])
    settings = config(library=library, out=tmp_path / "out", orders=1, max_new_tokens=3)
    lines: list[str] = []
    found = interference(settings, tiny, on_status=lines.append)
    assert json.loads((tmp_path / "out" / "interference.json").read_text()) == found
    assert InterferenceConfig.load(tmp_path / "out" / "config.yaml") == settings
    page = (tmp_path / "out" / "interference.html").read_text()
    assert evil not in page
    assert page.count("<svg") == 1 + 1 + 4, "curves, cosines, and the axes of each arm"
    for text in (*found["verdicts"].values(), "random company", found["examples"][0]["prompt"]):
        assert text in page
    assert any("different stacks" in line for line in lines)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_verb_measures_a_library_and_prints_tables(
    tiny: LoadedModel, tiny_llama: Path, planted: Any, tmp_path: Path, capsys: Any, monkeypatch: Any, as_json: bool
) -> None:
    vectors, concepts = planted
    known = dict(zip([vector.name for vector in vectors], concepts, strict=True))
    monkeypatch.setattr(module, "concept_of", lambda vector, sae: known[vector.name])
    library, out = write(tmp_path, vectors[:2]), tmp_path / "out"
    pairs = {"model": tiny_llama, "library": library, "out": out, "prompts": 3, "max_new_tokens": 4, "orders": 1}
    sets = [part for key, value in pairs.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.setattr("sys.argv", ["saekit", "vector", "interference", *sets, *(["--json"] if as_json else [])])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert stopped.value.code in (0, None), said.err
    if as_json:
        found = json.loads(said.out)
        assert {key: found[key] for key in found if key != "out"} == json.loads((out / "interference.json").read_text())
    else:
        for word in ("interference.html", "as_is:", "t40", "retention_low", "2 axes", "random_company"):
            assert word in said.out

"""Calibration: the window is what the trials say, and nothing that is reported was chosen on."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError, MismatchError, TextError
from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from sae.torch_view import TorchSae
from steer.library import load_library, save_library
from steer.measures.concepts import concept_of
from steer.measures.effect import Arm, Bounds, Concept, DoseTrial, sweep_doses, try_arms
from steer.operations import Intervention
from steer.receipts import calibrate
from steer.receipts.calibrate import calibrate_vector, edges, find_window, halves_of, search, works
from steer.receipts.config import CalibrateConfig
from steer.runtime import steering
from steer.vectors import SteeringVector

BOUNDS = Bounds(1.0, 0.1, 0.5)
PLAIN = DoseTrial(0, 0, 0.1, 0, 0, 0, 2, 0, 0.05, 0, 0)
SMALL: dict[str, Any] = {"doses": (0.5, 1.0, 2.0), "n_prompts": 10, "max_new_tokens": 8, "refine": 1}
WIDE: dict[str, Any] = {"max_nll_rise": 99, "max_repetition_rise": 9, "max_kl": 99}


def trial(dose: float, effect: float, *, low: float | None = None, nll: float = 0.0, kl: float = 0.0) -> DoseTrial:
    low = effect - 0.05 if low is None else low
    return DoseTrial(dose, 10 * dose, 0.1 + effect, effect, low, effect + 0.05, 2 + nll, nll, 0.05, 0.0, kl)


def doses(trials: Any) -> list[float]:
    return [each.dose for each in trials]


def test_the_window_is_the_run_of_working_doses_around_the_best() -> None:
    trials = [PLAIN, trial(0.1, 0.01), trial(0.2, 0.2), trial(0.3, 0.5), trial(0.4, 0.4), trial(0.5, 0.9, nll=2)]
    found = find_window(trials, BOUNDS)
    assert found is not None
    assert doses(found) == [0.2, 0.3, 0.4]


def test_nothing_beyond_the_first_dose_that_does_harm_is_believed() -> None:
    trials = [PLAIN, trial(0.1, 0.2), trial(0.2, 0.3, kl=0.6), trial(0.3, 0.9)]
    found = find_window(trials, BOUNDS)
    assert found is not None
    assert doses(found) == [0.1, 0.1, 0.1]


def test_a_dose_without_effect_ends_the_window() -> None:
    trials = [PLAIN, trial(0.1, 0.2), trial(0.2, 0.0), trial(0.3, 0.9), trial(0.4, 0.8)]
    found = find_window(trials, BOUNDS)
    assert found is not None
    assert doses(found) == [0.3, 0.3, 0.4]


@pytest.mark.parametrize("bad", [trial(0.1, 0.3, low=0.0), trial(0.1, 0.3, nll=1.1), trial(0.1, 0.3, kl=0.51)])
def test_no_window_where_nothing_works(bad: DoseTrial) -> None:
    assert find_window([PLAIN, bad], BOUNDS) is None


@st.composite
def made_up(draw: Any) -> list[DoseTrial]:
    n = draw(st.integers(1, 8))
    rows = st.tuples(st.floats(-0.2, 1), st.floats(-0.5, 2), st.floats(0, 1))
    return [PLAIN, *(trial(0.1 * (i + 1), e, nll=n, kl=k) for i, (e, n, k) in enumerate(draw(st.tuples(*[rows] * n))))]


@given(made_up(), st.floats(0, 1), st.floats(0, 1))
def test_what_holds_of_every_window(trials: list[DoseTrial], more_nll: float, more_kl: float) -> None:
    found = find_window(trials, BOUNDS)
    wide = BOUNDS._replace(max_nll_rise=1 + more_nll, max_kl=0.5 + more_kl)
    wider = find_window(trials, wide)
    if found is None:
        assert not any(works(each, BOUNDS) for each in trials[1:2]), "the first dose can be chosen if it works"
        return
    assert found.low.dose <= found.chosen.dose <= found.high.dose
    inside = [each for each in trials[1:] if found.low.dose <= each.dose <= found.high.dose]
    assert all(works(each, BOUNDS) for each in inside)
    assert found.chosen.effect == max(each.effect for each in inside)
    assert all(BOUNDS.allow(each) for each in trials[1:] if each.dose <= found.high.dose)
    assert wider is not None
    assert wider.chosen.effect >= found.chosen.effect, "wider bounds never lose effect"


def law(low: float, high: float) -> Any:
    """A sweep in which exactly the doses from low to high work, and more does more."""
    tried = []

    def sweep(wanted: Any) -> list[DoseTrial]:
        tried.append(list(wanted))
        return [PLAIN, *(trial(d, d, low=d - low, nll=2.0 * (d > high)) for d in wanted)]

    return sweep, tried


def test_refining_closes_in_on_both_ends() -> None:
    sweep, tried = law(0.17, 0.63)
    grid = [0.1, 0.2, 0.4, 0.8]
    rough, fine = (search(sweep, grid, BOUNDS, n) for n in (0, 6))
    assert rough.window is not None
    assert fine.window is not None
    assert (rough.window.low.dose, rough.window.high.dose) == (0.2, 0.4)
    assert (fine.window.low.dose, fine.window.high.dose) == (
        pytest.approx(0.17, rel=0.02),
        pytest.approx(0.63, rel=0.02),
    )
    assert fine.window.low.dose >= 0.17
    assert fine.window.high.dose <= 0.63
    assert fine.window.chosen is fine.window.high
    assert tried[2] == [pytest.approx(math.sqrt(0.02)), pytest.approx(math.sqrt(0.32))]
    assert doses(fine.trials) == sorted(doses(fine.trials))


def test_an_end_of_the_grid_is_not_refined() -> None:
    sweep, tried = law(0.0, 9.0)
    found = search(sweep, [0.1, 0.2], BOUNDS, 3)
    assert found.window is not None
    assert (edges(found.trials, found.window), len(tried)) == ([], 1)


@pytest.fixture
def library(tmp_path: Path, pushing: SteeringVector, letters: Concept, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(calibrate, "concept_of", lambda *_: letters)
    save_library(tmp_path, [replace(pushing, receipts=[{"effect": 0.1}])])
    return tmp_path


def config(library: Path, **changes: Any) -> CalibrateConfig:
    return CalibrateConfig(library=library, **(SMALL | WIDE | changes))


def test_the_dose_is_picked_on_one_half_and_reported_on_the_other(
    library: Path, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up trials that depend on the prompts: a half that leaks into the other changes what comes out."""
    seen: list[tuple[list[str], list[float]]] = []
    halves = halves_of(config(library))

    def fake(loaded: Any, vector: Any, concept: Any, prompts: Any, tried: Any, **limits: Any) -> list[DoseTrial]:
        seen.append((list(prompts), list(tried)))
        best = {tuple(halves.picked): 1.0, tuple(halves.reported): 2.0}[tuple(prompts)]
        return [PLAIN, *(trial(d, 0.9 - 0.1 * abs(d - best)) for d in tried)]

    monkeypatch.setattr(calibrate, "sweep_doses", fake)
    (made,) = calibrate_vector(config(library), tiny)
    receipt = made.receipts[-1]
    assert made.coefficient == pytest.approx(10.0), "the best of the first half, not of the second"
    assert receipt["effect"] == pytest.approx(0.8), "as the second half has it"
    assert receipt["effect_when_picked"] == pytest.approx(0.9)
    assert [prompts for prompts, _ in seen[:-1]] == [halves.picked] * (len(seen) - 1)
    assert seen[-1] == (halves.reported, [0.5, 1.0, 2.0])
    assert not {*halves.picked} & {*halves.reported}


def test_the_reported_half_has_no_say_in_what_is_stored(library: Path, tiny: LoadedModel, tmp_path: Path) -> None:
    """The same first half beside two other second halves: window and coefficient stay, the report changes."""
    made = []
    for other in ("The river", "A dog"):
        with pytest.MonkeyPatch.context() as patch:
            shipped = halves_of(config(library))
            patch.setattr(
                calibrate, "halves_of", lambda _, o=other, s=shipped: s._replace(reported=[f"{o} {i}" for i in "abcd"])
            )
            made += calibrate_vector(config(library), tiny)
    one, two = made
    assert (one.coefficient, one.window) == (two.coefficient, two.window)
    assert one.receipts[-1]["picked"] == two.receipts[-1]["picked"]
    assert one.receipts[-1]["reported"] != two.receipts[-1]["reported"]


def test_what_is_reported_is_a_sweep_of_the_other_half(library: Path, tiny: LoadedModel, letters: Concept) -> None:
    (made,) = calibrate_vector(config(library), tiny)
    assert load_library(library)["push"].window == made.window
    receipt = json.loads(json.dumps(load_library(library)["push"].receipts[-1]))
    assert receipt == made.receipts[-1]
    assert (receipt["kind"], receipt["n_picked"], receipt["n_reported"]) == ("calibration", 10, 10)
    assert made.window is not None
    assert made.window[0] <= made.coefficient <= made.window[1]
    ends = sorted({row["dose"] for name, row in receipt["reported"].items() if name != "unsteered"})
    prompts = halves_of(config(library)).reported
    by_hand = sweep_doses(tiny, made, letters, prompts, ends, max_new_tokens=8, seed=1)
    chosen = next(each for each in by_hand if each.coefficient == pytest.approx(made.coefficient))
    assert receipt["effect"] == chosen.effect
    assert receipt["kl"] == chosen.kl
    assert receipt["holds"] == works(chosen, Bounds(99, 9, 99))


def test_calibrating_again_replaces_only_the_old_calibration(library: Path, tiny: LoadedModel) -> None:
    calibrate_vector(config(library), tiny)
    (again,) = calibrate_vector(config(library, seed=1), tiny)
    assert [each.get("kind") for each in again.receipts] == [None, "calibration"]
    assert again.receipts[-1]["seed"] == 1


def group(pushing: SteeringVector, vector: SteeringVector) -> list[SteeringVector]:
    """Two vectors of one name; the second has half the dose of the first, and is turned round."""
    other = replace(vector, name="two@resid_post.1", coefficient=-1.0)
    return [other, replace(pushing, name="two@resid_post.3", coefficient=4.0)]


def test_a_group_is_calibrated_with_one_factor(
    library: Path, tiny: LoadedModel, letters: Concept, pushing: SteeringVector, vector: SteeringVector
) -> None:
    save_library(library, [pushing, *group(pushing, vector)])
    calibrate_vector(config(library, vector="two"), tiny)
    kept = load_library(library)
    low, high = kept["two@resid_post.1"], kept["two@resid_post.3"]
    assert low.coefficient == pytest.approx(-high.coefficient / 4)
    assert high.coefficient not in (0, 4.0)
    assert low.window is not None
    assert high.window is not None
    assert low.window == pytest.approx((-high.window[1] / 4, -high.window[0] / 4))
    for each in (low, high):
        receipt = each.receipts[-1]
        assert (receipt["coefficient"], receipt["dose"]) == (each.coefficient, each.dose(each.coefficient))
        assert receipt["group"][each.name] == {"coefficient": each.coefficient, "dose": receipt["dose"]}
    prompts = halves_of(config(library)).reported
    tried = sorted({row["coefficient"] for row in receipt["reported"].values()})
    arms = [Arm("", [Intervention.of(high, c), Intervention.of(low, -c / 4)] if c else []) for c in tried]
    rates = try_arms(tiny, letters, prompts, arms, max_new_tokens=8, seed=1).rates.mean(axis=1)
    assert receipt["effect"] == pytest.approx(rates[tried.index(high.coefficient)] - rates[0])
    assert kept["push"].receipts == pushing.receipts
    save_library(library, [pushing, *(replace(each, coefficient=0.0) for each in group(pushing, vector))])
    made = calibrate_vector(config(library, vector="two"), tiny)
    doses = [each.dose(each.coefficient) for each in made]
    assert doses[0] == pytest.approx(doses[1]), "equal where nothing says otherwise"


def test_nothing_changes_where_no_dose_works(library: Path, tiny: LoadedModel) -> None:
    before = {path.name: path.read_bytes() for path in library.iterdir()}
    with pytest.raises(ConfigError, match=r"best effect is .* Nothing was changed"):
        calibrate_vector(config(library, doses=(1e-6,)), tiny)
    with pytest.raises(ConfigError, match=r"KL \d"):
        calibrate_vector(config(library, max_kl=1e-9), tiny)
    assert {path.name: path.read_bytes() for path in library.iterdir()} == before


def test_halves_of_ones_own_prompts(library: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"Text {i % 9}"}) for i in range(12)))
    one = halves_of(config(library, prompts=str(file), n_prompts=9))
    assert len({*one.picked, *one.reported}) == len(one.picked) + len(one.reported) == 9, "no text twice"
    assert halves_of(config(library, prompts=str(file), seed=1)) != one
    file.write_text('{"text": "a"}\n{"text": "a"}\n{"text": "b"}')
    with pytest.raises(TextError, match="4 different"):
        halves_of(config(library, prompts=str(file)))


def test_a_strength_is_not_calibrated(library: Path, tiny: LoadedModel, vector: SteeringVector) -> None:
    save_library(library, [replace(vector, operation="ablate")])
    with pytest.raises(ConfigError, match="ablate"):
        calibrate_vector(config(library), tiny)


def test_a_vector_that_says_nothing_of_its_concept(vector: SteeringVector, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learned"):
        concept_of(replace(vector, source={"kind": "learned"}), tmp_path)


# --- the window at run time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [4.0, 3.9, 0.1, -4.0, 0.0])
def test_within_the_window_and_below_it_a_vector_steers(
    tiny: LoadedModel, vector: SteeringVector, coefficient: float
) -> None:
    with steering(tiny, [Intervention.of(replace(vector, window=(2.0, 4.0)), coefficient)]):
        pass


@pytest.mark.parametrize("coefficient", [4.001, -4.001])
def test_beyond_the_window_a_vector_is_refused_unless_forced(
    tiny: LoadedModel, vector: SteeringVector, coefficient: float
) -> None:
    beyond = Intervention.of(replace(vector, window=(2.0, 4.0)), coefficient)
    with (
        pytest.raises(ConfigError, match="at most 4 either way, where its calibrated window ends"),
        steering(tiny, [beyond]),
    ):
        pass
    with steering(tiny, [beyond], force=True):
        pass
    with steering(tiny, [Intervention.of(vector, coefficient)]):
        pass


def test_a_change_while_steering_is_bounded_too(tiny: LoadedModel, vector: SteeringVector) -> None:
    bounded = replace(vector, window=(2.0, 4.0))
    with steering(tiny, [Intervention.of(bounded, 3.0)]) as steered:
        with pytest.raises(ConfigError, match="window"):
            steered.set([Intervention.of(bounded, 5.0)])
        steered.set([Intervention.of(bounded, 4.0)])
    with pytest.raises(ConfigError, match="window"), steering(tiny, rows=[[], [Intervention.of(bounded, 5.0)]]):
        pass


def test_a_window_of_the_other_way_bounds_by_its_far_end(tiny: LoadedModel, vector: SteeringVector) -> None:
    back = replace(vector, window=(-4.0, -2.0))
    with (
        steering(tiny, [Intervention.of(back, -4.0)]),
        pytest.raises(ConfigError, match="window"),
        steering(tiny, [Intervention.of(back, -4.5)]),
    ):
        pass


def test_the_sae_has_to_be_the_vectors_own(tmp_path: Path, vector: SteeringVector) -> None:
    rng, zeros = np.random.default_rng(0), np.zeros
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((32, 8), (8, 32))]
    SaeArtefact(
        "topk",
        weights[0],
        zeros(8, np.float32),
        weights[1],
        zeros(32, np.float32),
        k=4,
        metadata={"hook_point": "resid_post.1"},
    ).save(tmp_path / "sae")
    artefact, x = SaeArtefact.load(tmp_path / "sae"), torch.from_numpy(rng.standard_normal((40, 32)).astype(np.float32))
    latent = replace(vector, source={"kind": "latent", "latent": 3, "sae_sha256": "of another"})
    with pytest.raises(MismatchError, match="of another"):
        concept_of(latent, tmp_path / "sae")
    z = TorchSae(artefact).encode(x)
    for source, expected in (
        ({"latent": 3}, z[:, 3] > 0),
        ({"latents": {"3": 1.0, "5": 0.5}}, (z[:, 3] > 0) | (z[:, 5] > 0)),
        ({"latents": {"3": 1.0, "5": -2.0}}, z[:, 3] - 2 * z[:, 5] > 0),
    ):
        known = replace(vector, source={**source, "sae_sha256": artefact.sha256})
        assert concept_of(known, tmp_path / "sae").shows(x).tolist() == expected.tolist()
        assert 0 < expected.sum() < 40

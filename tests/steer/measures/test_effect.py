"""Receipts: every figure equals a computation by hand, one text at a time, and the controls are fair."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from activations.hook_points import HookPoint
from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from sae.torch_view import TorchSae
from steer import batches
from steer.generate import generate_conditions
from steer.measures import effect
from steer.measures.effect import (
    Arm,
    Bounds,
    Concept,
    DoseTrial,
    choose_dose,
    contrast_reader,
    kl_per_token,
    latent_reader,
    measure,
    rate,
    repetition,
    reread,
    sweep_doses,
)
from steer.operations import Intervention
from steer.runtime import steering
from steer.scopes import Scope
from steer.vectors import SteeringVector

POINT = HookPoint("resid_post", 1)
PROMPTS = ["The river ran", "A cat sat on the", "Numbers such as 12, 345 and"]
TEXTS = [" past the mill.", " mat, and the dog looked on. def add", " 6"]
KEYS = {
    "coefficient", "dose", "n_prompts", "max_new_tokens", "seed", "rate_unsteered", "rate_steered", "effect",
    "effect_ci95", "random_control_effect", "instruction", "prompt_baseline_effect", "kl", "nll_unsteered",
    "nll_steered", "nll_random", "nll_prompt_baseline", "examples",
}  # fmt: skip


def encoded(loaded: LoadedModel, prompt: str, text: str) -> tuple[torch.Tensor, int]:
    return torch.tensor([loaded.tokenizer(prompt + text)["input_ids"]]), len(loaded.tokenizer(prompt)["input_ids"])


def by_hand(loaded: LoadedModel, prompt: str, text: str) -> tuple[torch.Tensor, float]:
    """Residual stream and mean cost of the tokens of a continuation."""
    x, head = encoded(loaded, prompt, text)
    out = loaded.model(x, output_hidden_states=True)
    costs = -out.logits[0].log_softmax(-1)[range(head - 1, x.shape[1] - 1), x[0, head:]]
    return out.hidden_states[2][0, head:], float(costs.mean())


def side(vector: SteeringVector, loaded: LoadedModel) -> SteeringVector:
    """The vector with a midpoint that about half of all tokens pass."""
    x = torch.cat([by_hand(loaded, *pair)[0] for pair in zip(PROMPTS, TEXTS, strict=True)])
    middle = float((x @ torch.from_numpy(vector.direction)).median())
    return replace(vector, source={"kind": "contrast", "midpoint": middle})


def test_rereading_is_the_models_own_forward_over_the_continuation(tiny: LoadedModel) -> None:
    prompts, texts = PROMPTS * 4, TEXTS * 4  # more than one batch
    readings = reread(tiny, POINT, prompts, texts)
    assert len(readings) == 12 > effect.READ_ROWS
    for reading, prompt, text in zip(readings, prompts, texts, strict=True):
        x, nll = by_hand(tiny, prompt, text)
        torch.testing.assert_close(reading.x, x, atol=2e-5, rtol=1e-4)
        assert reading.nll == pytest.approx(nll, rel=1e-4)


def test_an_empty_continuation_counts_as_nothing(tiny: LoadedModel, vector: SteeringVector) -> None:
    empty, full = reread(tiny, POINT, PROMPTS[:2], ["", TEXTS[1]])
    assert (len(empty.x), empty.nll, rate(empty, contrast_reader(vector))) == (0, 0.0, 0.0)
    assert len(full.x) > 0


def test_the_rate_is_the_share_of_tokens_past_the_midpoint(tiny: LoadedModel, vector: SteeringVector) -> None:
    vector = side(vector, tiny)
    rates = []
    for reading, pair in zip(reread(tiny, POINT, PROMPTS, TEXTS), zip(PROMPTS, TEXTS, strict=True), strict=True):
        projected = by_hand(tiny, *pair)[0] @ torch.from_numpy(vector.direction)
        expected = float((projected > vector.source["midpoint"]).float().mean())
        rates.append(rate(reading, contrast_reader(vector)))
        assert rates[-1] == pytest.approx(expected, abs=0.02)
    assert 0.2 < np.mean(rates) < 0.8


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_a_latents_rate_is_the_share_of_tokens_it_is_active_on(tiny: LoadedModel, architecture: Any) -> None:
    rng = np.random.default_rng(1)
    rule = {"k": 4} if architecture == "topk" else {"threshold": np.ones(24, np.float32)}
    sae = TorchSae(
        SaeArtefact(
            architecture, rng.standard_normal((32, 24)).astype(np.float32), np.zeros(24, np.float32),
            rng.standard_normal((24, 32)).astype(np.float32), np.zeros(32, np.float32), **rule,
        )
    )  # fmt: skip
    rates = []
    for reading in reread(tiny, POINT, PROMPTS, TEXTS):
        for latent in range(24):
            expected = float((sae.encode(reading.x)[:, latent] > 0).float().mean())
            rates.append(rate(reading, latent_reader(sae, latent, POINT)))
            assert rates[-1] == pytest.approx(expected)
    assert len(set(rates)) > 3


def test_kl_is_zero_without_steering_and_grows_with_it(tiny: LoadedModel, vector: SteeringVector) -> None:
    small, large = (kl_per_token(tiny, vector, c, PROMPTS, TEXTS) for c in (0.5, 4.0))
    assert kl_per_token(tiny, vector, 0.0, PROMPTS, TEXTS) == 0.0
    assert 0 < small < large


def test_kl_is_that_of_single_texts_without_their_first_token(tiny: LoadedModel, vector: SteeringVector) -> None:
    total, count = 0.0, 0
    for prompt, text in zip(PROMPTS * 3, TEXTS * 3, strict=True):
        x, _ = encoded(tiny, prompt, text)
        with torch.no_grad():
            plain = tiny.model(x).logits[0].log_softmax(-1)
            with steering(tiny, [Intervention.of(vector, 3.0)]):
                steered = tiny.model(x).logits[0].log_softmax(-1)
        kl = torch.nn.functional.kl_div(steered, plain, log_target=True, reduction="none").sum(-1)
        assert kl[0] == 0, "the first token is never steered"
        total, count = total + float(kl[1:].sum()), count + x.shape[1] - 1
    assert kl_per_token(tiny, vector, 3.0, PROMPTS * 3, TEXTS * 3) == pytest.approx(total / count, rel=1e-4)


def trial(dose: float, rate: float, nll: float, repetition: float = 0.05, kl: float = 0.0) -> DoseTrial:
    """Beside unsteered text of rate 0.1, nll 2 and repetition 0.05."""
    return DoseTrial(dose, 10 * dose, rate, rate - 0.1, 0, 1, nll, nll - 2, repetition, repetition - 0.05, kl)


def test_the_chosen_dose_has_the_highest_rate_among_those_that_still_read_well() -> None:
    plain = trial(0, 0.9, 2.0)
    sweep = [plain, trial(0.2, 0.1, 2.1), trial(0.4, 0.5, 2.9), trial(0.6, 0.3, 2.95), trial(0.8, 1.0, 3.1)]
    assert choose_dose(sweep, Bounds(1.0, 0.1)).dose == 0.4
    assert choose_dose(sweep, Bounds(2.0, 0.1)).dose == 0.8
    assert choose_dose(sweep, Bounds(0.5, 0.1)).dose == 0.2
    assert choose_dose(sweep, Bounds(0.01, 0.1)).dose == 0.2, "the smallest, when all read badly; never no steering"


def test_no_dose_is_chosen_that_makes_text_go_round_in_circles() -> None:
    plain = trial(0, 0.1, 2.0)
    sweep = [plain, trial(0.2, 0.3, 2.0), trial(0.4, 0.5, 1.5, repetition=0.14), trial(0.6, 0.9, 0.5, repetition=0.16)]
    assert choose_dose(sweep, Bounds(1.0, 0.1)).dose == 0.4
    assert choose_dose(sweep, Bounds(1.0, 0.2)).dose == 0.6
    assert choose_dose(sweep, Bounds(1.0, 0.05)).dose == 0.2


def test_a_dose_may_be_bounded_by_what_it_does_to_other_text() -> None:
    sweep = [trial(0, 0.1, 2.0), trial(0.2, 0.3, 2.0, kl=0.2), trial(0.4, 0.5, 2.0, kl=0.6)]
    assert choose_dose(sweep, Bounds(1.0, 0.1)).dose == 0.4
    assert choose_dose(sweep, Bounds(1.0, 0.1, max_kl=0.5)).dose == 0.2


def test_repetition_is_read_off_the_continuation_alone(tiny: LoadedModel) -> None:
    (found,) = reread(tiny, POINT, ["the the the the the"], [" cat sat on"])
    (again,) = reread(tiny, POINT, ["A"], [" the the the the the the"])
    assert (found.repetition, repetition([])) == (0.0, 0.0)
    assert again.repetition > 0.5


def test_a_sweep_begins_unsteered_and_rates_each_dose(tiny: LoadedModel, vector: SteeringVector) -> None:
    vector = side(vector, tiny)
    doses, limits = (0.5, 3.0), {"max_new_tokens": 6, "seed": 3}
    trials = sweep_doses(tiny, vector, contrast_reader(vector), PROMPTS, doses, **limits)
    assert [t.dose for t in trials] == pytest.approx([0.0, *doses])
    assert [t.coefficient for t in trials] == pytest.approx([0.0, 0.5 * vector.mean_norm, 3.0 * vector.mean_norm])
    conditions = [[Intervention.of(vector, t.coefficient)] for t in trials]
    texts = generate_conditions(tiny, conditions, PROMPTS, **limits)
    for t, row in zip(trials, texts, strict=True):
        readings = reread(tiny, POINT, PROMPTS, row)
        assert t.rate == pytest.approx(np.mean([rate(r, contrast_reader(vector)) for r in readings]), abs=0.02)
        assert t.nll == pytest.approx(np.mean([r.nll for r in readings]), rel=1e-4)
        assert t.repetition == pytest.approx(np.mean([r.repetition for r in readings]))
        assert t.effect == pytest.approx(t.rate - trials[0].rate)
        assert t.effect_low <= t.effect <= t.effect_high
        assert t.nll_rise == pytest.approx(t.nll - trials[0].nll)
        assert t.repetition_rise == pytest.approx(t.repetition - trials[0].repetition)
        assert t.kl == pytest.approx(kl_per_token(tiny, vector, t.coefficient, PROMPTS, texts[0]), rel=1e-5)
    assert 0 == trials[0].kl < trials[1].kl < trials[2].kl


def test_the_interval_of_a_dose_is_that_of_its_gains_prompt_by_prompt(
    tiny: LoadedModel, vector: SteeringVector
) -> None:
    vector = side(vector, tiny)
    limits: Any = {"max_new_tokens": 6, "seed": 3}
    (_, found) = sweep_doses(tiny, vector, contrast_reader(vector), PROMPTS, [3.0], **limits)
    arms = [Arm("a", []), Arm("b", [Intervention.of(vector, 3.0 * vector.mean_norm)])]
    rates = effect.try_arms(tiny, contrast_reader(vector), PROMPTS, arms, **limits).rates
    assert [found.effect_low, found.effect_high] == effect.bootstrap_interval(rates[1] - rates[0], 3)


def test_sweeps_beside_the_same_unsteered_texts_can_be_compared(tiny: LoadedModel, vector: SteeringVector) -> None:
    vector, limits = side(vector, tiny), {"max_new_tokens": 6, "seed": 3}
    reader = contrast_reader(vector)
    plain = effect.try_arms(tiny, reader, PROMPTS, [Arm("unsteered", [])], **limits)
    for doses in ((0.5,), (0.5, 3.0)):
        first, *others = sweep_doses(tiny, vector, reader, PROMPTS, doses, unsteered=plain, **limits)
        assert (first.rate, first.nll) == pytest.approx((plain.rates.mean(), plain.nlls.mean()))
        for each in others:
            assert each.effect == pytest.approx(each.rate - plain.rates.mean())
            assert each.nll_rise == pytest.approx(each.nll - plain.nlls.mean())
            assert each.kl == pytest.approx(kl_per_token(tiny, vector, each.coefficient, PROMPTS, plain.texts[0]))


def test_costs_are_those_of_each_text_alone_while_steered(tiny: LoadedModel, vector: SteeringVector) -> None:
    prompts, texts = PROMPTS * 4, TEXTS * 4
    with steering(tiny, [Intervention.of(vector, 3.0)]), torch.no_grad():
        expected = [by_hand(tiny, *pair)[1] for pair in zip(prompts, texts, strict=True)]
    found = batches.costs(tiny, prompts, texts, [Intervention.of(vector, 3.0)])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.abs(found - batches.costs(tiny, prompts, texts)).max() > 1e-3


def test_a_scope_knows_where_the_prompt_ends_when_texts_are_read(tiny: LoadedModel, vector: SteeringVector) -> None:
    only = [[Intervention.of(vector, 3.0, scope=Scope.parse(words))] for words in ("generated", "prompt", "all")]
    generated, prompt, everything = effect.kl_of(tiny, only, PROMPTS, TEXTS)
    assert 0 < generated < everything
    assert 0 < prompt < everything


@pytest.fixture(scope="module")
def receipt(tiny: LoadedModel) -> tuple[SteeringVector, dict[str, Any], list[torch.Tensor]]:
    """A vector, its receipt at coefficient 6, and the deltas that were steered with."""
    from activations.store_schema import ModelRef

    direction = np.random.default_rng(0).standard_normal(tiny.d_model).astype(np.float32)
    model = ModelRef(id=tiny.id, fingerprint=tiny.fingerprint, n_layers=tiny.n_layers, d_model=tiny.d_model)
    vector = SteeringVector("up", direction / np.linalg.norm(direction), "resid_post.1", model, 4.0, {})
    vector = side(vector, tiny)
    deltas = []

    def spy(loaded: Any, conditions: Any, prompts: Any, **limits: Any) -> Any:
        slots = [[slot for each in condition for slot in each.operation.slots()] for condition in conditions]
        deltas.append(torch.stack([sum((s.constant * s.writes for s in row), start=torch.zeros(32)) for row in slots]))
        return generate_conditions(loaded, conditions, prompts, **limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effect, "generate_conditions", spy)
        got = measure(
            tiny, vector, contrast_reader(vector), PROMPTS, 6.0, instruction="Write joyfully.", n_random=4,
            max_new_tokens=8, seed=5,
        )  # fmt: skip
    return vector, got, deltas


def test_a_receipt_has_every_key_and_is_json(receipt: Any) -> None:
    vector, got, _ = receipt
    assert got.keys() >= KEYS
    assert json.loads(json.dumps(got)) == got
    assert (got["coefficient"], got["dose"], got["n_prompts"], got["seed"]) == (6.0, 6.0 / vector.mean_norm, 3, 5)
    assert [example["prompt"] for example in got["examples"]] == PROMPTS


def test_a_receipts_figures_are_those_of_its_texts(receipt: Any, tiny: LoadedModel) -> None:
    vector, got, _ = receipt
    for key, condition in (("unsteered", "unsteered"), ("steered", "steered"), ("prompt_baseline", "prompt_baseline")):
        rates, nlls = [], []
        for example in got["examples"]:
            (reading,) = reread(tiny, POINT, [example["prompt"]], [example[condition]])
            rates.append(rate(reading, contrast_reader(vector)))
            nlls.append(reading.nll)
        assert got[f"nll_{key}"] == pytest.approx(np.mean(nlls), rel=1e-4)
        if key == "prompt_baseline":
            assert got["prompt_baseline_effect"] == pytest.approx(np.mean(rates) - got["rate_unsteered"], abs=0.02)
        else:
            assert got[f"rate_{key}"] == pytest.approx(np.mean(rates), abs=0.02)
    assert got["effect"] == pytest.approx(got["rate_steered"] - got["rate_unsteered"])
    unsteered = [example["unsteered"] for example in got["examples"]]
    assert got["kl"] == pytest.approx(kl_per_token(tiny, vector, 6.0, PROMPTS, unsteered), rel=1e-5)


def test_random_controls_have_exactly_the_steering_norm(receipt: Any) -> None:
    vector, _, (deltas, *_) = receipt
    assert not deltas[0].any()
    torch.testing.assert_close(deltas[1], 6.0 * torch.from_numpy(vector.direction))
    random = deltas[2:]
    assert len(random) == 4
    torch.testing.assert_close(random.norm(dim=1), torch.full((4,), 6.0), rtol=1e-6, atol=0)
    unit = torch.cat([random / 6.0, torch.from_numpy(vector.direction)[None]])
    assert (unit @ unit.T).fill_diagonal_(0).abs().max() < 0.95, "different from each other and from the vector"


def test_the_prompt_baseline_is_not_steered(receipt: Any) -> None:
    _, _, (_, asked) = receipt
    assert not asked.any()


def test_the_interval_contains_the_effect_and_is_reproducible(receipt: Any) -> None:
    low, high = receipt[1]["effect_ci95"]
    assert low <= receipt[1]["effect"] <= high
    gains = np.random.default_rng(0).normal(0.3, 0.2, 40)
    interval = effect.bootstrap_interval(gains, 7)
    assert interval == effect.bootstrap_interval(gains, 7)
    assert interval != effect.bootstrap_interval(gains, 8)
    assert interval[0] < gains.mean() < interval[1]
    standard_error = gains.std() / np.sqrt(40)
    assert interval[1] - interval[0] == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert effect.bootstrap_interval(np.full(5, 0.25), 0) == [0.25, 0.25]


def test_the_same_seed_gives_the_same_receipt(receipt: Any, tiny: LoadedModel) -> None:
    vector, got, _ = receipt
    limits = {"instruction": "Write joyfully.", "n_random": 4, "max_new_tokens": 8}
    assert measure(tiny, vector, contrast_reader(vector), PROMPTS, 6.0, seed=5, **limits) == got


def test_a_concept_is_read_where_it_is_not_steered(tiny: LoadedModel, vector: SteeringVector) -> None:
    """The vector is added at resid_post.1, and the concept is read at mlp_out.0, as with a transcoder."""
    elsewhere, seen = HookPoint("mlp_out", 0), []

    def shows(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x[:, 0] > 0

    limits: dict[str, Any] = {"max_new_tokens": 4, "seed": 2}
    got = measure(tiny, vector, Concept(elsewhere, shows), PROMPTS, 6.0, instruction="x", n_random=1, **limits)
    trials = sweep_doses(tiny, vector, Concept(elsewhere, shows), PROMPTS, (0.5,), **limits)
    texts = [example["steered"] for example in got["examples"]]
    readings = reread(tiny, elsewhere, PROMPTS, texts)
    assert got["rate_steered"] == pytest.approx(np.mean([float((r.x[:, 0] > 0).float().mean()) for r in readings]))
    assert len(trials) == 2
    assert len(seen) == 3 * 4 + 3 * 2
    for x, reading in zip(seen[3:6], readings, strict=True):
        torch.testing.assert_close(x, reading.x)


def test_a_coefficient_of_zero_measures_no_effect(tiny: LoadedModel, vector: SteeringVector) -> None:
    vector = side(vector, tiny)
    got = measure(
        tiny, vector, contrast_reader(vector), PROMPTS, 0.0, instruction="x", n_random=1, max_new_tokens=4, seed=0
    )
    # Conditions share one batch of random numbers, so their texts differ by chance but for greedy decoding.
    assert got["kl"] == 0
    assert got["dose"] == 0

"""The full receipt: every figure equals a computation by hand, and every arm is what it says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.errors import ConfigError
from activations.models import LoadedModel
from sae.labels.config import ChatModelConfig
from steer.batches import costs
from steer.library import load_library, save_library
from steer.measures.capability import load_choices
from steer.measures.effect import Arm, Concept, arms_of, drift, next_tokens, try_arms
from steer.measures.refusal import is_refusal
from steer.operations import Intervention
from steer.pairs import ContrastPair, load_pairs
from steer.receipts import score
from steer.receipts.config import ScoreConfig
from steer.receipts.score import compared, laid_out, score_vector
from steer.runtime import steering
from steer.vectors import SteeringVector
from tests.sae.labels.stand_in import stand_in

SMALL: dict[str, Any] = {
    "coefficient": 12.0, "n_random": 2, "n_prompts": 4, "max_new_tokens": 6, "n_choices": 3, "n_refusal": 2,
    "refusal_tokens": 4, "latency_tokens": 3, "latency_repeats": 2, "pairs": "formal_vs_casual",
    "transfer": "joyful_vs_gloomy",
}  # fmt: skip


@pytest.fixture(scope="module")
def scored(
    tiny: LoadedModel, tiny_llama: Path, pushing: SteeringVector, letters: Concept,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ScoreConfig, dict[str, Any]]:  # fmt: skip
    """A library whose vector was scored, and what the score says."""
    folder = tmp_path_factory.mktemp("score")
    save_library(folder, [replace(pushing, receipts=[{"effect": 0.25}])])
    with pytest.MonkeyPatch.context() as patch, stand_in(lambda body: f"Rating: [[{len(str(body)) % 3}]]") as server:
        patch.setattr(score, "concept_of", lambda *_: letters)
        judge = ChatModelConfig(model="judge", base_url=server.url, max_answer_tokens=9)
        config = ScoreConfig(library=folder, model=str(tiny_llama), judge=judge, **SMALL)
        return config, score_vector(config, tiny)


@pytest.fixture
def arms(pushing: SteeringVector, scored: Any) -> list[Arm]:
    return arms_of(pushing, 12.0, scored[1]["instruction"], 2, 0)


def test_the_receipt_is_stored_beside_the_others_and_replaces_its_like(
    scored: Any, tiny: LoadedModel, letters: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, receipt = scored
    kept = load_library(config.library)["push"].receipts
    assert [each.get("kind") for each in kept] == [None, "score"]
    assert json.loads(json.dumps(receipt)) == kept[-1]
    monkeypatch.setattr(score, "concept_of", lambda *_: letters)
    quick = config.model_copy(update={"parts": ("capability",), "judge": None, "transfer": None})
    other = quick.model_copy(update={"coefficient": 2.0})
    for each in (quick, other, quick):
        score_vector(each, tiny)
    found = [(each.get("kind"), each.get("coefficient")) for each in load_library(config.library)["push"].receipts]
    assert found == [(None, None), ("score", 12.0), ("score", 2.0), ("score", 12.0)], "one a setting, newest last"
    save_library(config.library, [replace(load_library(config.library)["push"], receipts=kept)])


def test_every_part_has_four_arms_and_intervals_around_its_figures(scored: Any) -> None:
    for part in ("concept", "logits", "drift", "capability", "refusal", "judge"):
        rows = scored[1][part]
        assert list(rows) == ["unsteered", "steered", "prompt", "random"]
        for row in rows.values():
            for name, ends in row.items():
                if name.endswith("_ci95"):
                    assert ends[0] <= row[name.removesuffix("_ci95")] <= ends[1]
        changes = {name: value for name, value in rows["unsteered"].items() if name.endswith("_change")}
        assert changes
        assert set(changes.values()) == {0.0}
    assert list(scored[1]["latency"]) == ["unsteered", "steered", "prompt"]
    assert scored[1]["latency"]["unsteered"]["relative"] == 1
    assert scored[1]["latency"]["steered"]["tokens_s"] > 0


def test_the_concept_is_that_of_the_texts(scored: Any, tiny: LoadedModel, letters: Concept, arms: list[Arm]) -> None:
    receipt = scored[1]
    prompts = [example["prompt"] for example in receipt["examples"]]
    outcome = try_arms(tiny, letters, prompts, arms, max_new_tokens=6, seed=1)
    rates = outcome.rates.mean(axis=1)
    rows = receipt["concept"]
    assert [rows[name]["rate"] for name in ("unsteered", "steered", "prompt")] == pytest.approx(rates[:3])
    assert rows["random"]["rate"] == pytest.approx(rates[3:].mean())
    assert receipt["effect"] == pytest.approx(rates[1] - rates[0])
    assert receipt["effect"] > 0.1
    assert [example["steered"] for example in receipt["examples"]] == outcome.texts[1]
    assert rows["steered"]["perplexity"] == pytest.approx(np.exp(outcome.nlls[1].mean()))
    ratio = rows["steered"]["perplexity"] / rows["unsteered"]["perplexity"]
    assert rows["steered"]["perplexity_ratio"] == pytest.approx(ratio)
    assert 0 < rows["steered"]["classifier"] < 1
    assert receipt["classifier_quality"]["n_fit"] > 10


def test_random_arms_are_one_and_have_the_vectors_norm(arms: list[Arm]) -> None:
    pushes = [arm.interventions[0].operation.reach for arm in arms if arm.interventions]
    assert pushes == pytest.approx([12.0] * 3)
    tables = {"x": np.array([[0.0, 1, 0], [1, 1, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]])}
    rows = compared(tables, arms, 0)
    assert rows["random"]["x"] == 0.5
    assert rows["steered"]["x_change"] == pytest.approx(2 / 3)
    assert rows["random"]["x_change"] == pytest.approx(0.5 - 1 / 3)


def test_margins_are_of_heldout_pairs_alone(
    scored: Any, tiny: LoadedModel, pushing: SteeringVector, arms: list[Arm]
) -> None:
    pairs = [pair for pair in load_pairs("formal_vs_casual") if pair.split != "fit"]
    steered = [Intervention.of(pushing, 12.0)]
    margin = [
        costs(tiny, [pair.prompt], [pair.negative], steered)[0]
        - costs(tiny, [pair.prompt], [pair.positive], steered)[0]
        for pair in pairs
    ]
    rows = scored[1]["logits"]
    assert rows["steered"]["margin"] == pytest.approx(np.mean(margin), rel=1e-3)
    asked = score.margins_of(tiny, pairs[:1], arms[2])
    prompt = f"{scored[1]['instruction']}\n\n{pairs[0].prompt}"
    assert asked[0] == pytest.approx(
        costs(tiny, [prompt], [pairs[0].negative])[0] - costs(tiny, [prompt], [pairs[0].positive])[0]
    )
    assert 0 <= rows["steered"]["pairs_up"] <= 1


def test_the_promoted_token_is_the_one_that_is_pushed(scored: Any) -> None:
    assert scored[1]["promoted"][0] == "'"
    assert "'" not in scored[1]["demoted"]


def test_next_tokens_are_those_after_each_prompt(tiny: LoadedModel) -> None:
    prompts = ["A cat", "The river ran past"]
    for row, prompt in zip(next_tokens(tiny, prompts), prompts, strict=True):
        ids = torch.tensor([tiny.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            torch.testing.assert_close(row, tiny.model(ids).logits[0, -1].log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_drift_is_that_of_each_text_alone(tiny: LoadedModel, pushing: SteeringVector) -> None:
    texts = ["Question: what?\nAnswer: a cat.", "The river ran.", *(f"Text {i}" for i in range(8))]
    arms = [Arm("unsteered", []), Arm("steered", [Intervention.of(pushing, 3.0)]), Arm("prompt", [], "Be formal.")]
    kls, nlls = drift(tiny, arms, texts)
    assert not kls[0].any()
    head = tiny.tokenizer("Be formal.\n\n")["input_ids"]
    for i, text in enumerate(texts):
        ids = tiny.tokenizer(text)["input_ids"]
        with torch.no_grad():
            p = tiny.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            with steering(tiny, arms[1].interventions):
                q = tiny.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            r = tiny.model(torch.tensor([head + ids])).logits[0, len(head) : -1].log_softmax(-1)
        for arm, other in ((1, q), (2, r)):
            assert kls[arm, i] == pytest.approx(float((p.exp() * (p - other)).sum(-1).mean()), rel=1e-3, abs=1e-6)
            assert nlls[arm, i] == pytest.approx(float(-other[range(len(ids) - 1), ids[1:]].mean()), rel=1e-3)


def test_refusals_are_those_of_the_answers(scored: Any, monkeypatch: pytest.MonkeyPatch, tiny: LoadedModel) -> None:
    """The tiny model refuses nothing; a made-up one refuses what is harmful, unless it is steered."""
    assert scored[1]["refusal"]["steered"]["harmful"] == 0
    config, prompts = scored[0], score.load_refusal_prompts(None, "test", 3)
    arms = [Arm("unsteered", []), Arm("steered", []), Arm("prompt", []), Arm("random", [])]

    def made_up(loaded: Any, texts: Any, arms: Any, **_: Any) -> Any:
        harmful = {prompt.text for prompt in prompts if prompt.harmful}
        answers = [
            [f"I can't {t}" if t in harmful and arm.name != "steered" else "Sure!" for t in texts] for arm in arms
        ]
        return np.array([[is_refusal(answer) for answer in row] for row in answers]), answers

    monkeypatch.setattr(score, "refusals", made_up)
    rows = score.refusal_part(config, tiny, prompts, arms)["refusal"]
    assert (rows["unsteered"]["harmful"], rows["unsteered"]["harmless"]) == (1, 0)
    assert (rows["steered"]["harmful_change"], rows["steered"]["harmless_change"]) == (-1, 0)


def test_transfer_reads_all_pairs_of_the_other_set(scored: Any) -> None:
    found = scored[1]["transfer"]
    assert found["n_pairs"] == len(load_pairs("joyful_vs_gloomy"))
    assert 0 <= found["auroc"] <= 1
    assert list(found["arms"]) == ["unsteered", "steered", "prompt", "random"]
    assert found["arms"]["steered"]["rate_change"] > 0.1
    assert found["arms"]["steered"]["margin_change"] != 0


def test_answers_of_the_judge_are_kept(scored: Any) -> None:
    config, receipt = scored
    lines = (config.library / score.KEPT).read_text().splitlines()
    assert 0 < len(lines) <= 3 * 5 * 4
    row = receipt["judge"]["steered"]
    assert 0 <= row["score"] <= 2
    assert row["unread"] == 0


def test_it_is_shown_as_a_table_a_part(scored: Any) -> None:
    shown = laid_out(scored[1])
    assert shown["capability"]["steered"]["accuracy"].count(" to ") == 1
    assert shown["concept"]["steered"]["rate_change"].startswith("+")
    assert list(shown["transfer"]) == ["unsteered", "steered", "prompt", "random"]
    assert not {"examples", "settings", "answers"} & set(shown)


def test_a_vector_without_a_coefficient_has_nothing_to_score(
    tmp_path: Path, pushing: SteeringVector, tiny: LoadedModel
) -> None:
    save_library(tmp_path, [pushing])
    with pytest.raises(ConfigError, match="calibrate first"):
        score_vector(ScoreConfig(library=tmp_path), tiny)


def test_only_the_parts_that_are_asked_for(tmp_path: Path, pushing: SteeringVector, tiny: LoadedModel) -> None:
    save_library(tmp_path, [replace(pushing, coefficient=1.0)])
    limits = {key: value for key, value in SMALL.items() if key not in ("transfer", "coefficient")}
    got = score_vector(ScoreConfig(library=tmp_path, parts=("capability",), **limits), tiny)
    assert set(got) == {"kind", "coefficient", "dose", "instruction", "settings", "capability"}
    assert got["coefficient"] == 1.0


def test_pairs_give_a_concept_to_a_vector_without_one(tmp_path: Path, pushing: SteeringVector) -> None:
    learned = replace(pushing, source={"kind": "learned"}, coefficient=1.0)
    save_library(tmp_path, [learned])
    material = score.read_material(ScoreConfig(library=tmp_path, pairs="formal_vs_casual"))
    assert material.concept.judges is not None
    formal, casual = material.concept.judges(
        ["", ""], [" I would be most grateful for your kind assistance.", " gonna grab stuff, you guys wanna come?"]
    )
    assert formal > casual + 0.1
    with pytest.raises(ConfigError, match="learned"):
        score.read_material(ScoreConfig(library=tmp_path))


def test_the_shipped_questions_are_enough() -> None:
    assert len(load_choices()) >= 60
    assert all(len(question.options) == 4 for question in load_choices())
    assert isinstance(load_pairs("formal_vs_casual")[0], ContrastPair)


def test_a_group_is_scored_as_one(
    tiny: LoadedModel, pushing: SteeringVector, vector: SteeringVector, letters: Concept, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(score, "concept_of", lambda *_: letters)
    parts = [replace(vector, name="two@resid_post.1", coefficient=-1.0)]
    parts += [replace(pushing, name="two@resid_post.3", coefficient=10.0)]
    save_library(tmp_path, parts)
    limits = {key: value for key, value in SMALL.items() if key not in ("judge", "transfer", "pairs", "coefficient")}
    got = score_vector(ScoreConfig(library=tmp_path, parts=("concept",), **limits), tiny)
    kept = load_library(tmp_path)
    assert [each.receipts[-1]["coefficient"] for each in kept.values()] == [-1.0, 10.0]
    assert [each.receipts[-1]["effect"] for each in kept.values()] == [got["effect"]] * 2
    assert (got["coefficient"], got["dose"]) == (10.0, 1.25)
    prompts = [example["prompt"] for example in got["examples"]]
    rng, arms = np.random.default_rng(0), [Arm("unsteered", [])]
    arms += [Arm("steered", [Intervention.of(each, each.coefficient) for each in parts])]
    arms += [Arm("prompt", [], got["instruction"])]
    for _ in range(2):
        drawn = [rng.standard_normal(tiny.d_model).astype(np.float32) for _ in parts]
        arms.append(Arm("random", [
            Intervention.of(replace(each, direction=row / np.linalg.norm(row)), each.coefficient)
            for each, row in zip(parts, drawn, strict=True)
        ]))  # fmt: skip
    rates = try_arms(tiny, letters, prompts, arms, max_new_tokens=6, seed=1).rates.mean(axis=1)
    assert got["effect"] == pytest.approx(rates[1] - rates[0])
    assert got["random_control_effect"] == pytest.approx(rates[3:].mean() - rates[0])
    half = score_vector(ScoreConfig(library=tmp_path, parts=("concept",), coefficient=5.0, **limits), tiny)
    assert half["coefficient"] == 5.0
    assert load_library(tmp_path)["two@resid_post.1"].receipts[-1]["coefficient"] == -0.5

"""Comparisons: every condition does what it says, figures are those of a plain loop, and an interrupted one goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations.chat import chat_prompt
from activations.errors import ConfigError, UnknownNameError
from activations.hook_points import HookPoint
from activations.models import LoadedModel, load_model
from activations.text import documents
from steer.batches import costs
from steer.library import load_library
from steer.making.axes import AXES, axis_of, pairs_of, shown_texts
from steer.measures.effect import reread
from steer.pairs import load_pairs
from steer.receipts import compare as module
from steer.receipts.compare import _judge as judge_of
from steer.receipts.compare import _kl as kl_of
from steer.receipts.compare import axis_prompts, compare, gains, table, wanted, write_texts
from steer.receipts.conditions import UNSTEERED, make_conditions
from steer.receipts.config import CompareAxisConfig, LoraTraining
from steer.receipts.over_seeds import crossed

SMALL: dict[str, Any] = {
    "prompts": 6, "select_prompts": 2, "max_new_tokens": 5, "doses": (0.3,), "kl_texts": 3, "latency_rounds": 1,
    "batch_rows": 4, "few_shot": 2, "lora": LoraTraining(rank=2, steps=2, batch_size=2),
}  # fmt: skip
ALL = ["unsteered", "vector", "random", "instruction", "few_shot", "lora"]


@pytest.fixture(scope="module")
def own(tiny_llama: Path) -> LoadedModel:
    """A tiny model that a fine-tune may go into and out of."""
    return load_model(str(tiny_llama), dtype="float32")


@pytest.fixture(scope="module")
def done(own: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareAxisConfig, dict[str, Any]]:
    config = CompareAxisConfig(axes=("formality", "refusal", "bias"), out=tmp_path_factory.mktemp("compare"), **SMALL)
    return config, compare(config, own)


def test_each_condition_of_each_axis_is_measured(done: tuple[CompareAxisConfig, dict[str, Any]]) -> None:
    config, results = done
    assert list(results) == ["formality", "refusal", "bias"]
    for result in results.values():
        assert list(result["conditions"]) == ALL
        plain = result["conditions"]["unsteered"]
        assert (plain["effect"], plain["kl"], plain["prompt_tokens"]) == (0, 0, 0)
        for name, row in result["conditions"].items():
            assert row["effect_ci95"][0] <= row["effect"] <= row["effect_ci95"][1]
            assert row["latency_ms"] > 0
            assert (row["kl"] > 0) == (name != "unsteered")
            assert (row["prompt_tokens"] > 0) == (name in ("instruction", "few_shot"))
            assert (row["cost"].get("seconds", 0) > 0) == (name in ("vector", "lora"))
    assert [result["n_prompts"] for result in results.values()] == [6, 6, 12]
    assert results["formality"]["judge"]["heldout_auroc"] > 0.9
    assert results["formality"]["conditions"]["vector"]["cost"]["bytes"] == 4 * 32
    assert json.loads((config.out / "compare.json").read_text()) == json.loads(json.dumps(results))
    assert set(load_library(config.out / "library")) == set(results)
    shown = table(results)
    assert len({tuple(row) for rows in shown.values() for row in rows.values()}) == 1, "one kind of table"


def test_the_page_opens_offline(done: tuple[CompareAxisConfig, dict[str, Any]]) -> None:
    page = (done[0].out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert all(name in page for name in ALL)


def test_what_was_measured_is_not_measured_again(
    done: tuple[CompareAxisConfig, dict[str, Any]], own: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, results = done

    def never(*_: object, **__: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(module, "generate", never)
    monkeypatch.setattr("steer.receipts.conditions.from_contrast", never)
    monkeypatch.setattr("steer.receipts.conditions.train", never)
    assert compare(config, own) == json.loads(json.dumps(results))


def test_an_interrupted_comparison_keeps_whole_batches(
    own: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, axis = CompareAxisConfig(out=tmp_path, **SMALL), AXES["formality"]
    held, path = axis_prompts(config, axis)[0], tmp_path / "texts.jsonl"
    whole = write_texts(own, config, axis, UNSTEERED, held, path)
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["prompt"] for line in lines] == held
    asked: list[int] = []
    generate = module.generate
    monkeypatch.setattr(
        module,
        "generate",
        lambda loaded, given, **kw: asked.append(len(given)) or generate(loaded, given, **kw),
    )
    path.write_text("".join(lines[:5]) + lines[5][:9])
    assert write_texts(own, config, axis, UNSTEERED, held, path) == whole
    assert asked == [2], "the first batch of four was there"
    assert path.read_text().splitlines(keepends=True) == lines
    path.write_text("".join(lines[:3]))
    assert write_texts(own, config, axis, UNSTEERED, held, path) == whole
    assert asked == [2, 4, 2]


def test_several_seeds_are_one_table_of_means(own: LoadedModel, tmp_path: Path) -> None:
    settings = SMALL | {"axes": ("formality", "bias"), "conditions": ("random", "few_shot")}
    found = compare(CompareAxisConfig(out=tmp_path / "all", seeds=(0, 1, 2), **settings), own)
    assert json.loads((tmp_path / "all" / "compare.json").read_text()) == json.loads(json.dumps(found))
    alone = [compare(CompareAxisConfig(out=tmp_path / f"{i}", seed=i, **settings), own) for i in range(3)]
    for axis, result in found.items():
        assert result["seeds"] == [0, 1, 2]
        for name, row in result["conditions"].items():
            rows = [each[axis]["conditions"][name] for each in alone]
            for figure in ("value", "effect", "kl", "nll", "repetition", "tokens", "prompt_tokens"):
                assert row[figure] == pytest.approx(np.mean([each[figure] for each in rows]), abs=1e-6), figure
                if figure not in ("value", "effect") or axis != "bias":
                    assert row[f"{figure}_ci95"][0] <= row[figure] + 1e-9 <= row[f"{figure}_ci95"][1] + 2e-9
            assert [each[name] for each in result["by_seed"].values()] == [each["effect"] for each in rows]
    assert len({json.dumps(each) for each in found["formality"]["by_seed"].values()}) > 1, "seeds differ"
    assert found["bias"]["conditions"]["random"]["effect_ci95"] is None
    assert {tuple(row) for rows in table(found).values() for row in rows.values()}
    assert (tmp_path / "all" / "report.html").read_text().count("<svg") == 2


def test_an_interval_is_as_wide_as_seeds_and_prompts_make_it() -> None:
    rng = np.random.default_rng(0)
    seeds, prompts = rng.standard_normal((12, 1)), rng.standard_normal((1, 40))
    for by_seed, by_prompt in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        ends = crossed(by_seed * seeds + by_prompt * prompts, 0)
        assert ends is not None
        variance = by_seed * seeds.var() / 12 + by_prompt * prompts.var() / 40
        assert ends[1] - ends[0] == pytest.approx(2 * 1.96 * variance**0.5, rel=0.12)
    assert crossed(np.ones((1, 1)), 0) is None


def by_length(texts: list[str], prompts: list[str]) -> np.ndarray:
    return np.array([float(len(text)) for text in texts])


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_dose_is_chosen_by_the_measure_of_the_axis(own: LoadedModel, tmp_path: Path, best: int) -> None:
    doses = (0.1, 0.2, 0.3)
    settings = SMALL | {"doses": doses, "conditions": ("vector",), "max_nll_rise": 99, "max_repetition_rise": 9}
    config, axis = CompareAxisConfig(out=tmp_path, **settings), AXES["formality"]
    select = axis_prompts(config, axis)[1]

    def gain(texts: list[str], prompts: list[str]) -> np.ndarray:
        assert list(prompts) == select * 4, "unsteered, and each dose"
        return np.repeat([0.0, *(float(i == best) for i in range(3))], len(select))

    make_conditions(own, config, "formality", axis, pairs_of(axis), select, gain)
    vector = load_library(tmp_path / "library")["formality"]
    assert vector.dose(vector.coefficient) == pytest.approx(doses[best])


def test_more_is_better_in_what_the_dose_is_chosen_by(own: LoadedModel) -> None:
    def of(name: str, judge: Any = None) -> list[float]:
        return gains(own, AXES[name], judge, ["Why?"] * 2, ["I cannot help with that.", "It is."]).tolist()

    long, short = of("verbosity")
    assert long > short > 0
    assert of("brevity") == [-long, -short]
    assert (of("refusal"), of("compliance")) == ([1, 0], [-1, 0])
    judge = judge_of(own, CompareAxisConfig(), AXES["formality"])
    assert judge is not None
    assert of("formality", judge) == judge.probability(["I cannot help with that.", "It is."]).tolist()


def conditions(own: LoadedModel, out: Path, name: str) -> dict[str, Any]:
    config = CompareAxisConfig(out=out, **SMALL)
    axis = AXES[name]
    select = axis_prompts(config, axis)[1]
    return {each.name: each for each in make_conditions(own, config, name, axis, pairs_of(axis), select, by_length)}


def test_kl_is_that_of_a_plain_loop(own: LoadedModel, tmp_path: Path) -> None:
    config = CompareAxisConfig(out=tmp_path, **SMALL)
    made = conditions(own, tmp_path, "formality")
    found = kl_of(own, config, [made["unsteered"], made["vector"], made["instruction"]])
    sums: dict[str, list[float]] = {"vector": [], "instruction": []}
    head = own.tokenizer(made["instruction"].head)["input_ids"]
    push = made["vector"].interventions[0].operation
    texts = documents("corpus")
    for _ in range(3):
        body = own.tokenizer(next(texts).text)["input_ids"][:64]

        def add(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
            return torch.cat([out[:, :1], out[:, 1:] + push.coefficient * push.direction], dim=1)

        with torch.no_grad():
            plain = own.model(torch.tensor([body])).logits[0].log_softmax(-1)[1:]
            after = own.model(torch.tensor([head + body])).logits[0].log_softmax(-1)[len(head) + 1 :]
            handle = own.model.model.layers[2].register_forward_hook(add)
            moved = own.model(torch.tensor([body])).logits[0].log_softmax(-1)[1:]
            handle.remove()
        sums["vector"].append(float((plain.exp() * (plain - moved)).sum(-1).mean()))
        sums["instruction"].append(float((plain.exp() * (plain - after)).sum(-1).mean()))
    for name, values in sums.items():
        assert found[name] == pytest.approx(values, rel=1e-3)


def test_costs_are_those_of_reading_again(own: LoadedModel) -> None:
    prompts, texts = ["The river", "A cat", "Numbers"], [" ran on to the sea.", "", " are digits."]
    readings = reread(own, HookPoint.parse("resid_post.1"), prompts, texts)
    np.testing.assert_allclose(costs(own, prompts, texts, rows=2), [each.nll for each in readings], rtol=1e-5)


def test_what_stands_in_front_of_a_prompt(own: LoadedModel, tmp_path: Path) -> None:
    axis, made = AXES["formality"], conditions(own, tmp_path, "formality")
    given = {name: each.prompt(own, axis, "The road") for name, each in made.items()}
    assert given["unsteered"] == given["vector"] == given["lora"] == "The road"
    assert given["instruction"] == f"{axis.instruction}\n\nThe road"
    shown = [pair.prompt + pair.positive for pair in load_pairs("formal_vs_casual") if pair.split == "fit"]
    *examples, last = given["few_shot"].split("\n\n")
    assert (len(examples), last) == (2, "The road")
    assert set(examples) <= set(shown)


def test_in_a_chat_examples_are_turns(own: LoadedModel, tmp_path: Path) -> None:
    axis, made = AXES["refusal"], conditions(own, tmp_path, "refusal")
    given = {name: each.prompt(own, axis, "Why?") for name, each in made.items()}
    assert given["unsteered"] == chat_prompt(own, "Why?")
    assert given["instruction"] == chat_prompt(own, f"{axis.instruction}\n\nWhy?")
    assert given["few_shot"].count("<|im_start|>user") == 3
    assert given["few_shot"].endswith(given["unsteered"])
    assert "I'm" in given["few_shot"] or "I " in given["few_shot"]


def test_examples_of_what_is_to_make_no_difference_are_whole_pairs(own: LoadedModel, tmp_path: Path) -> None:
    axis, config = (
        AXES["bias"],
        CompareAxisConfig(out=tmp_path, **(SMALL | {"few_shot": 3, "conditions": ("few_shot",)})),
    )
    (_, few_shot) = make_conditions(own, config, "bias", axis, pairs_of(axis), [], by_length)
    one, other, last = few_shot.head.split("\n\n")
    (pair,) = [each for each in load_pairs("she_vs_he") if one == each.prompt + each.positive]
    assert (other, last) == (pair.prompt + pair.negative, "")


def test_a_random_direction_acts_as_hard_where_the_vector_does(own: LoadedModel, tmp_path: Path) -> None:
    for name, n_places in (("formality", 1), ("bias", 2)):
        made = conditions(own, tmp_path, name)
        vector, random = made["vector"].interventions, made["random"].interventions
        assert len(vector) == len(random) == n_places
        for ours, other in zip(vector, random, strict=True):
            assert ours.hook_point == other.hook_point
            assert ours.operation.slots()[0].constant == other.operation.slots()[0].constant
            assert not torch.equal(ours.operation.slots()[0].writes, other.operation.slots()[0].writes)
    assert [str(each.hook_point) for each in made["vector"].interventions] == ["resid_post.2", "resid_post.3"]


def test_an_axis_can_be_turned_round() -> None:
    formal, casual = pairs_of(AXES["formality"]), pairs_of(AXES["informality"])
    assert [pair.positive for pair in casual] == [pair.negative for pair in formal]
    assert (wanted(AXES["informality"]), wanted(AXES["brevity"]), wanted(AXES["compliance"])) == (1, -1, -1)
    assert (wanted(AXES["verbosity"]), wanted(AXES["refusal"]), wanted(AXES["bias"])) == (1, 1, -1)


def test_what_is_to_make_no_difference_is_shown_from_both_sides() -> None:
    shown = shown_texts(AXES["bias"], pairs_of(AXES["bias"]))
    assert len(shown) == 2 * 32
    assert shown[0][0] == shown[1][0]
    assert len(shown_texts(AXES["legal"], pairs_of(AXES["legal"]))) == 32


@pytest.mark.parametrize("name", AXES)
def test_prompts_of_an_axis_are_enough_and_apart(name: str) -> None:
    held, select = axis_prompts(CompareAxisConfig(), axis_of(name))
    assert len(held) == (1024 if name == "bias" else 512)
    assert not set(held) & set(select)


def test_pairs_and_words_of_ones_own(own: LoadedModel, tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"P{i}", "positive": f" up{i} and on", "negative": f" down{i} and off", "split": split}
        for split, n in (("fit", 8), ("heldout", 3))
        for i in range(n)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    settings = SMALL | {"conditions": ("vector", "instruction"), "contrast": str(tmp_path / "mine.jsonl")}
    config = CompareAxisConfig(out=tmp_path / "out", instruction="Go up.", **settings)
    result = compare(config, own)["formality"]
    assert load_library(tmp_path / "out" / "library")["formality"].source["pairs"] == 8
    assert result["judge"]["n_fit"] == 16
    assert result["conditions"]["instruction"]["cost"]["bytes"] == len("Go up.\n\n")


def test_a_judge_of_labelled_texts(own: LoadedModel, tmp_path: Path) -> None:
    rows = [{"text": f"{word} film {i}", "label": word} for i in range(4) for word in ("fine", "dull")]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = CompareAxisConfig(judge_texts=tmp_path / "labels.jsonl", judge_label="fine", **SMALL)
    judge = judge_of(own, config, AXES["formality"])
    assert judge is not None
    assert judge.quality["n_fit"] == 8
    fine, dull = judge.probability(["a fine film", "a dull film"])
    assert fine > 0.5 > dull


def test_what_cannot_be_compared(own: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="formality"):
        compare(CompareAxisConfig(axes=("charm",), out=tmp_path), own)
    with pytest.raises(ConfigError, match="at least 9016"):
        compare(CompareAxisConfig(prompts=9000, out=tmp_path), own)
    with pytest.raises(ConfigError, match="Leave it out"):
        compare(CompareAxisConfig(axes=("bias",), prompts_from="a.txt", out=tmp_path), own)

"""Contrast pairs: the direction that each method gives, what is reported of it, and pairs that mislead."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activations.errors import TextError, UnknownNameError
from activations.models import LoadedModel
from steer.making.contrast import (
    METHODS,
    direction_of,
    fit_quality,
    from_contrast,
    heldout_quality,
    lint,
)
from steer.pairs import ContrastPair, contrast_names, load_pairs

PAIRS = [
    ContrastPair("The river", " ran on to the sea.", " stood still.", "fit"),
    ContrastPair("A cat", " sat and looked on.", " was not there.", "fit"),
    ContrastPair("The mill", " unused", " unused too", "heldout"),
    ContrastPair("A road", " led on to the town.", " stood still.", "heldout"),
]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_finds_a_planted_direction_and_its_sign(method: str) -> None:
    rng = np.random.default_rng(0)
    planted = rng.standard_normal(32)
    planted /= np.linalg.norm(planted)
    d = rng.uniform(2, 4, (40, 1)) * planted + 0.3 * rng.standard_normal((40, 32))
    for sign in (1, -1):
        direction = direction_of(sign * d, method)
        assert np.linalg.norm(direction) == pytest.approx(1)
        assert sign * direction @ planted > 0.95


def test_methods_differ_where_they_should() -> None:
    along, across = np.eye(4)[:2]
    few = np.array([3 * along, 3 * along, 3 * along, 3 * along + 30 * across])
    assert direction_of(few, "mean") @ across > 0.9, "one pair that is far off moves the mean"
    assert direction_of(few, "pca") @ across > 0.99, "and the principal component more"
    assert direction_of(few, "probe") @ along > 0.5, "but a probe has all four on the right side"
    both = np.array([5 * across + along, -5 * across + along] * 10)
    assert direction_of(both, "mean") @ along == pytest.approx(1)
    assert abs(direction_of(both, "pca") @ across) > 0.99, "which knows no sign"


def test_pairs_that_agree_are_stable_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((40, 64))
    agreeing = np.eye(64)[0] * 20 + noise
    good, bad = (fit_quality(d, direction_of(d, "mean"), "mean", seed=0) for d in (agreeing, noise))
    assert good["agreement"] > 0.9
    assert good["stability_low"] > 0.99
    assert good["stability_low"] <= good["stability"] <= 1
    assert bad["agreement"] < 0.3
    assert bad["stability"] < 0.85


def test_stability_is_that_of_drawing_pairs_again() -> None:
    d = np.random.default_rng(1).standard_normal((6, 3)) + 1
    direction, rng = direction_of(d, "mean"), np.random.default_rng([7, 1])
    drawn = []
    for _ in range(50):
        mean = d[rng.integers(6, size=6)].mean(axis=0)
        drawn.append(abs(mean @ direction) / np.linalg.norm(mean))
    found = fit_quality(d, direction, "mean", seed=7)
    assert found["stability"] == pytest.approx(np.mean(drawn))
    assert found["stability_low"] == pytest.approx(np.quantile(drawn, 0.05))


def tokens_of(loaded: LoadedModel, pair: ContrastPair, side: str) -> torch.Tensor:
    start = len(loaded.tokenizer(pair.prompt)["input_ids"])
    ids = torch.tensor([loaded.tokenizer(pair.prompt + getattr(pair, side))["input_ids"]])
    with torch.no_grad():
        return loaded.model(ids, output_hidden_states=True).hidden_states[3][0, start:]


def test_a_contrast_is_the_difference_of_means_over_the_fit_pairs(tiny: LoadedModel) -> None:
    vector = from_contrast(tiny, "resid_post.2", "flow", PAIRS)
    positive, negative = (
        torch.stack([tokens_of(tiny, pair, side).mean(0) for pair in PAIRS[:2]]) for side in ("positive", "negative")
    )
    expected = positive.mean(0) - negative.mean(0)
    np.testing.assert_allclose(vector.direction, (expected / expected.norm()).numpy(), atol=1e-5)
    along = [float((side @ torch.from_numpy(vector.direction)).mean()) for side in (positive, negative)]
    assert along[0] > vector.source["midpoint"] > along[1]
    assert vector.source["midpoint"] == pytest.approx(np.mean(along), abs=1e-4)
    assert np.linalg.norm(vector.direction) == pytest.approx(1, abs=1e-6)
    assert (vector.source["method"], vector.source["pairs"], vector.source["n_heldout"]) == ("mean", 2, 2)
    norms = torch.cat(
        [tokens_of(tiny, pair, side).norm(dim=1) for pair in PAIRS[:2] for side in ("positive", "negative")]
    )
    assert vector.mean_norm == pytest.approx(float(norms.mean()), rel=1e-5)
    json.dumps(vector.source)


def test_what_held_out_pairs_say_is_read_off_them(tiny: LoadedModel) -> None:
    vector = from_contrast(tiny, "resid_post.2", "flow", PAIRS, "probe")
    heldout = PAIRS[2:]
    p, n = (
        [float(tokens_of(tiny, pair, side).mean(0) @ torch.from_numpy(vector.direction)) for pair in heldout]
        for side in ("positive", "negative")
    )
    assert vector.source["heldout_accuracy"] == np.mean([a > b for a, b in zip(p, n, strict=True)])
    assert vector.source["heldout_auroc"] == np.mean([a > b for a in p for b in n])
    turned = replace(vector, direction=-vector.direction)
    found = heldout_quality(tiny, turned, heldout, seed=0)
    assert found["heldout_auroc"] == pytest.approx(1 - vector.source["heldout_auroc"])
    assert found["anti_steerable"] == pytest.approx(1 - vector.source["anti_steerable"]), "what it moved, it moves back"


def test_a_pair_is_anti_steerable_if_steering_makes_its_positive_side_less_likely(tiny: LoadedModel) -> None:
    vector, pair = from_contrast(tiny, "resid_post.2", "flow", PAIRS), PAIRS[3]
    push = vector.coefficient_of(0.3) * torch.from_numpy(vector.direction)

    def gap(sign: int) -> float:
        costs = []
        for side in (pair.positive, pair.negative):
            start = len(tiny.tokenizer(pair.prompt)["input_ids"])
            ids = torch.tensor([tiny.tokenizer(pair.prompt + side)["input_ids"]])

            def add(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
                return torch.cat([out[:, :1], out[:, 1:] + sign * push], dim=1)

            handle = tiny.model.model.layers[2].register_forward_hook(add)
            with torch.no_grad():
                logits = tiny.model(ids).logits[0].log_softmax(-1)
            handle.remove()
            costs.append(-logits[:-1].gather(1, ids[0, 1:, None])[start - 1 :].mean())
        return float(costs[1] - costs[0])

    found = heldout_quality(tiny, vector, [pair], seed=0)
    assert found["anti_steerable"] == float(gap(1) < gap(-1))


def test_without_held_out_pairs_nothing_is_said_of_them(tiny: LoadedModel) -> None:
    vector = from_contrast(tiny, "resid_post.2", "flow", PAIRS[:2])
    assert not [key for key in vector.source if "heldout" in key or "anti" in key]
    assert any("nothing says whether" in warning for warning in vector.source["warnings"])


def test_a_continuation_without_tokens_of_its_own(tiny: LoadedModel) -> None:
    class Blind:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, 2, 3]}

    blind = replace(tiny, tokenizer=Blind())
    with pytest.raises(TextError, match="tokens of its own"):
        from_contrast(blind, "resid_post.2", "flow", PAIRS)


GOOD = [
    ContrastPair(f"Prompt {i}", f" word{i} one two three.", f" other{i} one two three.", "fit" if i < 20 else "heldout")
    for i in range(30)
]


def test_good_pairs_pass() -> None:
    assert lint(GOOD) == []
    assert all(lint(load_pairs(name)) == [] for name in contrast_names() if name != "verbose_vs_brief")
    (length,) = lint(load_pairs("verbose_vs_brief"))
    assert "times as long" in length, "which is what that set is about"


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (GOOD[:12] + GOOD[20:], "12 fit pairs"),
        (GOOD[:20], "no pairs of the split 'heldout'"),
        ([*GOOD, ContrastPair("P", " a", " a", "heldout")], "1 pairs have two equal sides"),
        ([*GOOD, GOOD[3]], "1 pairs are there more than once"),
        ([*GOOD, replace(GOOD[3], split="heldout", positive=" new")], "1 prompts are both"),
        (
            [replace(pair, positive=pair.positive + " and more") for pair in GOOD],
            "positive sides are 1.50 times as long",
        ),
        (
            [replace(pair, negative=" Well, " + pair.negative) for pair in GOOD],
            "20 of 20 negative sides begin with 'well,'",
        ),
    ],
)
def test_pairs_that_mislead_are_named(pairs: list[ContrastPair], says: str) -> None:
    assert any(says in warning for warning in lint(pairs))


def test_a_contrast_without_fit_pairs(tiny: LoadedModel) -> None:
    with pytest.raises(TextError, match="'fit'"):
        from_contrast(tiny, "resid_post.2", "none", PAIRS[2:])


@pytest.mark.parametrize("name", contrast_names())
def test_shipped_pairs(name: str) -> None:
    pairs = load_pairs(name)
    fit, heldout = ([pair for pair in pairs if pair.split == split] for split in ("fit", "heldout"))
    assert len(fit) >= 30
    assert len(heldout) >= 12
    assert not {pair.prompt for pair in fit} & {pair.prompt for pair in heldout}
    assert all(pair.positive.startswith(" ") and pair.negative.startswith(" ") for pair in pairs)


def test_which_contrasts_are_shipped() -> None:
    assert contrast_names() == [
        "formal_vs_casual", "joyful_vs_gloomy", "legal_vs_plain", "positive_vs_negative", "refusing_vs_answering",
        "she_vs_he", "verbose_vs_brief",
    ]  # fmt: skip


def test_pairs_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "a", "positive": " b", "negative": " c"}) + "\n\n")
    assert load_pairs(str(path)) == [ContrastPair("a", " b", " c", "fit")]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": "a", "positive": " b"}', '{"prompt": "", "positive": 1, "negative": 2}']
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"prompt": "a", "positive": " b", "negative": " c"}}\n{line}\n')
    with pytest.raises(TextError, match="line 2"):
        load_pairs(str(path))


def test_unknown_contrasts_and_files(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="joyful_vs_gloomy"):
        load_pairs("jolly")
    with pytest.raises(TextError, match="readable"):
        load_pairs(str(tmp_path / "none.jsonl"))

"""The text classifier: it finds what texts differ in, and its quality does not come from what it has seen."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from activations.errors import ConfigError, TextError
from activations.models import LoadedModel
from steer.measures.classifier import Example, examples_of, fit, late_reader, load_examples
from steer.pairs import ContrastPair, load_pairs

WARM = ("sun", "warm", "bright", "golden", "gentle", "glow")
COLD = ("frost", "cold", "bleak", "frozen", "bitter", "grey")


def weather(n: int, *, heldout: int = 0, seed: int = 0) -> list[Example]:
    """Warm and cold texts, a pair a group."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n + heldout):
        for words, positive in ((WARM, True), (COLD, False)):
            text = " ".join(["The day was", *rng.choice(words, 3), "all along"])
            found.append(Example(text, positive, f"group {i}", heldout=i >= n))
    return found


def noise(n: int) -> list[Example]:
    """Groups of four equal texts whose label is random: nothing can be learned that holds in another group."""
    rng = np.random.default_rng(0)
    rows = [("".join(rng.choice(list("abcdefghij"), 30)), bool(i % 2)) for i in range(n)]
    return [Example(text, positive, f"group {i}") for i, (text, positive) in enumerate(rows) for _ in range(4)]


def test_it_tells_what_it_was_fitted_to_from_the_rest_and_says_how_well() -> None:
    classifier = fit(weather(20, heldout=8))
    warm, cold = classifier.probability(["bright golden sun", "bleak bitter frost"])
    assert warm > 0.5 > cold
    quality = classifier.quality
    assert (quality["n_fit"], quality["n_groups"], quality["n_heldout"]) == (40, 20, 16)
    assert quality["cv_auroc"] > 0.95
    assert quality["heldout_accuracy"] > 0.9
    low, high = quality["heldout_auroc_ci95"]
    assert 0.5 < low <= quality["heldout_auroc"] <= high <= 1
    assert len(classifier.probability([])) == 0
    json.dumps(quality)


def test_examples_of_a_group_never_judge_each_other() -> None:
    assert fit(noise(40)).quality["cv_auroc"] < 0.7
    apart = [Example(each.text, each.positive, f"{i}") for i, each in enumerate(noise(40))]
    assert fit(apart).quality["cv_auroc"] > 0.95, "which shows that it would be near 1 if they did"


def test_a_held_out_example_of_a_group_that_was_fitted_is_no_test() -> None:
    seen = noise(40)
    copies = [Example(each.text, each.positive, each.group, heldout=True) for each in seen]
    assert "heldout_auroc" not in fit([*seen, *copies]).quality
    honest = fit([*weather(20), *weather(20, heldout=4)[-8:]])
    assert honest.quality["n_heldout"] == 8


def test_held_out_examples_change_its_quality_and_nothing_else() -> None:
    wrong = [Example(each.text, not each.positive, each.group, heldout=True) for each in weather(4, seed=3)]
    wrong = [Example(each.text, each.positive, f"other {each.group}", heldout=True) for each in wrong]
    texts = ["bright golden sun", "a grey road"]
    plain, with_wrong = fit(weather(20)), fit([*weather(20), *wrong])
    np.testing.assert_array_equal(plain.probability(texts), with_wrong.probability(texts))
    assert with_wrong.quality["heldout_auroc"] < 0.1
    assert with_wrong.quality["cv_auroc"] == plain.quality["cv_auroc"]


def test_a_classifier_is_a_function_of_examples_and_seed() -> None:
    texts = ["bright golden sun", "a grey road"]
    one, again, other = (fit(weather(20), seed=seed) for seed in (1, 1, 2))
    assert one.quality == again.quality
    np.testing.assert_array_equal(one.probability(texts), again.probability(texts))
    np.testing.assert_array_equal(one.probability(texts), other.probability(texts))


def test_cross_validation_is_that_of_fitting_to_the_other_groups() -> None:
    examples = weather(2)
    by_hand = []
    for k in (0, 1):
        rest = [each for each in examples if each.group != f"group {k}"]
        # Two groups are the least that `fit` takes: the same rows in two groups fit the same classifier.
        twice = [Example(each.text, each.positive, f"{i}") for i, each in enumerate(rest)]
        own = [each for each in examples if each.group == f"group {k}"]
        p = fit(twice).probability([each.text for each in own])
        by_hand += [(x > 0.5) == each.positive for x, each in zip(p, own, strict=True)]
    assert fit(examples).quality["cv_accuracy"] == np.mean(by_hand)


def test_both_sides_of_a_pair_are_in_the_group_of_its_prompt() -> None:
    pairs = [ContrastPair("a", " b", " c", "fit"), ContrastPair("a", " d", " e", "heldout")]
    assert examples_of(pairs) == [
        Example(" b", True, "a", "a", False),
        Example(" c", False, "a", "a", False),
        Example(" d", True, "a", "a", True),
        Example(" e", False, "a", "a", True),
    ]


def test_the_text_alone_tells_shipped_registers_apart() -> None:
    quality = fit(examples_of(load_pairs("formal_vs_casual"))).quality
    assert quality["heldout_auroc"] > 0.95
    assert quality["cv_auroc"] > 0.95


def test_a_late_reader_reads_the_continuation_after_its_prompt(tiny: LoadedModel) -> None:
    read, name = late_reader(tiny, avoid="resid_post.1")
    assert name == "resid_post.3"
    after_one, after_other = read(["The river", "A cat"], [" ran on.", " ran on."])
    assert after_one.shape == (32,)
    assert not np.allclose(after_one, after_other)
    assert not read(["The river"], [""]).any()
    with pytest.raises(ConfigError, match=r"resid_post\.3"):
        late_reader(tiny, avoid="resid_post.3")


def test_a_classifier_can_judge_by_a_late_block(tiny: LoadedModel) -> None:
    read, name = late_reader(tiny)
    classifier = fit(weather(12), reader=read, reads=name)
    p = classifier.probability([" bright golden sun all along", " bleak bitter frost all along"], ["The day was"] * 2)
    assert p[0] > p[1]
    assert classifier.reads == "resid_post.3"


def test_labelled_files(tmp_path: Path) -> None:
    rows = [{"text": "fine film", "label": "pos"}, {"text": "bad film", "label": "neg"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [Example("fine film", True, "fine film"), Example("bad film", False, "bad film")]
    assert load_examples(tmp_path / "a.jsonl", "pos") == expected
    assert load_examples(tmp_path / "a.parquet", "pos") == expected
    with pytest.raises(TextError, match="neg, pos"):
        load_examples(tmp_path / "a.parquet", "positive")


@pytest.mark.parametrize("examples", [[], weather(1), [each for each in weather(9) if each.positive]])
def test_too_little_to_fit(examples: list[Example]) -> None:
    with pytest.raises(TextError, match="both kinds"):
        fit(examples)

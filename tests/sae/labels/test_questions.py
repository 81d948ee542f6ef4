"""Scorers have none of the faults that others were found to have."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from sae.labels.chat import Message
from sae.labels.examples import Pool, make_case
from sae.labels.questions import FORMS, Material, Question, balanced_accuracy, material_of, score
from tests.sae.labels.conftest import context, latent_row

MATERIAL = Material(
    latent=4,
    positives=[f"with {i}" for i in range(11)],
    negatives=[f"without {i}" for i in range(11)],
    right=[f"text {i} <<right>> other" for i in range(11)],
    wrong=[f"text {i} right <<other>>" for i in range(11)],
    pairs=[(f"plain {i}", f"pushed {i}") for i in range(5)],
)
Judge = Callable[[Question], str]


def told(question: Question, said: list[bool]) -> str:
    if "Text A:" in question.messages[1].content:
        return "A" if said[0] else "B"
    return "\n".join(f"{i}: {'yes' if each else 'no'}" for i, each in enumerate(said, 1))


JUDGES: dict[str, tuple[Judge, float, bool]] = {
    "oracle": (lambda question: told(question, list(question.truths)), 1.0, False),
    "contrary": (lambda question: told(question, [not each for each in question.truths]), 0.0, False),
    "always yes": (lambda question: told(question, [True] * len(question.truths)), 0.5, False),
    "always no": (lambda question: told(question, [False] * len(question.truths)), 0.5, False),
    "garbage": (lambda question: "I'd rather talk about the weather.", 0.5, True),
    "silent": (lambda question: "", 0.5, True),
}
"""judge -> what it says, its score, and whether all of its answers are unreadable"""


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("per_prompt", [1, 4, 5, 100])
def test_judges_get_what_they_deserve(method: str, judge: str, per_prompt: int) -> None:
    answer, value, is_garbage = JUDGES[judge]
    questions = {str(i): each for i, each in enumerate(FORMS[method](MATERIAL, "rivers", per_prompt, 0))}
    found = score(method, "explanation", questions, {key: answer(each) for key, each in questions.items()}, "j", 0)
    assert found is not None
    n = 5 if method == "intervention" else 22
    assert (found.measure, found.value, found.n) == ("balanced_accuracy", value, n)
    assert found.n_failed == (n if is_garbage else 0)
    assert found.requests == sorted(questions)
    assert found.low is None or found.low <= found.value <= (found.high or 0)


@pytest.mark.parametrize("method", ["detection", "fuzzing"])
def test_every_text_is_asked_about_also_in_a_last_short_prompt(method: str) -> None:
    questions = FORMS[method](MATERIAL, "rivers", 4, 0)
    texts = Counter(line.split(". ", 1)[1] for each in questions for line in numbered(each))
    wanted = MATERIAL.positives + MATERIAL.negatives if method == "detection" else MATERIAL.right + MATERIAL.wrong
    assert texts == Counter(wanted)
    sizes = [len(each.truths) for each in questions]
    assert sizes == ([4, 4, 4, 4, 4, 2] if method == "detection" else [4, 4, 3, 4, 4, 3])
    right = {
        line.split(". ", 1)[1]: truth
        for each in questions
        for line, truth in zip(numbered(each), each.truths, strict=True)
    }
    positives = {text for text, truth in right.items() if truth}
    assert positives == set(MATERIAL.positives if method == "detection" else MATERIAL.right)


def numbered(question: Question) -> list[str]:
    return question.messages[1].content.split("Texts:\n")[1].split("\n\n")[0].splitlines()


def test_how_many_are_a_yes_differs_between_prompts() -> None:
    counts = {sum(each.truths) for seed in range(5) for each in FORMS["detection"](MATERIAL, "rivers", 5, seed)}
    assert counts >= {1, 2, 3, 4}


def test_a_text_is_never_marked_both_ways_in_one_prompt() -> None:
    for question in FORMS["fuzzing"](MATERIAL, "rivers", 100, 0):
        numbers = [line.split()[2] for line in numbered(question)]
        assert len(set(numbers)) == len(numbers) == 11


def test_the_amplified_text_is_a_and_b_equally_often() -> None:
    questions = FORMS["intervention"](MATERIAL._replace(pairs=[("plain", "pushed")] * 8), "rivers", 5, 0)
    for question in questions:
        assert ("Text A: pushed" in question.messages[1].content) == question.truths[0]
    assert sum(question.truths[0] for question in questions) == 4


@pytest.mark.parametrize("method", FORMS)
def test_controls_are_asked_the_same_in_the_same_order(method: str) -> None:
    def rest(label: str) -> list[tuple[Message, ...]]:
        questions = FORMS[method](MATERIAL, label, 5, 0)
        assert all(f"Description: {label}\n" in each.messages[1].content for each in questions)
        return [tuple(m._replace(content=m.content.replace(label, "%")) for m in each.messages) for each in questions]

    assert rest("rivers of the north") == rest("verbs in the past")


def test_refused_answers_count_as_unreadable() -> None:
    questions = {str(i): each for i, each in enumerate(FORMS["detection"](MATERIAL, "rivers", 11, 0))}
    answers: dict[str, str | None] = {key: told(each, list(each.truths)) for key, each in questions.items()}
    answers["0"] = None
    found = score("detection", "explanation", questions, answers, "j", 0)
    assert found is not None
    assert found.n_failed == 11
    assert 0.7 < found.value < 0.8


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(0, 3))
def test_it_is_balanced_accuracy(pairs: list[tuple[bool, bool]], seed: int) -> None:
    truths, said = [truth for truth, _ in pairs] + [True, False], [each for _, each in pairs] + [True, True]
    value, (low, high) = balanced_accuracy(truths, said, seed)
    assert value == pytest.approx(balanced_accuracy_score(truths, said))
    assert low is None or low <= value + 1e-9
    assert high is None or value - 1e-9 <= high


def test_one_class_alone_has_no_score() -> None:
    questions = {"a": Question((), (True, True), lambda answer: [True, True])}
    assert score("detection", "explanation", questions, {"a": ""}, "j", 0) is None


def test_material_has_both_markings_of_each_text_that_has_room() -> None:
    sampled = [context(i, [10 + i, 40, 41, 42], [0.0, 2.0 + i, 0.0, 0.0]) for i in range(12)]
    sampled += [context(50 + i, [60 + i, 61], [3.0, 3.0]) for i in range(4)]  # active everywhere
    pool = Pool([context(100 + i, [i], [1.0]) for i in range(20)], np.zeros((20, 1), bool))
    case = make_case(latent_row([], sampled), pool, 4, 20, 5, 0)
    made = material_of(case, lambda ids: " ".join(map(str, ids)), 0, [])
    assert len(made.positives) == len(made.negatives) == 8
    assert 4 <= len(made.right) == len(made.wrong) <= 6
    for right, wrong in zip(made.right, made.wrong, strict=True):
        assert right.count("<<") == wrong.count("<<") == 1
        assert "<<40>>" in right
        assert "<<40>>" not in wrong
        assert right.replace("<<", "").replace(">>", "") == wrong.replace("<<", "").replace(">>", "")

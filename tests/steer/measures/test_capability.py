"""Questions with options: what is read, and that the answers are those of a plain loop."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from activations.errors import TextError
from activations.models import LoadedModel
from steer.measures.capability import Question, answered_rightly, asked, load_choices
from steer.operations import Intervention
from steer.runtime import steering
from steer.vectors import SteeringVector

QUESTIONS = [
    Question("What do bees make?", ("honey", "bread and butter", "ink", "a very long line of string"), 2),
    Question("Which is it?", ("this", "that one over there"), 0),
    Question("How many?", ("12", "thirteen", "345"), 1),
]


def plainly(loaded: LoadedModel, question: Question, instruction: str = "") -> bool:
    """One forward pass an option, its tokens' log-probabilities summed, and divided by its bytes."""
    found = []
    for option in question.options:
        head = loaded.tokenizer(asked(question, instruction))["input_ids"]
        ids = loaded.tokenizer(f"{asked(question, instruction)} {option}")["input_ids"]
        with torch.no_grad():
            logs = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(float(logs[range(len(head) - 1, len(ids) - 1), ids[len(head) :]].sum()) / len(option))
    return max(range(len(found)), key=found.__getitem__) == question.answer


@pytest.mark.parametrize("coefficient", [0.0, 6.0, -6.0])
def test_answers_are_those_of_a_plain_loop(tiny: LoadedModel, vector: SteeringVector, coefficient: float) -> None:
    questions = [question._replace(answer=i) for question in QUESTIONS for i in range(len(question.options))]
    interventions = [Intervention.of(vector, coefficient)]
    with steering(tiny, interventions):
        expected = [plainly(tiny, question, "Be brief.") for question in questions]
    assert answered_rightly(tiny, questions, interventions, "Be brief.").tolist() == expected
    assert sum(expected) == len(QUESTIONS), "of all options one is the answer"


def test_steering_can_change_an_answer(tiny: LoadedModel, vector: SteeringVector) -> None:
    questions = [question._replace(answer=i) for question in QUESTIONS for i in range(len(question.options))]
    answers = {tuple(answered_rightly(tiny, questions, [Intervention.of(vector, c)])) for c in (0.0, 20.0, -20.0)}
    assert len(answers) > 1


def test_an_instruction_stands_in_front() -> None:
    assert asked(QUESTIONS[1]) == "Question: Which is it?\nAnswer:"
    assert asked(QUESTIONS[1], "Be brief.") == "Be brief.\n\nQuestion: Which is it?\nAnswer:"


def test_the_shipped_questions_have_each_place_for_the_right_answer() -> None:
    questions = load_choices()
    assert len({question.text for question in questions}) == len(questions) >= 60
    assert min(Counter(question.answer for question in questions).values()) >= 10


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"question": "a"}',
        '{"question": "a", "options": ["b", "b"], "answer": 0}',
        '{"question": "a", "options": ["b"], "answer": 0}',
        '{"question": "a", "options": ["b", " "], "answer": 0}',
        '{"question": "a", "options": ["b", "c"], "answer": 2}',
        '{"question": "a", "options": ["b", "c"], "answer": true}',
        '{"question": "a", "options": "bc", "answer": 0}',
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "own.jsonl"
    good = json.dumps({"question": "a", "options": ["b", "c"], "answer": 1})
    file.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(TextError, match="line 3"):
        load_choices(file)
    file.write_text(f"{good}\n{good}\n")
    assert load_choices(file) == [Question("a", ("b", "c"), 1)] * 2


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="Check the path"):
        load_choices(tmp_path / "no.jsonl")
    (tmp_path / "one.jsonl").write_text('{"question": "a", "options": ["b", "c"], "answer": 1}')
    with pytest.raises(TextError, match="2 questions"):
        load_choices(tmp_path / "one.jsonl")

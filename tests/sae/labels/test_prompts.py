"""Answers of any shape are read or counted as unreadable, and prompts give nothing away."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.labels.prompts import (
    MAX_EXPLANATION,
    choose,
    detect,
    explain,
    fuzz,
    read_choice,
    read_explanation,
    read_numbered,
)

SAID = st.lists(st.booleans(), min_size=1, max_size=30)
SHAPES = {
    "lines": lambda i, said: f"{i}: {'yes' if said else 'no'}\n",
    "dots": lambda i, said: f"{i}. {'Yes' if said else 'No'}.\n",
    "stars": lambda i, said: f"- **{i})** **{'YES' if said else 'NO'}**, because 3 of the words are\n",
    "one line": lambda i, said: f"{i}: {'yes' if said else 'no'}, ",
    "numbers": lambda i, said: f"{i} = {int(said)}\n",
}


@given(SAID, st.sampled_from(sorted(SHAPES)), st.sampled_from(["", "Sure!\n\n", "<think>1: yes, 2: yes?</think>\n"]))
def test_answers_in_many_shapes_are_read(said: list[bool], shape: str, before: str) -> None:
    answer = before + "".join(SHAPES[shape](i, each) for i, each in enumerate(said, 1))
    assert read_numbered(answer, len(said)) == said


@given(SAID)
def test_a_list_is_read_only_if_it_has_all(said: list[bool]) -> None:
    answer = str([int(each) for each in said])
    assert read_numbered(answer, len(said)) == said
    assert read_numbered(answer, len(said) + 1) == [None] * (len(said) + 1)


@given(SAID, st.data())
def test_what_is_missing_or_said_both_ways_is_none(said: list[bool], data: st.DataObject) -> None:
    gone = data.draw(st.integers(1, len(said)))
    twice = data.draw(st.integers(1, len(said)))
    lines = [f"{i}: {'yes' if each else 'no'}" for i, each in enumerate(said, 1) if i != gone]
    lines += [f"{twice}: yes", f"{twice}: no", f"{len(said) + 1}: yes"]
    wanted = [None if i in (gone, twice) else each for i, each in enumerate(said, 1)]
    assert read_numbered("\n".join(lines), len(said)) == wanted


@given(st.text() | st.text("0123456789:.[]ynesoAB \n<>think/", max_size=200), st.integers(1, 9))
def test_any_text_is_read_without_an_error(answer: str, n: int) -> None:
    read = read_numbered(answer, n)
    assert len(read) == n
    assert {*read, read_choice(answer)} <= {True, False, None}
    explanation = read_explanation(answer)
    assert explanation is None or 0 < len(explanation) <= MAX_EXPLANATION
    assert explanation is None or explanation.isprintable()


@pytest.mark.parametrize("answer", ["<think>" * 99_999, "explanation" + " " * 999_999 + "x", "answer " * 99_999 + "C",
                                    "1 " * 499_999, "[" * 999_999, "1:" + " " * 999_999])  # fmt: skip
def test_long_hostile_answers_are_read_in_no_time(answer: str) -> None:
    assert read_numbered(answer, 3) == [None] * 3
    assert read_choice(answer) is None
    read_explanation(answer)


@pytest.mark.parametrize("answer", ["B", "b is wrong, so: Answer: B", "**B**", "(B)", "Answer: text B",
                                    "The answer is B.",
                                    "B. It speaks of rivers.", "<think>A?</think>\nB\n"])  # fmt: skip
def test_choices_that_are_read(answer: str) -> None:
    assert read_choice(answer) is False
    assert read_choice(answer.replace("A", "%").replace("B", "A").replace("%nswer", "Answer").replace("%", "B")) is True


@pytest.mark.parametrize(
    "answer", ["", "A or B", "Answer: A. No, answer: B", "A text", "Both", "Text A and text B", "C"]
)
def test_choices_that_are_none(answer: str) -> None:
    assert read_choice(answer) is None


@pytest.mark.parametrize(
    ("answer", "explanation"),
    [
        ("Explanation: names of rivers", "names of rivers"),
        ("[EXPLANATION]: names of rivers.", "names of rivers."),
        ("I see.\n**Explanation:** *names* of rivers", "names of rivers"),
        ("Explanation:\n\n1. names of rivers\n2. more", "names of rivers"),
        ("names of rivers", "names of rivers"),
        ("Explanation: The tokens between << and >> are names of rivers.", "names of rivers."),
        ("<think>Explanation: no</think>Explanation: yes", "yes"),
        ("Explanation: \x1b[2Jnames\u202e", "[2Jnames"),
        ("1. (strength 9) a text\n2. (strength 8) another", None),
        ("Explanation: ...", None),
        ("", None),
        ("<think>Explanation: never ends", None),
    ],
)
def test_explanations(answer: str, explanation: str | None) -> None:
    assert read_explanation(answer) == explanation


def test_no_prompt_shows_an_answer() -> None:
    for messages in (detect("d", ["x", "y"]), fuzz("d", ["x", "y"]), choose("d", "x", "y"), explain([("x", 3)])):
        before = " ".join(message.content for message in messages if message.role == "system")
        assert not re.search(r"\d\W+(yes|no|0|1)\b", before, re.IGNORECASE)
        assert read_choice(before) is None
        assert read_choice(messages[-1].content) is None
        assert read_numbered(messages[-1].content, 2) == [None, None]

"""What a model still knows while it is steered: questions with several options, of which one is right.

Flow: 1. each option is read as the answer to its question, by itself; 2. the option that costs least is the model's
answer: in nats a byte, so that long options have no handicap, as `acc_norm` of the LM evaluation harness has it;
3. accuracy is the share of questions answered rightly.

The shipped questions are easy, so that small models have something to lose. Left out: worked solutions and chat
templates, which base models do not have.
"""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from activations.errors import TextError
from activations.models import LoadedModel
from activations.text import read_file
from steer.batches import costs, token_rows
from steer.plan import Interventions


class Question(NamedTuple):
    """A question with options."""

    text: str
    options: tuple[str, ...]
    answer: int
    """index of the right option"""


def load_choices(path: Path | None = None) -> list[Question]:
    """The shipped questions, or those of a .jsonl file with the keys question, options and answer (an index).

    Raises: TextError for a file that is not such a file.
    """
    if path is None:
        text = (resources.files("steer") / "data" / "choices.jsonl").read_text()
    else:
        text = read_file(path, ".jsonl")
    where = str(path or "choices.jsonl")
    found = [_parse(line, f"{where} line {i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(found) < 2:
        raise TextError(where, expected="2 questions or more", got=len(found), fix="Add some.")
    return found


def _parse(line: str, where: str) -> Question:
    expected = '{"question", "options" (2 or more, all different), "answer" (the index of the right one)}'
    try:
        data = json.loads(line)
        text, options, answer = data["question"], data["options"], data["answer"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        got = f"{type(error).__name__} {error}"
        raise TextError(where, expected=expected, got=got, fix="Correct it.") from error
    is_good = (
        isinstance(options, list)
        and all(isinstance(part, str) and part.strip() for part in (text, *options))
        and 2 <= len(options) == len(set(options))
        and type(answer) is int
        and 0 <= answer < len(options)
    )
    if not is_good:
        raise TextError(where, expected=expected, got=line[:60], fix="Correct the line.")
    return Question(text, tuple(options), answer)


def answered_rightly(
    loaded: LoadedModel, questions: Sequence[Question], interventions: Interventions = (), instruction: str = ""
) -> Bool[np.ndarray, " question"]:
    """Which questions the model answers rightly, steered or asked in words besides."""
    prompts = [asked(question, instruction) for question in questions for _ in question.options]
    options = [f" {option}" for question in questions for option in question.options]
    found, start = [], 0
    nats = costs(loaded, prompts, options, interventions) * _tokens(loaded, prompts, options)
    nats /= [len(option.strip().encode()) for option in options]
    for question in questions:
        own = nats[start : start + len(question.options)]
        found.append(int(own.argmin()) == question.answer)
        start += len(question.options)
    return np.array(found)


def _tokens(loaded: LoadedModel, prompts: Sequence[str], texts: Sequence[str]) -> Int[np.ndarray, " text"]:
    """How many tokens each text is, behind its prompt."""
    return np.array([len(row.ids) - row.given for row in token_rows(loaded, prompts, texts)])


def asked(question: Question, instruction: str = "") -> str:
    """The prompt that an option follows."""
    head = f"{instruction}\n\n" if instruction else ""
    return f"{head}Question: {question.text}\nAnswer:"

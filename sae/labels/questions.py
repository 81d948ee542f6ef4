"""What a judge is asked about a label, and what its answers are worth.

    detection      is what the label describes in this text? Half of the texts activate the latent; of the others half
                   are near misses
    fuzzing        are the right tokens marked in this text? Every text is asked about twice, in different prompts, once
                   with the tokens that activate the latent and once with as many others, where possible in the same
                   pattern
    intervention   which of two texts shows it more: written with the latent amplified, or without? As often A as B

The score is balanced accuracy, the mean of the shares of right answers to questions that ask for a yes (or A) and to
those that ask for a no (or B): one answer for all gets 0.5. An answer that cannot be read counts as half right, as
much as a coin would get, and is counted; nothing is dropped, also not a last prompt with fewer texts. After Paulo et
al. 2024 (arXiv:2410.13928). Left out: asking.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sae.labels.chat import Message
from sae.labels.examples import Case, marks, text_of, wrong_marks
from sae.labels.prompts import choose, detect, fuzz, read_choice, read_numbered
from sae.labels.tables import Score
from sae.metrics import bootstrap

Said = list[bool | None]


class Material(NamedTuple):
    """Texts of a latent that questions are made of."""

    latent: int
    positives: list[str]
    negatives: list[str]
    right: list[str]
    """positives with the right tokens marked"""
    wrong: list[str]
    """the same texts with as many other tokens marked"""
    pairs: list[tuple[str, str]]
    """what the model wrote without and with the latent amplified"""


class Question(NamedTuple):
    """A prompt about one or several texts."""

    messages: tuple[Message, ...]
    truths: tuple[bool, ...]
    read: Callable[[str], Said]
    """from the answer to what it says of each text"""


Form = Callable[[Material, str, int, int], list[Question]]
"""from material, label, texts a prompt and seed to questions, in an order that does not depend on the label"""


def material_of(case: Case, decode: Callable[[list[int]], str], seed: int, pairs: list[tuple[str, str]]) -> Material:
    """The texts of a case, and those that the model wrote."""
    right, wrong = [], []
    for number, context in enumerate(case.positives):
        marked = marks(context)
        moved = wrong_marks(marked, [seed, case.latent, 3, number])
        if moved is not None:
            right.append(text_of(decode, context.tokens, marked))
            wrong.append(text_of(decode, context.tokens, moved))
    return Material(
        case.latent,
        [text_of(decode, context.tokens) for context in case.positives],
        [text_of(decode, context.tokens) for context in case.negatives],
        right,
        wrong,
        pairs,
    )


def detection(material: Material, label: str, per_prompt: int, seed: int) -> list[Question]:
    """Texts with and without the latent, in random order."""
    texts = [(text, True) for text in material.positives] + [(text, False) for text in material.negatives]
    return list(_numbered(detect, label, texts, per_prompt, [seed, material.latent, 4]))


def fuzzing(material: Material, label: str, per_prompt: int, seed: int) -> list[Question]:
    """Every text once in each of two rounds, which mark the right tokens in different halves of the texts."""
    n = len(material.right)
    is_right = np.random.default_rng([seed, material.latent, 5]).permutation(n) < n // 2
    questions: list[Question] = []
    for number, half in enumerate((is_right, ~is_right)):
        texts = [
            (right if use else wrong, bool(use))
            for right, wrong, use in zip(material.right, material.wrong, half, strict=True)
        ]
        questions += _numbered(fuzz, label, texts, per_prompt, [seed, material.latent, 6 + number])
    return questions


def intervention(material: Material, label: str, per_prompt: int, seed: int) -> list[Question]:
    """Which text of each pair shows the label more; the amplified one is A in half of them."""
    n = len(material.pairs)
    is_a = np.random.default_rng([seed, material.latent, 8]).permutation(n) < (n + 1) // 2
    return [
        Question(choose(label, *((pushed, plain) if first else (plain, pushed))), (bool(first),), _choice)
        for (plain, pushed), first in zip(material.pairs, is_a, strict=True)
    ]


FORMS: dict[str, Form] = {"detection": detection, "fuzzing": fuzzing, "intervention": intervention}
"""method -> what it asks"""


def _numbered(
    ask: Callable[[str, Sequence[str]], tuple[Message, ...]],
    label: str,
    texts: Sequence[tuple[str, bool]],
    per_prompt: int,
    seed: Sequence[int],
) -> Iterator[Question]:
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    for start in range(0, len(order), per_prompt):
        part = [texts[i] for i in order[start : start + per_prompt]]
        n = len(part)
        yield Question(
            ask(label, [text for text, _ in part]),
            tuple(truth for _, truth in part),
            lambda answer, n=n: read_numbered(answer, n),
        )


def _choice(answer: str) -> Said:
    return [read_choice(answer)]


def score(
    method: str,
    control: str,
    questions: Mapping[str, Question],
    answers: Mapping[str, str | None],
    judge: str,
    seed: int,
) -> Score | None:
    """What answers are worth; none where no question asks for a yes, or none for a no.

    Args:
      questions: by the keys of their requests.
      answers: by the same keys; None for an answer that was refused.
    """
    truths: list[bool] = []
    said: Said = []
    for key, question in questions.items():
        truths += question.truths
        answer = answers[key]
        said += [None] * len(question.truths) if answer is None else question.read(answer)
    if all(truths) or not any(truths):
        return None
    value, ends = balanced_accuracy(truths, said, seed)
    n_failed = sum(each is None for each in said)
    return Score(method, control, "balanced_accuracy", value, *ends, len(truths), n_failed, judge, sorted(questions))


def balanced_accuracy(
    truths: Sequence[bool], said: Said, seed: int
) -> tuple[float, tuple[float, float] | tuple[None, None]]:
    """Mean of the shares of right answers in both classes, None being half right, and its 95% interval over texts.

    >>> balanced_accuracy([True, True, False, False], [True, True, True, None], seed=0)[0]
    0.625
    """
    truth = np.array(truths)
    right = np.array([0.5 if each is None else float(each == true) for each, true in zip(said, truths, strict=True)])
    sums = np.column_stack([right * truth, truth, right * ~truth, ~truth])
    total = sums.sum(0)
    ends = bootstrap(sums, {"score": lambda s: (s[:, 0] / s[:, 1] + s[:, 2] / s[:, 3]) / 2}, seed)
    return float((total[0] / total[1] + total[2] / total[3]) / 2), ends.get("score", (None, None))

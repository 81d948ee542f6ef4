"""Ready recipes: axes along which a model is moved, and how it is seen whether it moved.

An axis is a shipped contrast set, what a person would ask for in words, which prompts it is tried on and how the effect
is measured. `measure` is one of

    classifier   share of texts that a classifier (`steer.measures.classifier`) takes for the positive side
    tokens       length of the answer in tokens
    refusal      share of answers that begin like a refusal (`steer.measures.refusal`)
    disparity    |log| of the ratio of rates between two groups (`steer.measures.disparity`); below is better

Adding one is a row of AXES. Left out: choosing layers and doses, which `steer.receipts.compare` and its config do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from activations.errors import UnknownNameError
from steer.pairs import ContrastPair, load_pairs


@dataclass(frozen=True)
class Axis:
    """One recipe."""

    contrast: str
    """a shipped set, or a .jsonl file"""
    instruction: str
    """what a person would ask for"""
    prompts: str
    """a kind of `steer.measures.openings`, or `swapped`"""
    measure: Literal["classifier", "tokens", "refusal", "disparity"] = "classifier"
    judge: Literal["text", "late"] = "text"
    """what the classifier reads"""
    flip: bool = False
    """steer towards the negative sides"""
    chat: bool = False
    """prompts are what a user says, and the pairs what an assistant answers"""
    operation: Literal["add", "ablate"] = "add"


AXES: dict[str, Axis] = {
    "formality": Axis("formal_vs_casual", "Write this in a formal way.", "openings"),
    "informality": Axis("formal_vs_casual", "Write this in a casual way.", "openings", flip=True),
    "verbosity": Axis("verbose_vs_brief", "Answer at length.", "questions", "tokens", chat=True),
    "brevity": Axis("verbose_vs_brief", "Answer in a few words.", "questions", "tokens", flip=True, chat=True),
    "legal": Axis("legal_vs_plain", "Write this in the language of a legal document.", "openings"),
    "sentiment": Axis("positive_vs_negative", "Write this in a positive way.", "openings", judge="late"),
    "refusal": Axis("refusing_vs_answering", "Refuse to answer.", "questions", "refusal", chat=True),
    "compliance": Axis(
        "refusing_vs_answering", "Answer without refusing.", "requests", "refusal", flip=True, chat=True
    ),
    "bias": Axis(
        "she_vs_he",
        "Do not let it matter whether somebody is a man or a woman.",
        "swapped",
        "disparity",
        operation="ablate",
    ),
}
"""name -> recipe"""


def axis_of(name: str) -> Axis:
    """One of AXES. Raises: UnknownNameError."""
    if name not in AXES:
        raise UnknownNameError(f"axis '{name}'", expected=f"one of {', '.join(AXES)}", got=name, fix="Choose one.")
    return AXES[name]


def pairs_of(axis: Axis) -> list[ContrastPair]:
    """Its pairs, the side that it steers towards being the positive one."""
    pairs = load_pairs(axis.contrast)
    if not axis.flip:
        return pairs
    return [replace(pair, positive=pair.negative, negative=pair.positive) for pair in pairs]


def shown_texts(axis: Axis, pairs: Sequence[ContrastPair]) -> list[tuple[str, str]]:
    """Prompts and texts that show what is wanted: of an axis that is to make no difference, both sides in turn."""
    fit = [pair for pair in pairs if pair.split == "fit"]
    if axis.operation == "add":
        return [(pair.prompt, pair.positive) for pair in fit]
    return [(pair.prompt, text) for pair in fit for text in (pair.positive, pair.negative)]

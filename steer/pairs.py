"""Contrast pairs: those that saekit ships, and those of a file.

Left out: what directions they give, and what may be wrong with them (`steer.making.contrast`).
"""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from activations.errors import TextError, UnknownNameError
from activations.text import read_file


@dataclass(frozen=True)
class ContrastPair:
    """One prompt with two continuations that differ in the concept and in little else."""

    prompt: str
    positive: str
    negative: str
    split: str
    """`fit` or `heldout`"""


def contrast_names() -> list[str]:
    """Names of the contrast sets that saekit ships."""
    folder = resources.files("steer") / "data" / "contrasts"
    return sorted(file.name.removesuffix(".jsonl") for file in folder.iterdir() if file.name.endswith(".jsonl"))


def load_pairs(spec: str) -> list[ContrastPair]:
    """Pairs from a shipped set's name or from a .jsonl file with the keys prompt, positive, negative and, optionally,
    split.

    Raises: UnknownNameError for a name that is not shipped, TextError for a file that is not such a file.
    """
    if spec in contrast_names():
        text = (resources.files("steer") / "data" / "contrasts" / f"{spec}.jsonl").read_text()
    elif spec.endswith(".jsonl"):
        text = read_file(Path(spec), ".jsonl")
    else:
        raise UnknownNameError(
            f"contrast '{spec}'",
            expected=f"one of {', '.join(contrast_names())}, or a .jsonl file",
            got=f"'{spec}'",
            fix="Correct the name.",
        )
    return [_parse_pair(line, f"{spec} line {i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _parse_pair(line: str, where: str) -> ContrastPair:
    try:
        data = json.loads(line)
        pair = ContrastPair(data["prompt"], data["positive"], data["negative"], data.get("split", "fit"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise TextError(
            where,
            expected='{"prompt", "positive", "negative"}',
            got=f"{type(error).__name__} {error}",
            fix="Correct it.",
        ) from error
    if not all(isinstance(part, str) and part for part in (pair.prompt, pair.positive, pair.negative)):
        raise TextError(where, expected="three non-empty strings", got=line[:60], fix="Correct the line.")
    return pair

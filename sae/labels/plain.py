"""Labels without a language model's help, for every latent: what it is active on, and what it raises.

    tokens   the tokens that hold most of its activation in the stored contexts, those that differ in case or space
             alone taken together; one of them that holds SINGLE of it or more stands for itself
    logits   the tokens whose logits its decoder row raises most

They say what was counted and explain nothing, and are marked as such by their kind. Left out: storing them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sae.index_db import LatentRow
from sae.labels.store import NewLabel
from sae.labels.tables import LOGITS, TOKENS
from sae.labels.words import shown

AUTHOR = "saekit"
SINGLE = 0.8
"""share of the activation that makes a latent one of a single token"""
N_TOKENS = 8
LEAST = 0.02
"""share of the activation below which a token is not named, unless it is the first"""


class ActiveToken(NamedTuple):
    """A kind of token."""

    text: str
    share: float
    """of the latent's activation in the stored contexts"""


Names = Callable[[int], str]


def namer(tokenizer: Any) -> Names:
    """A function from a token to what it is called here, the same for all that differ in case or space alone."""
    return functools.cache(lambda token: shown(str(tokenizer.decode([token]))).lower())


def active_tokens(row: LatentRow, name: Names) -> list[ActiveToken]:
    """Kinds of tokens by how much of the latent's activation they hold, largest first, in one context a document."""
    contexts = row.one_a_document()
    if not contexts:
        return []
    tokens = np.concatenate([context.tokens for context in contexts])
    values = np.concatenate([context.activations for context in contexts])
    kinds, which = np.unique(tokens, return_inverse=True)
    weights: dict[str, float] = {}
    for token, weight in zip(kinds.tolist(), np.bincount(which, values).tolist(), strict=True):
        if weight > 0:
            weights[name(token)] = weights.get(name(token), 0.0) + weight
    total = sum(weights.values())
    ranked = sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))
    return [ActiveToken(text, weight / total) for text, weight in ranked]


def token_label(row: LatentRow, name: Names) -> str | None:
    """The latent's tokens as a label; none for one that was never active."""
    tokens = active_tokens(row, name)
    if not tokens:
        return None
    if tokens[0].share >= SINGLE:
        return f"the token {tokens[0].text}"
    named = [tokens[0], *(token for token in tokens[1:N_TOKENS] if token.share >= LEAST)]
    return f"tokens {', '.join(token.text for token in named)}"


def logit_label(row: LatentRow) -> str:
    """What the latent raises as a label."""
    return f"raises {', '.join(dict.fromkeys(shown(text) for text, _ in row.top_logits[:N_TOKENS]))}"


def plain_labels(rows: Iterable[LatentRow], name: Names) -> Iterator[NewLabel]:
    """Both labels of every latent; a latent that was never active has the second only."""
    for row in rows:
        tokens = token_label(row, name)
        if tokens is not None:
            yield NewLabel(row.latent, TOKENS, tokens, AUTHOR)
        yield NewLabel(row.latent, LOGITS, logit_label(row), AUTHOR)

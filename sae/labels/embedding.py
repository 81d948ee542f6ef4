"""Scores that ask no language model: an embedding says how alike texts are.

    embedding   contexts ranked by their cosine to the label; AUROC of those with the latent against those without
    intruder    a context without the latent among MEMBERS with it; found if it is the least like the others, where
                ties share. Chance is 1 / (MEMBERS + 1); the label plays no part

The default embedding, tf-idf of letter sequences, knows nothing of the model or the SAE. The mean of the model's last
residual stream knows more of the text, but the latent is part of what it is computed from. After the embedding score of
Paulo et al. 2024 (arXiv:2410.13928) and the intruder detection of 2507.08473. Left out: embedding models of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sae.labels.tables import Score
from sae.metrics import auroc, bootstrap, draw, interval

MEMBERS, RESAMPLES = 4, 1000
DIMENSIONS = 1 << 14

Embed = Callable[[Sequence[str]], Float[np.ndarray, "n d"]]
"""texts to rows of norm 1, or 0 for a text with nothing in it"""


class Embedded(NamedTuple):
    """The contexts of a latent."""

    positives: Float[np.ndarray, "n d"]
    negatives: Float[np.ndarray, "m d"]


def tfidf(corpus: Sequence[str]) -> Embed:
    """Sequences of 3 to 5 letters within words, weighted by how rare they are in `corpus`."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    options: dict[str, Any] = {"analyzer": "char_wb", "ngram_range": (3, 5), "norm": None, "alternate_sign": False}
    counted = HashingVectorizer(n_features=DIMENSIONS, **options)
    weights: Any = TfidfTransformer(sublinear_tf=True).fit(counted.transform(corpus))
    return lambda texts: weights.transform(counted.transform(texts)).toarray()


def unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of norm 1; zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def embedding_score(embedded: Embedded, label: Float[np.ndarray, " d"], control: str, judge: str, seed: int) -> Score:
    """How well likeness to the label tells the contexts apart."""
    scores = np.concatenate([embedded.positives @ label, embedded.negatives @ label])
    positive = np.arange(len(scores)) < len(embedded.positives)
    value = float(auroc(scores, positive, np.ones((1, len(scores))))[0])
    weights = draw(len(scores), RESAMPLES, np.random.default_rng(seed))
    low, high = interval(auroc(scores, positive, weights)) or (None, None)
    return Score("embedding", control, "auroc", value, low, high, len(scores), 0, judge)


def intruder_score(embedded: Embedded, judge: str, seed: Sequence[int]) -> Score | None:
    """How often a negative among members is found; none for fewer positives than MEMBERS."""
    rng, n = np.random.default_rng(seed), len(embedded.positives)
    if n < MEMBERS or not len(embedded.negatives):
        return None
    found = []
    for negative in embedded.negatives:
        rows = np.vstack([negative, embedded.positives[rng.permutation(n)[:MEMBERS]]])
        likeness = (rows @ rows.T - np.eye(len(rows)) * (rows**2).sum(1)).sum(1)
        least: Bool[np.ndarray, " five"] = np.isclose(likeness, likeness.min(), atol=1e-9)
        found.append(least[0] / least.sum())
    sums = np.column_stack([found, np.ones(len(found))])
    ends = bootstrap(sums, {"accuracy": lambda s: s[:, 0] / s[:, 1]}, int(rng.integers(1 << 31)))
    low, high = ends.get("accuracy", (None, None))
    return Score("intruder", "contexts", "accuracy", float(np.mean(found)), low, high, len(found), 0, judge)

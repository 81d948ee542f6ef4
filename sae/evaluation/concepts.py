"""Whether one latent tells that a concept is in a text: AxBench's concept detection, beside what it has to beat.

Flow: 1. texts with and without concepts are read once; 2. a detector's score of a text is its largest value over the
tokens; 3. each concept's detector is chosen or made on the training texts, and ranked on the others: AUROC, and
accuracy at the threshold that separates best in training; 4. means over concepts, with intervals over concepts.

    sae, random_sae   the latent with the highest AUROC in training
    dimensions        the same of the residual stream's dimensions, either sign
    pca               the same of principal components
    difference        mean over tokens with the concept minus that without, as a direction
    random            a random direction
    always_negative   the same answer for every text

After AxBench (Wu et al., arXiv 2501.17148), of which `sae` is its SAE-A, and `difference` its DiffMean. The training
set has texts of no concept as negatives; those of the test are the concept's own, hard ones included. Only the texts
of the answers are read, not the questions. Left out: generating such texts.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from activations.errors import TextError
from activations.text import parquet_rows
from sae.config import ConceptsConfig
from sae.evaluation.texts import Features, Subject, Texts, dense, pooled_latents, read_texts
from sae.metrics import auroc, means

FILES = ("train_data.parquet", "latent_eval_data.parquet")
FEATURES_AT_ONCE = 4096


class Concept(NamedTuple):
    """The texts of one concept."""

    name: str
    train: Int[np.ndarray, " n"]
    test: Int[np.ndarray, " m"]
    positive: Bool[np.ndarray, " text"]
    """whether a text has the concept"""


def concept_detection(texts: list[str], concepts: list[Concept], subject: Subject) -> dict[str, Any]:
    """Detect each concept with each kind of detector; returns numbers, rows of mean scores, and each concept's AUROC.

    Args:
      texts: as `read_concepts` gives them, and their concepts.
    """
    read, seed = read_texts(subject, texts), subject.seed
    tables: dict[str, Features] = {name: pooled_latents(sae, read, "max") for name, sae in subject.saes.items()}
    tables |= {"dimensions": _largest(read, np.eye(read.x.shape[1], dtype=np.float32))}
    tables |= {"pca": _largest(read, _axes(read, concepts))}
    found: dict[str, list[tuple[float, float]]] = {}
    for concept in concepts:
        for name, scores in _detectors(read, tables, concept, seed):
            found.setdefault(name, []).append(_measured(scores, concept))
    found["always_negative"] = [_measured(np.zeros(read.n), concept) for concept in concepts]
    return {
        "n_concepts": len(concepts),
        "n_texts": read.n,
        "rows": {
            name: means(dict(zip(("auroc", "accuracy"), np.array(values).T, strict=True)), seed)
            for name, values in found.items()
        },
        "auroc": {
            concept.name: {name: values[i][0] for name, values in found.items()} for i, concept in enumerate(concepts)
        },
    }


def read_concepts(config: ConceptsConfig) -> tuple[list[str], list[Concept]]:
    """The texts of both files, and which of them each concept has.

    Raises: TextError for a file without these columns, or without a concept that both files have.
    """
    assert config.data is not None
    fix = "Name the columns: --set concepts.text=COLUMN, concepts.concept and concepts.category."
    rows = []
    for is_test, file in enumerate(FILES):
        for text, concept, category in parquet_rows(
            config.data / file, (config.text, config.concept, config.category), fix=fix
        ):
            if isinstance(text, str) and text.strip():
                rows.append((text, str(concept), category == "positive", bool(is_test)))
    names = [name for _, name, is_positive, is_test in rows if is_test and is_positive]
    owner, positive = np.array([row[1] for row in rows]), np.array([row[2] for row in rows], bool)
    is_test = np.array([row[3] for row in rows], bool)
    concepts = []
    for name in dict.fromkeys(names):
        own = owner == name
        negative = ~positive & ~is_test
        train, test = np.flatnonzero(~is_test & positive & own | negative), np.flatnonzero(is_test & own)
        sides = (positive[train].any(), not positive[train].all(), not positive[test].all())
        if all(sides):
            concepts.append(Concept(name, train, test, positive))
    if not concepts:
        raise TextError(
            config.data,
            expected="a concept with texts in both files, and texts without it",
            got="none",
            fix="Check the columns, and that the category of texts with the concept is 'positive'.",
        )
    return [row[0] for row in rows], concepts


def column_aurocs(table: Features, positive: Bool[np.ndarray, " text"]) -> Float[np.ndarray, " feature"]:
    """AUROC of each column, ties counting one half."""
    n_up, n_down = int(positive.sum()), int((~positive).sum())
    parts = []
    for first in range(0, table.shape[1], FEATURES_AT_ONCE):  # pyright: ignore[reportOptionalSubscript]
        block = table[:, first : first + FEATURES_AT_ONCE]
        ranks = stats.rankdata(dense(block), axis=0)
        parts.append((ranks[positive].sum(axis=0) - n_up * (n_up + 1) / 2) / (n_up * n_down))
    return np.concatenate(parts)


def _detectors(
    read: Texts, tables: Mapping[str, Features], concept: Concept, seed: int
) -> Iterator[tuple[str, Float[np.ndarray, " text"]]]:
    """Scores of all texts by each kind of detector."""
    positive = concept.positive[concept.train]
    for name, table in tables.items():
        best = int(np.argmax(column_aurocs(table[concept.train], positive)))
        yield name, dense(table[:, [best]])[:, 0]
    sides = [
        np.concatenate([read.of(i) for i in concept.train[side].tolist()]).mean(axis=0)
        for side in (positive, ~positive)
    ]
    random = np.random.default_rng([seed, len(concept.train), int(concept.test[0])]).standard_normal(len(sides[0]))
    both = _largest(read, np.stack([sides[0] - sides[1], random]).astype(np.float32), signed=False)
    yield "difference", both[:, 0]
    yield "random", both[:, 1]


def _largest(
    read: Texts, directions: Float[np.ndarray, "n d_in"], *, signed: bool = True
) -> Float[np.ndarray, "text feature"]:
    """Largest projection of a token of each text on each direction; and, if `signed`, on its negative."""
    out = np.zeros((read.n, (1 + signed) * len(directions)), np.float32)
    for i in range(read.n):
        values = read.of(i) @ directions.T
        if len(values):
            out[i] = np.concatenate([values.max(axis=0), -values.min(axis=0)][: 1 + signed])
    return out


def _axes(read: Texts, concepts: list[Concept]) -> Float[np.ndarray, "component d_in"]:
    """Principal components of the means of the training texts."""
    rows = read.means()[np.unique(np.concatenate([concept.train for concept in concepts]))]
    return np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2].astype(np.float32)


def _measured(scores: Float[np.ndarray, " text"], concept: Concept) -> tuple[float, float]:
    """AUROC and accuracy on the test texts."""
    train, test = scores[concept.train], scores[concept.test]
    positive, is_there = concept.positive[concept.train], concept.positive[concept.test]
    values = np.unique(train)
    balanced = [(train[positive] > v).mean() + (train[~positive] <= v).mean() for v in values]
    area = float(auroc(np.asarray(test, np.float64), is_there, np.ones((1, len(test))))[0])
    return area, float(((test > values[int(np.argmax(balanced))]) == is_there).mean())

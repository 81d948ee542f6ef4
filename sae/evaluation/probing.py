"""How well a few latents tell the label of a text: k-sparse probing, beside what any SAE has to beat.

Flow: 1. texts are read once; a text is the mean over its tokens; 2. each class is a problem of its own, against as many
texts of the other classes (two classes are one problem), in training and in the test; 3. the k features whose means
differ most between both sides of the training texts go into a logistic regression, standardised; 4. accuracy and
AUROC on the test texts, mean over problems, with intervals from resampling the test texts.

    sae            latents                     random_sae   latents of random directions
    dimensions     of the residual stream      pca          its principal components, of the training texts
    dense          a logistic regression on all dimensions, its penalty chosen by cross-validation in training
    majority       always the same answer

After SAEBench's sparse probing (arXiv 2503.09532), whose balance of classes and choice of features this is, and
Kantamneni et al. (2502.16681), who found that the dense probe wins. Left out: tuning of k-sparse probes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from activations.errors import TextError
from activations.text import parquet_rows
from sae.config import ProbingConfig
from sae.evaluation.texts import Features, Subject, dense, pooled_latents, read_texts
from sae.metrics import RESAMPLES, auroc, draw, interval

LEAST_TEXTS = 10
"""of a class, in training and in the test"""
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""inverse strengths that the dense probe chooses from"""
Weighed = Callable[[Float[np.ndarray, "times test"]], Float[np.ndarray, " times"]]


class Problem(NamedTuple):
    """One class against others, in equal numbers."""

    label: str
    train: Int[np.ndarray, " n"]
    """texts"""
    test: Int[np.ndarray, " m"]
    """texts"""
    positive: Bool[np.ndarray, " text"]
    """whether a text is of the class"""


class LabelledTexts(NamedTuple):
    """A set of texts to probe."""

    texts: list[str]
    n_test: int
    """how many of them, the last, are the test"""
    problems: list[Problem]


def read_labelled(config: ProbingConfig, seed: int) -> dict[str, LabelledTexts]:
    """The labelled sets of texts, by file name.

    Raises: TextError for a file without these columns, with one class only, or with too few texts of one.
    """
    sets = {}
    for path in config.data:
        texts, labels = labelled(path, config, seed)
        n_test = round(config.test_fraction * len(texts))
        sets[path.stem] = LabelledTexts(texts, n_test, balanced(path, labels, n_test, seed))
    return sets


def probing(sets: Mapping[str, LabelledTexts], ks: Sequence[int], subject: Subject) -> dict[str, Any]:
    """Probe each set of texts; returns classes, numbers of texts, and rows of scores, by its name.

    Args:
      ks: numbers of features of k-sparse probes.
    """
    return {name: _probe(part, ks, subject) for name, part in sets.items()}


def _probe(part: LabelledTexts, ks: Sequence[int], subject: Subject) -> dict[str, Any]:
    (texts, n_test, problems), seed = part, subject.seed
    read = read_texts(subject, texts)
    raw = read.means()
    tables: dict[str, Features] = {name: pooled_latents(sae, read, "mean") for name, sae in subject.saes.items()}
    tables |= {"dimensions": raw, "pca": _components(raw, len(texts) - n_test)}
    test = np.arange(len(texts) - n_test, len(texts))
    rows = {}
    for k in ks:
        for name, table in tables.items():
            rows[f"{name} k={k}"] = _scores(problems, test, lambda p, t=table, k=k: sparse_probe(t, p, k), seed)
    rows["dense"] = _scores(problems, test, lambda problem: dense_probe(raw, problem), seed)
    rows["majority"] = _scores(problems, test, lambda problem: np.zeros(len(problem.test)), seed)
    classes = [problem.label for problem in problems]
    return {"classes": classes, "n_train": len(texts) - n_test, "n_test": n_test, "rows": rows}


def labelled(path: Path, config: ProbingConfig, seed: int) -> tuple[list[str], list[str]]:
    """Distinct texts that are not blank, and their labels, in an order that is random but for the seed."""
    fix = "Name the columns: --set probing.text=COLUMN --set probing.label=COLUMN."
    found: dict[str, str] = {}
    for text, label in parquet_rows(path, (config.text, config.label), fix=fix):
        if not isinstance(text, str | None):
            raise TextError(path, expected=f"text in '{config.text}'", got=type(text).__name__, fix=fix)
        if text and text.strip() and label is not None:
            found.setdefault(text, str(label))
    order = np.random.default_rng(seed).permutation(len(found))[: config.max_texts]
    texts = list(found)
    return [texts[i] for i in order], [found[texts[i]] for i in order]


def balanced(path: Path, labels: Sequence[str], n_test: int, seed: int) -> list[Problem]:
    """A problem for each class but rare ones, which are negatives only; the last `n_test` texts are the test."""
    n_train, all_labels, rng = len(labels) - n_test, np.array(labels), np.random.default_rng(seed)
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise TextError(path, expected="two classes or more", got=len(classes), fix="Give texts with several labels.")
    counts = Counter(labels[:n_train]), Counter(labels[n_train:])
    frequent = [label for label in classes if min(count[label] for count in counts) >= LEAST_TEXTS]
    if not frequent or (len(classes) == 2 and len(frequent) < 2):
        raise TextError(
            f"{path}: labels",
            expected=f"at least {LEAST_TEXTS} texts of a class, and of others, in training and in the test",
            got=", ".join(f"{label}: {counts[0][label]} and {counts[1][label]}" for label in classes[:5]),
            fix="Raise probing.max_texts.",
        )
    parts = np.arange(n_train), np.arange(n_train, len(labels))
    problems = []
    for label in classes[1:] if len(classes) == 2 else frequent:
        positive = all_labels == label
        train, test = (_even(part, positive, rng) for part in parts)
        problems.append(Problem(label, train, test, positive))
    return problems


def sparse_probe(table: Features, problem: Problem, k: int) -> Float[np.ndarray, " test"]:
    """Log-odds on the test texts from the k features that differ most in training."""
    rows, positive = table[problem.train], problem.positive[problem.train]
    means = [np.asarray(rows[side].mean(axis=0)).ravel() for side in (positive, ~positive)]
    chosen = np.argsort(-np.abs(means[0] - means[1]), kind="stable")[:k]
    train, test = (dense(table[part][:, chosen]) for part in (problem.train, problem.test))
    from sklearn.linear_model import LogisticRegression

    return _fitted(LogisticRegression(max_iter=1000), train, positive, test)


def dense_probe(raw: Float[np.ndarray, "text d_in"], problem: Problem) -> Float[np.ndarray, " test"]:
    """Log-odds on the test texts from all dimensions."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": list(PENALTIES)}, cv=3)
    return _fitted(search, raw[problem.train], problem.positive[problem.train], raw[problem.test])


def _fitted(
    model: Any, train: Float[np.ndarray, "n k"], positive: Bool[np.ndarray, " n"], test: Float[np.ndarray, "m k"]
) -> Float[np.ndarray, " m"]:
    mean, scale = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1
    return model.fit((train - mean) / scale, positive).decision_function((test - mean) / scale)


def _scores(
    problems: Sequence[Problem],
    test: Int[np.ndarray, " test"],
    probe: Callable[[Problem], Float[np.ndarray, " n"]],
    seed: int,
) -> dict[str, Any]:
    """Mean accuracy and AUROC over problems; the same test texts are drawn for all of them."""
    parts = list(_measured(problems, test, probe))
    once, drawn = np.ones((1, len(test))), draw(len(test), RESAMPLES, np.random.default_rng(seed))
    result: dict[str, Any] = {}
    for i, name in enumerate(("accuracy", "auroc")):
        result[name] = float(np.mean([part[i](once)[0] for part in parts]))
        both = interval(np.mean([part[i](drawn) for part in parts], axis=0))
        if both is not None:
            result[f"{name}_ci95"] = list(both)
    return result


def _measured(
    problems: Sequence[Problem], test: Int[np.ndarray, " test"], probe: Callable[[Problem], Float[np.ndarray, " n"]]
) -> Iterator[tuple[Weighed, Weighed]]:
    """Accuracy and AUROC of each problem as functions of how often each test text is drawn."""
    for problem in problems:
        scores, positive, columns = probe(problem), problem.positive[problem.test], problem.test - test[0]
        right = (scores > 0) == positive

        def accuracy(weights: np.ndarray, right: np.ndarray = right, columns: np.ndarray = columns) -> np.ndarray:
            return weights[:, columns] @ right / weights[:, columns].sum(axis=1)

        def area(weights: np.ndarray, s: np.ndarray = scores, p: np.ndarray = positive, columns: np.ndarray = columns):
            return auroc(s, p, weights[:, columns])

        yield accuracy, area


def _components(raw: Float[np.ndarray, "text d_in"], n_train: int) -> Float[np.ndarray, "text component"]:
    centred = raw - raw[:n_train].mean(axis=0)
    return centred @ np.linalg.svd(centred[:n_train], full_matrices=False)[2].T


def _even(
    part: Int[np.ndarray, " n"], positive: Bool[np.ndarray, " text"], rng: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """As many texts of the class as of the others, in order."""
    sides = part[positive[part]], part[~positive[part]]
    n = min(map(len, sides))
    return np.sort(np.concatenate([rng.permutation(side)[:n] for side in sides]))

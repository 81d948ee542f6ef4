"""Does a text show a concept? A classifier that knows nothing of the vector that is under test.

A vector that is judged by its own direction always looks good. So the judge here reads something else, either

    the text alone   TF-IDF of its character n-grams of 2 to 5: no model is asked at all
    a late block     the mean residual stream of the unsteered model over the text's tokens, at another hook point than
                     the vector's: it takes meaning where words differ, but shares the model's own blind spots

and is a logistic regression on that. Flow of `fit`: 1. examples that belong together, such as the two sides of a pair,
are a group; 2. each group in turn is judged by a classifier that never saw it (cross-validation), and so are the
held-out groups, which gives the `quality` that has to be read beside whatever the classifier says; 3. the classifier
itself is fitted to all examples of the split `fit`.

Left out: choosing features or regularisation, since a choice on so few examples would be part of what it reports.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from activations.errors import ConfigError, TextError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from activations.text import documents, parquet_rows
from sae.metrics import RESAMPLES, auroc, bootstrap, draw, interval
from steer.measures.effect import states
from steer.pairs import ContrastPair

FOLDS = 8
"""parts that groups are split into for cross-validation, at most"""
LATE = 0.8
"""depth of the block that a late reader reads, as a share of all blocks"""

Reader = Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, "text feature"]]
"""From prompts and their continuations to features of the continuations."""


@dataclass(frozen=True)
class Example:
    """A text, and whether it shows the concept."""

    text: str
    positive: bool
    group: str
    """examples of one group are never split between what is fitted and what is tested"""
    prompt: str = ""
    """what stands before it, where a model reads it"""
    heldout: bool = False


@dataclass(frozen=True)
class TextClassifier:
    """A fitted classifier with what it is worth."""

    quality: dict[str, Any]
    """see `fit`"""
    reads: str
    """what it judges by, for people"""
    _model: Any
    _reader: Reader | None

    def probability(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " text"]:
        """How likely each text shows the concept.

        Args:
          prompts: what stands before each text; read by a reader of a model, and by nothing else.
        """
        given = [""] * len(texts) if prompts is None else prompts
        return _positive(self._model, _features(texts, given, self._reader))


def examples_of(pairs: Sequence[ContrastPair]) -> list[Example]:
    """Both sides of each pair, in a group with all other pairs of the same prompt."""
    return [
        Example(getattr(pair, side), side == "positive", pair.prompt, pair.prompt, pair.split == "heldout")
        for pair in pairs
        for side in ("positive", "negative")
    ]


def load_examples(path: Path, positive: str) -> list[Example]:
    """The texts of a .parquet or .jsonl file with `text` and `label`, equal texts in one group.

    Args:
      positive: the label that stands for the concept; every other one is the lack of it.
    Raises: TextError if the file is no such file, or has no text of either kind.
    """
    if path.suffix == ".jsonl":
        texts, labels = ([document.text for document in documents(f"{path}#{key}")] for key in ("text", "label"))
        if len(texts) != len(labels):
            raise TextError(path, expected="text and label in each line", got="some blank", fix="Correct it.")
        rows = list(zip(texts, labels, strict=True))
    else:
        rows = list(parquet_rows(path, ("text", "label"), fix="Name the columns text and label."))
    found = [Example(str(text), str(label) == positive, str(text)) for text, label in rows]
    if len({each.positive for each in found}) < 2:
        got = f"the labels {', '.join(sorted({str(label) for _, label in rows})[:6])}"
        raise TextError(path, expected=f"texts with the label '{positive}' and others", got=got, fix="Name a label.")
    return found


def late_reader(loaded: LoadedModel, avoid: str | None = None) -> tuple[Reader, str]:
    """Mean residual stream of the unsteered model over a continuation's tokens, at a late block.

    Args:
      avoid: the hook point of the vector under test, which the reader must not share.
    Returns: the reader and its hook point.
    Raises: ConfigError if the vector acts there or later, so that its own direction would be read.
    """
    layer = min(loaded.n_layers - 1, round(LATE * loaded.n_layers))
    point = HookPoint.parse(f"resid_post.{layer}")
    if avoid is not None and HookPoint.parse(avoid).depth >= point.depth:
        fix = "Judge by the text alone, or steer earlier."
        raise ConfigError("classifier", expected=f"a vector earlier than {point}", got=avoid, fix=fix)

    def read(prompts: Sequence[str], texts: Sequence[str]) -> Float[np.ndarray, "text feature"]:
        rows = states(loaded, point, prompts, texts)
        return torch.stack([x.mean(0) if len(x) else x.new_zeros(loaded.d_model) for x in rows]).double().numpy()

    return read, str(point)


def fit(
    examples: Sequence[Example], *, reader: Reader | None = None, reads: str = "text", seed: int = 0
) -> TextClassifier:
    """A classifier of the `fit` examples, and its quality on groups that it did not see.

    Args:
      reader: what a model makes of continuations; none: the text alone.
      reads: what that is called.
      seed: of folds and resampling.
    Returns: a TextClassifier, whose `quality` holds `n_fit`, `n_groups`, `cv_auroc` and `cv_accuracy` over the fit
      examples, each judged by a classifier that saw nothing of its group, and `n_heldout`, `heldout_auroc` and
      `heldout_accuracy` if examples are held out; with 95% bootstrap intervals over groups, as X_ci95.
    Raises: TextError unless both kinds are there, in two groups or more.
    """
    fitted = [each for each in examples if not each.heldout]
    groups = {each.group for each in fitted}
    if len({each.positive for each in fitted}) < 2 or len(groups) < 2:
        expected = "fit examples of both kinds, in two groups or more"
        got = f"{len(fitted)} examples in {len(groups)} groups"
        raise TextError("classifier", expected=expected, got=got, fix="Give more pairs or labelled texts.")
    x, y = _table(fitted, reader)
    model = _new(reader).fit(x, y)
    quality = {"n_fit": len(fitted), "n_groups": len(groups)}
    quality |= _quality("cv", fitted, _cross_validated(x, y, fitted, reader, seed), seed)
    # One of a known group would be no test.
    heldout = [each for each in examples if each.heldout and each.group not in groups]
    if heldout:
        p = _positive(model, _table(heldout, reader)[0])
        quality |= {"n_heldout": len(heldout), **_quality("heldout", heldout, p, seed)}
    return TextClassifier(quality, reads, model, reader)


def _new(reader: Reader | None) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if reader is None:
        grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=1)
        return make_pipeline(grams, LogisticRegression(max_iter=1000))
    # Many more dimensions than examples: a firm prior.
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))


def _table(examples: Sequence[Example], reader: Reader | None) -> tuple[np.ndarray, Bool[np.ndarray, " example"]]:
    x = _features([each.text for each in examples], [each.prompt for each in examples], reader)
    return x, np.array([each.positive for each in examples])


def _features(texts: Sequence[str], prompts: Sequence[str], reader: Reader | None) -> np.ndarray:
    return np.array(texts, dtype=object) if reader is None else reader(prompts, texts)


def _positive(model: Any, x: np.ndarray) -> Float[np.ndarray, " example"]:
    return model.predict_proba(x)[:, 1] if len(x) else np.empty(0)


def _cross_validated(
    x: np.ndarray, y: Bool[np.ndarray, " example"], examples: Sequence[Example], reader: Reader | None, seed: int
) -> Float[np.ndarray, " example"]:
    """Each example as a classifier sees it that was fitted to the other groups; NaN where those are of one kind."""
    names, which = np.unique([each.group for each in examples], return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(names)) % min(FOLDS, len(names))
    p = np.full(len(y), np.nan)
    for k in range(fold.max() + 1):
        tested = fold[which] == k
        if len(set(y[~tested].tolist())) == 2:
            p[tested] = _positive(_new(reader).fit(x[~tested], y[~tested]), x[tested])
    return p


def _quality(prefix: str, examples: Sequence[Example], p: Float[np.ndarray, " example"], seed: int) -> dict[str, Any]:
    """AUROC and accuracy, and their intervals over groups."""
    judged = np.isfinite(p)
    y = np.array([each.positive for each in examples])[judged]
    names, which = np.unique(np.array([each.group for each in examples])[judged], return_inverse=True)
    p, right = p[judged], (p[judged] > 0.5) == y
    if not len(y):
        return {}
    weights = draw(len(names), RESAMPLES, np.random.default_rng(seed))[:, which]
    areas = auroc(p, y, np.concatenate([np.ones((1, len(y))), weights]))
    sums = np.stack([np.bincount(which, right), np.bincount(which)], axis=1)
    found = {f"{prefix}_auroc": float(areas[0]), f"{prefix}_auroc_ci95": interval(areas[1:])}
    intervals = bootstrap(sums, {"accuracy": lambda s: s[:, 0] / s[:, 1]}, seed)
    return found | {f"{prefix}_accuracy": float(right.mean()), f"{prefix}_accuracy_ci95": intervals.get("accuracy")}

"""Feature absorption: latents for a word's first letter that fall silent where another latent has taken the letter in.

Flow: 1. single-token words of the tokenizer's own vocabulary are read behind one prompt, the activation of the word
being kept; 2. for each letter a logistic regression on all dimensions gives a direction, the dense probe; 3. k-sparse
probes choose the letter's main latents: k grows while that adds more than 0.03 to F1, up to 10; 4. on test words that
the dense probe gets right, absorption is measured; 5. means over letters, with intervals over letters.

Of a word with activation x, the probe's unit direction d, and p_i = latent_i * (W_dec_i . d):

    full absorption      no main latent is active, x . d > 0, and the latent with the largest p_i has a cosine of at
                         least 0.025 with d and p_i >= 0.4 x . d
    absorption fraction  of what the main latents and the absorbing ones explain of x . d, the share of the latter:
                         up to 3 latents, not main, with cosine >= 0.1 and together >= 0.4 x . d; else 0
    split features       number of main latents

After Chanin et al. (arXiv 2409.14507) and SAEBench 0.6 (2503.09532), whose thresholds these are. SAEBench takes its
words from the model's vocabulary as well, shows them in a spelling task, and chooses latents with an L1 probe; here the
choice is by difference of means. Left out: whether the model can spell.
"""

import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from activations.errors import MismatchError, TextError
from sae.config import AbsorptionConfig
from sae.evaluation.core import LATENTS_AT_ONCE
from sae.evaluation.texts import Subject, read_texts
from sae.metrics import means
from sae.torch_view import TorchSae

TEST_FRACTION, LEAST_WORDS = 0.3, 20
F1_JUMP, MAX_K = 0.03, 10
LEAST_F1 = 0.6
"""of a dense probe; letters that even it does not know are left out of the means"""
FULL_COSINE, FRACTION_COSINE, SHARE, MAX_ABSORBING = 0.025, 0.1, 0.4, 3
_WORD = re.compile(r" [a-z]{3,}")
_MEASURES = ("absorption_fraction", "full_absorption", "split_features", "sparse_f1", "probe_f1")


class Words(NamedTuple):
    """Words and what the model makes of them."""

    letters: np.ndarray
    """first letter of each"""
    x: Float[np.ndarray, "word d_in"]
    is_test: Bool[np.ndarray, " word"]


class Probe(NamedTuple):
    """A dense probe for a letter."""

    direction: Float[np.ndarray, " d_in"]
    """of norm 1"""
    said: Bool[np.ndarray, " word"]
    """which words it takes to begin with the letter"""
    f1: float
    """on test words"""


def absorption(config: AbsorptionConfig, subject: Subject) -> dict[str, Any]:
    """Measure absorption of first letters; returns rows of means over letters, and each letter's numbers.

    Raises: MismatchError for a transcoder; TextError if the vocabulary has no letter with enough words.
    """
    if subject.wiring.transcodes:
        raise MismatchError(
            "absorption", expected="an SAE that writes what it reads", got=str(subject.wiring), fix="Leave it out."
        )
    words = _read_words(config, subject)
    probes = {letter: _dense_probe(words, letter) for letter in sorted(set(words.letters.tolist()))}
    rows, letters = {}, {}
    for name, sae in subject.saes.items():
        latents = _encode(sae, words.x)
        decoder = sae.W_dec.cpu().numpy()
        letters[name] = {letter: _of_letter(words, letter, probe, latents, decoder) for letter, probe in probes.items()}
        rows[name] = _row(list(letters[name].values()), subject.seed)
    return {"n_words": len(words.x), "rows": rows, "letters": letters}


def vocabulary(tokenizer: Any, per_letter: int, seed: int) -> list[str]:
    """Words of lower-case ASCII letters, with a space before them, that are single tokens; at most so many a letter."""
    ids = sorted(tokenizer.get_vocab().values())
    words = sorted({text for text in tokenizer.batch_decode([[i] for i in ids]) if _WORD.fullmatch(text)})
    by_letter: dict[str, list[str]] = {}
    for i in np.random.default_rng(seed).permutation(len(words)).tolist():
        by_letter.setdefault(words[i][1], []).append(words[i])
    return [word for group in by_letter.values() for word in group[:per_letter]]


def absorbed(
    x_projection: Float[np.ndarray, " word"],
    latents: Float[np.ndarray, "word d_sae"],
    decoder: Float[np.ndarray, "d_sae d_in"],
    direction: Float[np.ndarray, " d_in"],
    main: list[int],
) -> tuple[Float[np.ndarray, " word"], Bool[np.ndarray, " word"]]:
    """Absorption fraction of each word, and whether it is fully absorbed.

    Args:
      x_projection: x . d of each word.
      direction: d, of norm 1.
      main: the letter's main latents.
    """
    along = decoder @ direction
    cosines = along / np.maximum(np.linalg.norm(decoder, axis=1), 1e-12)
    projections = latents * along
    is_main = np.zeros(len(decoder), bool)
    is_main[main] = True
    best = projections.argmax(axis=1)
    enough = projections[np.arange(len(best)), best] >= SHARE * x_projection
    silent = ~(latents[:, main] > 0).any(axis=1)
    full = silent & (x_projection > 0) & (cosines[best] >= FULL_COSINE) & enough
    own = projections[:, is_main].sum(axis=1)
    others = np.where(~is_main & (cosines >= FRACTION_COSINE) & (projections > 0), projections, 0)
    absorbing = np.sort(others, axis=1)[:, -MAX_ABSORBING:].sum(axis=1)
    taken = np.minimum(absorbing, x_projection - own)
    with np.errstate(divide="ignore", invalid="ignore"):
        shared = np.clip(taken / (taken + own), 0, 1)
    counts = (own < x_projection) & (absorbing > 0) & (absorbing >= SHARE * x_projection)
    return np.where(counts, np.where(own <= 0, 1.0, shared), 0.0), full


def _read_words(config: AbsorptionConfig, subject: Subject) -> Words:
    found = vocabulary(subject.loaded.tokenizer, config.words_per_letter, subject.seed)
    read = read_texts(subject, [config.prompt + word for word in found])
    lengths = np.diff(read.bounds)
    # The prompt is the same everywhere, so that other lengths are words in several tokens, or masked ones.
    kept = np.flatnonzero(lengths == np.bincount(lengths, minlength=1).argmax())
    counts = Counter(found[i][1] for i in kept)
    kept = np.array([i for i in kept if counts[found[i][1]] >= LEAST_WORDS], int)
    if len({found[i][1] for i in kept}) < 2:
        raise TextError(
            "absorption",
            expected=f"two letters or more with {LEAST_WORDS} single-token words each in the vocabulary",
            got="fewer",
            fix="Leave it out for this tokenizer.",
        )
    x = np.stack([read.of(i)[-1] for i in kept.tolist()])
    is_test = np.random.default_rng(subject.seed).random(len(kept)) < TEST_FRACTION
    return Words(np.array([found[i][1] for i in kept]), x, is_test)


def _dense_probe(words: Words, letter: str) -> Probe:
    from sklearn.linear_model import LogisticRegression

    positive, train = words.letters == letter, ~words.is_test
    mean, scale = words.x[train].mean(axis=0), float(words.x[train].std())
    model = LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced")
    model.fit((words.x[train] - mean) / scale, positive[train])
    said = model.decision_function((words.x - mean) / scale) > 0
    direction = model.coef_[0] / np.linalg.norm(model.coef_[0])
    score = _f1(positive[words.is_test], said[words.is_test])
    return Probe(direction, said, score)


def _main_latents(
    latents: Float[np.ndarray, "word d_sae"], positive: Bool[np.ndarray, " word"], is_test: Bool[np.ndarray, " word"]
) -> tuple[list[int], float]:
    """The letter's main latents, chosen on training words, and the F1 of a probe on them on test words."""
    from sklearn.linear_model import LogisticRegression

    train = ~is_test
    gap = latents[train & positive].mean(axis=0) - latents[train & ~positive].mean(axis=0)
    order, best, main, score = np.argsort(-np.abs(gap), kind="stable")[:MAX_K].tolist(), -np.inf, [], 0.0
    for k in range(1, len(order) + 1):
        rows = latents[:, order[:k]] / (latents[:, order[:k]].std(axis=0) + 1e-9)
        said = (
            LogisticRegression(max_iter=1000, class_weight="balanced").fit(rows[train], positive[train]).predict(rows)
        )
        reached = _f1(positive[train], said[train])
        if reached <= best + F1_JUMP:
            break
        best, main = reached, order[:k]
        score = _f1(positive[is_test], said[is_test])
    return main, score


def _f1(positive: Bool[np.ndarray, " word"], said: Bool[np.ndarray, " word"]) -> float:
    """2 hits / (2 hits + misses + false alarms); 0 where there is nothing to find or say."""
    hits, wrong = int((positive & said).sum()), int((positive != said).sum())
    return 2 * hits / max(2 * hits + wrong, 1)


def _of_letter(
    words: Words, letter: str, probe: Probe, latents: Float[np.ndarray, "word d_sae"], decoder: np.ndarray
) -> dict[str, Any]:
    positive = words.letters == letter
    main, score = _main_latents(latents, positive, words.is_test)
    right = positive & probe.said & words.is_test
    fractions, full = absorbed(
        words.x[right] @ probe.direction, latents[right], decoder, probe.direction.astype(np.float32), main
    )
    n = int(right.sum())
    values = (fractions.mean() if n else 0.0, full.mean() if n else 0.0, len(main), score, probe.f1)
    return {
        **dict(zip(_MEASURES, map(float, values), strict=True)),
        "full_words": int(full.sum()),
        "words": n,
        "is_known": bool(n) and probe.f1 >= LEAST_F1,
    }


def _row(letters: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Means over the letters that the dense probe knows and has test words right of."""
    known = [letter for letter in letters if letter["is_known"]]
    row = means({name: np.array([letter[name] for letter in known]) for name in _MEASURES}, seed) if known else {}
    return dict.fromkeys(_MEASURES) | row | {"n_letters": len(known)}


def _encode(sae: TorchSae, x: Float[np.ndarray, "word d_in"]) -> Float[np.ndarray, "word d_sae"]:
    step = max(1, LATENTS_AT_ONCE // sae.d_sae)
    with torch.inference_mode():
        parts = [torch.from_numpy(x[i : i + step]).to(sae.W_enc.device) for i in range(0, len(x), step)]
        return np.concatenate([sae.encode(part).cpu().numpy() for part in parts])

"""Steering vectors from contrast pairs: which direction tells the sides apart, and how far it can be believed.

Flow of `from_contrast`:
1. `lint` looks for what makes a direction mean something else: length, a first word, too few pairs;
2. each side of a pair becomes a point, the mean residual stream over the tokens of its continuation. With p and n
   those of the fit pairs and d = p - n, a row a pair, one of METHODS gives the direction, p lying further along it:

    mean    mean(d)                                    Marks & Tegmark (arXiv:2310.06824), Rimsky et al. (2312.06681)
    pca     first right singular vector of d           Zou et al. (arXiv:2310.01405), without centring
    probe   weights of a logistic regression, without intercept, of d against -d

3. `quality`: agreement of the pairs and stability under resampling, from the fit pairs; AUROC, accuracy, and the share
   of pairs that steering moves the other way, from those held out.

Left out: choosing a dose and measuring text (`steer.making.make`, `steer.measures.effect`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import TextError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from sae.metrics import RESAMPLES, auroc, draw, interval, means
from steer.measures.effect import reread, states_at
from steer.operations import Add, Intervention
from steer.pairs import ContrastPair
from steer.runtime import steering
from steer.vectors import SteeringVector

ENOUGH = 20
"""fit pairs from which on directions hardly change"""
UNEVEN = 1.25
"""ratio of the sides' lengths from which on a direction may mean length"""
COMMON = 0.5
"""share of one side's continuations that begin with the same word, from which on a direction may mean that word"""
REFITS = 50
"""directions of resampled pairs"""
PROBE_DOSE = 0.3
"""dose, either way, at which held-out pairs are read to see which way they are moved"""

Sides = Float[np.ndarray, "pair d_model"]
Direction = Float[np.ndarray, " d_model"]


# --- directions ------------------------------------------------------------------------------------------------------


def mean_difference(d: Sides) -> Direction:
    """mean(d), of any length."""
    return d.mean(axis=0)


def principal_difference(d: Sides) -> Direction:
    """The first right singular vector of d: what most of the differences have in common, whatever their sign."""
    return np.linalg.svd(d, full_matrices=False)[2][0]


def probe_difference(d: Sides) -> Direction:
    """Weights of a logistic regression of d against -d, of which the lengths are taken to be 1 on average."""
    from sklearn.linear_model import LogisticRegression

    unit = d / max(float(np.linalg.norm(d, axis=1).mean()), 1e-12)
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    return model.fit(np.concatenate([unit, -unit]), np.repeat([1, 0], len(d))).coef_[0]


METHODS: dict[str, Callable[[Sides], Direction]] = {
    "mean": mean_difference,
    "pca": principal_difference,
    "probe": probe_difference,
}
"""By name, from differences of the sides, a row a pair, to a direction of any length and sign."""


def direction_of(d: Sides, method: str) -> Direction:
    """The unit direction of some differences, along which they are positive on average."""
    direction = METHODS[method](d)
    direction = direction / max(float(np.linalg.norm(direction)), 1e-12)
    return direction if float((d @ direction).mean()) >= 0 else -direction


def from_contrast(
    loaded: LoadedModel, hook_point: str, name: str, pairs: Sequence[ContrastPair], method: str = "mean", seed: int = 0
) -> SteeringVector:
    """The direction of the `fit` pairs, and in `source` what `lint` and `quality` say of it.

    `source` also keeps the midpoint of the sides along the direction, which tells them apart when text is read back.

    Raises: TextError if there are no fit pairs, or one of them has no tokens of its own.
    """
    fit, heldout = ([pair for pair in pairs if pair.split == split] for split in ("fit", "heldout"))
    if not fit:
        raise TextError(f"contrast '{name}'", expected="pairs of the split 'fit'", got="none", fix="Add some.")
    point = HookPoint.parse(hook_point).check(loaded.n_layers, loaded.family.sites(loaded.model.config))
    positive, negative, mean_norm = read_sides(loaded, [point], fit)[point]
    direction = direction_of(positive - negative, method).astype(np.float32)
    source = {
        "kind": "contrast",
        "contrast": name,
        "method": method,
        "pairs": len(fit),
        "midpoint": midpoint_of(positive, negative, direction),
        "warnings": lint(pairs),
    }
    vector = SteeringVector(name, direction, hook_point, loaded.ref, mean_norm, source)
    source |= {
        **fit_quality(positive - negative, direction, method, seed),
        **heldout_quality(loaded, vector, heldout, seed),
    }
    return vector


class Read(NamedTuple):
    """Pairs as a model reads them at one hook point."""

    positive: Sides
    negative: Sides
    mean_norm: float
    """over the tokens of all continuations"""


def read_sides(
    loaded: LoadedModel, points: Sequence[HookPoint], pairs: Sequence[ContrastPair]
) -> dict[HookPoint, Read]:
    """Both sides of each pair at each hook point, all read in one pass over the texts.

    Raises: TextError for a continuation without tokens of its own.
    """
    means: dict[HookPoint, list[list[Tensor]]] = {point: [] for point in points}
    norms: dict[HookPoint, list[Tensor]] = {point: [] for point in points}
    for side in ("positive", "negative"):
        texts = [getattr(pair, side) for pair in pairs]
        for rows in means.values():
            rows.append([])
        for text, row in zip(texts, states_at(loaded, points, [pair.prompt for pair in pairs], texts), strict=True):
            for point, x in row.items():
                if not len(x):
                    fix = "Write more, or begin it with a space."
                    raise TextError(f"continuation '{text}'", expected="tokens of its own", got="none", fix=fix)
                means[point][-1].append(x.mean(0))
                norms[point].append(x.norm(dim=1))

    def stacked(rows: list[Tensor]) -> Sides:
        return torch.stack(rows).double().numpy()

    return {
        point: Read(stacked(sides[0]), stacked(sides[1]), float(torch.cat(norms[point]).mean()))
        for point, sides in means.items()
    }


# --- how far it can be believed --------------------------------------------------------------------------------------


def lint(pairs: Sequence[ContrastPair]) -> list[str]:
    """What is wrong with some pairs, in words; nothing is refused for it."""
    fit, heldout = ([pair for pair in pairs if pair.split == split] for split in ("fit", "heldout"))
    found = []
    if len(fit) < ENOUGH:
        found.append(f"{len(fit)} fit pairs: {ENOUGH} to 50 give a direction that hardly changes with the choice")
    if not heldout:
        found.append("no pairs of the split 'heldout': nothing says whether the direction holds beyond the fit pairs")
    if equal := sum(pair.positive == pair.negative for pair in pairs):
        found.append(f"{equal} pairs have two equal sides")
    if again := len(pairs) - len({(pair.prompt, pair.positive, pair.negative) for pair in pairs}):
        found.append(f"{again} pairs are there more than once")
    if shared := len({pair.prompt for pair in fit} & {pair.prompt for pair in heldout}):
        found.append(f"{shared} prompts are both in fit and in heldout")
    return found + _uneven(fit)


def _uneven(fit: Sequence[ContrastPair]) -> list[str]:
    """What else tells the sides of fit pairs apart."""
    found, sides = [], {side: [getattr(pair, side) for pair in fit] for side in ("positive", "negative")}
    long = {side: np.mean([len(text.split()) for text in texts]) for side, texts in sides.items() if texts}
    if long and max(long.values()) > UNEVEN * min(long.values()):
        longer = max(long, key=lambda side: long[side])
        ratio = max(long.values()) / max(min(long.values()), 1e-12)
        found.append(f"{longer} sides are {ratio:.2f} times as long: the direction may mean length")
    firsts = {side: Counter(text.split()[0].lower() for text in texts if text.split()) for side, texts in sides.items()}
    for side, other in (("positive", "negative"), ("negative", "positive")):
        for word, n in firsts[side].most_common(1):
            if len(fit) > 1 and n > COMMON * len(fit) and firsts[other][word] < n / 2:
                found.append(f"{n} of {len(fit)} {side} sides begin with '{word}': the direction may mean that word")
    return found


def fit_quality(d: Sides, direction: Direction, method: str, seed: int) -> dict[str, float]:
    """How much the fit pairs agree.

    Returns: `agreement`, the mean cosine of a pair's difference with the direction, which predicts how well steering
      works (Braun et al., arXiv:2505.22637); `stability`, the mean cosine of the direction with those of pairs drawn
      from these with replacement, and `stability_low`, of which 5% are lower.
    """
    lengths = np.maximum(np.linalg.norm(d, axis=1), 1e-12)
    rng = np.random.default_rng([seed, 1])
    drawn = [direction_of(d[rng.integers(len(d), size=len(d))], method) @ direction for _ in range(REFITS)]
    return {
        "agreement": float((d @ direction / lengths).mean()),
        "stability": float(np.mean(drawn)),
        "stability_low": float(np.quantile(drawn, 0.05)),
    }


def heldout_quality(
    loaded: LoadedModel, vector: SteeringVector, pairs: Sequence[ContrastPair], seed: int
) -> dict[str, Any]:
    """What held-out pairs say, with 95% bootstrap intervals over pairs; empty if there are none.

    Returns: `heldout_auroc`, how well projections tell all positive sides from all negative ones; `heldout_accuracy`,
      the share of pairs whose positive side lies further along; `anti_steerable`, the share of pairs of which steering
      makes the positive continuation less likely, relative to the negative one (Tan et al., arXiv:2407.12404); and
      `n_heldout`.
    """
    if not pairs:
        return {}
    point = HookPoint.parse(vector.hook_point)
    positive, negative, _ = read_sides(loaded, [point], pairs)[point]
    anti = (gains(loaded, vector, pairs, PROBE_DOSE) < 0).astype(float)
    return {
        **separation(positive @ vector.direction, negative @ vector.direction, seed),
        **means({"anti_steerable": anti}, seed),
    }


def midpoint_of(positive: Sides, negative: Sides, direction: Direction) -> float:
    """Halfway between the sides along a direction: where a text passes from one side to the other."""
    return float(((positive + negative) @ direction).mean() / 2)


def separation(positive: Float[np.ndarray, " pair"], negative: Float[np.ndarray, " pair"], seed: int) -> dict[str, Any]:
    """How well projections tell the sides of held-out pairs apart, with 95% bootstrap intervals over pairs."""
    n = len(positive)
    weights = np.concatenate([np.ones((1, n)), draw(n, RESAMPLES, np.random.default_rng(seed))])
    scores, is_positive = np.concatenate([positive, negative]), np.arange(2 * n) < n
    areas = auroc(scores, is_positive, np.concatenate([weights] * 2, axis=1))
    return {
        "n_heldout": n,
        "heldout_auroc": float(areas[0]),
        "heldout_auroc_ci95": interval(areas[1:]),
        **means({"heldout_accuracy": (positive > negative).astype(float)}, seed),
    }


def gains(
    loaded: LoadedModel, vector: SteeringVector, pairs: Sequence[ContrastPair], dose: float
) -> Float[np.ndarray, " pair"]:
    """Nats a token by which the positive continuation of each pair gains on the negative one, from -dose to +dose."""
    prompts, point = [pair.prompt for pair in pairs], HookPoint.parse(vector.hook_point)
    found = []
    for sign in (1, -1):
        push = Add(torch.from_numpy(vector.direction), sign * vector.coefficient_of(dose))
        with steering(loaded, [Intervention(push, point)]):
            costs = [
                np.array([reading.nll for reading in reread(loaded, point, prompts, texts)])
                for texts in ([pair.positive for pair in pairs], [pair.negative for pair in pairs])
            ]
        found.append(sign * (costs[1] - costs[0]))
    return found[0] + found[1]

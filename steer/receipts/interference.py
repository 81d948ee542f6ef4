"""How many axes can be stacked before concepts fade or text falls apart.

Flow of `interference`:
1. every vector steers alone, at its own coefficient; one whose effect cannot be told from none is left out, since there
   is nothing that it could keep. The rest are the axes;
2. in several random orders, the first k axes steer together, k = 1, 2, ..., in each of the arms: as they are, at right
   angles to each other (`steer.composition`), and within a budget for the joint dose. The control stacks the first axis
   of each order with k - 1 random directions, each at the hook point and coefficient of the axis that it stands for:
   what any company of that length does to it;
3. the unsteered model re-reads the texts (`steer.measures.effect`):

    retention    effect(axis in the stack) / effect(axis alone), averaged over the axes of a stack and the orders
    crosstalk    |effect(axis that is not in the stack)| / |its effect alone|, averaged likewise; sampling alone gives
                 that of the row k = 0, where nothing is steered
    damage       KL a token over the unsteered texts, rise in the texts' cost and in repetition

4. the limit of an arm is the largest k up to which, on average over the orders, all of retention and damage are
   within bounds. Its interval comes from drawing orders again; those of retention from drawing prompts again.

The stack of k = 1 is sampled anew, so its retention is 1 but for chance, and below it for axes that looked better alone
than they are. A stack that comes up twice, in other orders or arms, is measured once.

Left out: effects that are no shares of tokens; how axes share one concept on purpose; choosing coefficients anew.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from activations.errors import ConfigError
from activations.models import LoadedModel, Status, load_model
from sae.metrics import RESAMPLES, draw
from steer.composition import composition, joint_doses, orthogonalised, within_budget
from steer.generate import generate_conditions
from steer.library import load_library, named
from steer.making.make import load_prompts
from steer.measures.concepts import concept_of
from steer.measures.effect import Concept, kl_of, rate, reread, states
from steer.operations import Intervention
from steer.receipts.config import InterferenceConfig
from steer.vectors import SteeringVector

CONTROL = "random_company"
EXAMPLES = 2
"""prompts whose texts are kept"""

Vectors = list[SteeringVector]


class Stack(NamedTuple):
    """Vectors that steer together."""

    arm: str
    order: int
    k: int
    axes: tuple[int, ...]
    """those whose retention it tells"""
    vectors: Vectors

    @property
    def content(self) -> tuple[Any, ...]:
        """The same for stacks that steer alike."""
        return tuple(sorted((v.hook_point, v.direction.tobytes(), v.coefficient) for v in self.vectors))


class Reading(NamedTuple):
    """What came of the prompts under one stack."""

    rates: Float[np.ndarray, "axis prompt"]
    nll: Float[np.ndarray, " prompt"]
    repetition: Float[np.ndarray, " prompt"]
    kl: float
    texts: list[str]


class Bounds(NamedTuple):
    """What a stack has to keep and may cost, by key of a curve."""

    retention: float
    kl: float
    nll_rise: float
    repetition_rise: float

    def broken(self, figures: Mapping[str, float]) -> list[str]:
        """The keys that are out of bounds."""
        over = [key for key in ("kl", "nll_rise", "repetition_rise") if figures[key] > getattr(self, key)]
        return ["retention"] * (figures["retention"] < self.retention) + over


def interference(
    config: InterferenceConfig, loaded: LoadedModel | None = None, *, on_status: Status | None = None
) -> dict[str, Any]:
    """Measure, and write `interference.json`, `interference.html` and the config to `config.out`.

    Raises: ConfigError for fewer than two vectors, or fewer that do something alone; UnknownNameError for a vector that
      is not in the library; MismatchError for a vector of another model or a latent of another SAE; NumericsError for
      vectors that cannot be made orthogonal.
    """
    from steer.receipts.interference_report import write_report

    vectors = _chosen(config)
    concepts = [concept_of(vector, config.sae) for vector in vectors]
    loaded = loaded or load_model(config.model, device=config.device, on_status=on_status)
    result = stack_axes(loaded, vectors, concepts, load_prompts("heldout")[: config.prompts], config, on_status)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "interference.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_report(config.out / "interference.html", result)
    config.save(config.out / "config.yaml")
    return result


def stack_axes(
    loaded: LoadedModel,
    vectors: Sequence[SteeringVector],
    concepts: Sequence[Concept],
    prompts: Sequence[str],
    config: InterferenceConfig,
    on_status: Status | None = None,
) -> dict[str, Any]:
    """The figures, ready for JSON; raises as `interference`."""
    say = on_status or (lambda _: None)
    say(f"{len(vectors)} vectors, each alone")
    read = _Reader(loaded, concepts, prompts, config, say)
    base, *alone = read([[], *([vector] for vector in vectors)])
    effects = np.stack([reading.rates[i] - base.rates[i] for i, reading in enumerate(alone)])
    intervals = [_interval(effect, config.seed) for effect in effects]
    kept = [i for i, (low, high) in enumerate(intervals) if low > 0 or high < 0]
    _check_enough(vectors, kept, effects, intervals)
    axes, read.concepts = [vectors[i] for i in kept], [concepts[i] for i in kept]
    base = base._replace(rates=base.rates[kept])
    orders = _orders(len(axes), config.orders, config.seed)
    stacks = _stacks(axes, orders, config)
    distinct = {stack.content: stack.vectors for stack in stacks}
    say(f"{len(axes)} axes in {len(orders)} orders: {len(distinct)} different stacks")
    readings = dict(zip(distinct, read(list(distinct.values())), strict=True))
    measured = [(stack, readings[stack.content]) for stack in stacks]
    bounds = Bounds(config.min_retention, config.max_kl, config.max_nll_rise, config.max_repetition_rise)
    arms = {
        arm: _arm([pair for pair in measured if pair[0].arm in (arm, "none")], base, effects[kept], bounds, config.seed)
        for arm in (*config.arms, CONTROL)
    }
    names = [axis.name for axis in axes]
    for arm in arms.values():
        arm["axes"] = {names[i]: by_k for i, by_k in arm["axes"].items()}
    turned = orthogonalised(axes, config.orthogonalisation).kept if "orthogonalised" in config.arms else {}
    return {
        "model": loaded.id,
        "n_prompts": len(prompts),
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "orders": [[names[i] for i in order] for order in orders],
        "n_stacks": len(distinct),
        "bounds": bounds._asdict(),
        "budget": config.budget,
        "vectors": {
            vector.name: _solo(vector, effects[i], intervals[i], alone[i].kl) for i, vector in enumerate(vectors)
        },
        "left_out": [vector.name for i, vector in enumerate(vectors) if i not in kept],
        "composition": composition(axes).as_json(),
        "orthogonalisation": config.orthogonalisation,
        "orthogonalised_cosines": turned,
        "arms": arms,
        "verdicts": {arm: verdict(arm, found["limit"], len(axes)) for arm, found in arms.items() if arm != CONTROL},
        "examples": _examples(measured, base, prompts, names),
    }


def _solo(
    vector: SteeringVector, effect: Float[np.ndarray, " prompt"], ends: tuple[float, float], kl: float
) -> dict[str, Any]:
    """What a vector does alone."""
    return {
        "hook_point": vector.hook_point,
        "coefficient": vector.coefficient,
        "dose": vector.dose(vector.coefficient),
        "effect_alone": float(effect.mean()),
        "effect_alone_low": ends[0],
        "effect_alone_high": ends[1],
        "kl_alone": kl,
    }


def verdict(arm: str, limit: Mapping[str, Any], n_axes: int) -> str:
    """The limit of an arm in words."""
    low, high = limit["ci95"]
    k, spread = limit["k"], f" ({low} to {high} over orders)" if low != high else ""
    if not limit["stopped_by"]:
        more = (
            f"the {n_axes} axes of this library are too few to reach the limit" if k == n_axes else "max_k was reached"
        )
        return f"{arm}: {k} or more{spread}; {more}"
    return f"{arm}: {k}{spread}; {k + 1} are too many for {' and '.join(limit['stopped_by'])}"


# --- stacks ----------------------------------------------------------------------------------------------------------


def _orders(n: int, n_orders: int, seed: int) -> list[list[int]]:
    """Random orders of n axes, which take turns in coming first."""
    rng = np.random.default_rng([seed, 1])
    firsts = rng.permutation(n)
    orders = []
    for i in range(n_orders):
        first = int(firsts[i % n])
        orders.append([first, *rng.permutation([j for j in range(n) if j != first]).tolist()])
    return orders


def _stacks(axes: Sequence[SteeringVector], orders: Sequence[list[int]], config: InterferenceConfig) -> list[Stack]:
    """All stacks, the empty one first."""
    arms: dict[str, Callable[[Vectors], Vectors]] = {
        "as_is": lambda stacked: stacked,
        "orthogonalised": lambda stacked: orthogonalised(stacked, config.orthogonalisation).vectors,
        "within_budget": lambda stacked: within_budget(stacked, config.budget),
    }
    most = min(len(axes), config.max_k or len(axes))
    found = [Stack("none", 0, 0, (), [])]
    for o, order in enumerate(orders):
        company = _random_company([axes[i] for i in order], [config.seed, 2, o])
        for k in range(1, most + 1):
            stacked = [axes[i] for i in order[:k]]
            found += [Stack(arm, o, k, tuple(order[:k]), arms[arm](stacked)) for arm in config.arms]
            found.append(Stack(CONTROL, o, k, (order[0],), company[:k]))
    return found


def _random_company(axes: Sequence[SteeringVector], seed: Sequence[int]) -> Vectors:
    """The first axis, and random unit directions in place of the others."""
    rows = np.random.default_rng(seed).standard_normal((len(axes), len(axes[0].direction)))
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return [axes[0], *(replace(axis, direction=row) for axis, row in zip(axes[1:], unit[1:], strict=True))]


class _Reader:
    """Writes under stacks and reads back."""

    def __init__(
        self,
        loaded: LoadedModel,
        concepts: Sequence[Concept],
        prompts: Sequence[str],
        config: InterferenceConfig,
        say: Callable[[str], None],
    ):
        self.concepts = list(concepts)
        self._loaded, self._prompts, self._config, self._say = loaded, list(prompts), config, say
        self._n_batches, self._plain = 0, []

    def __call__(self, stacks: Sequence[Vectors]) -> list[Reading]:
        """The readings of some stacks; the first call's first stack has to be the empty one, whose texts KL is over."""
        size, found = max(1, self._config.batch // len(self._prompts)), []
        for start in range(0, len(stacks), size):
            some = stacks[start : start + size]
            conditions = [[Intervention.of(vector) for vector in stack] for stack in some]
            limits = {"max_new_tokens": self._config.max_new_tokens, "seed": 1000 * self._config.seed + self._n_batches}
            texts = generate_conditions(self._loaded, conditions, self._prompts, **limits)
            self._n_batches += 1
            self._plain = self._plain or texts[0]
            kls = kl_of(self._loaded, conditions, self._prompts, self._plain)
            found += [self._read(row, kl) for row, kl in zip(texts, kls, strict=True)]
            self._say(f"{len(found)} of {len(stacks)} stacks")
        return found

    def _read(self, texts: list[str], kl: float) -> Reading:
        points = list(dict.fromkeys(concept.hook_point for concept in self.concepts))
        first = reread(self._loaded, points[0], self._prompts, texts)
        at = {points[0]: first}
        for point in points[1:]:
            values = states(self._loaded, point, self._prompts, texts)
            at[point] = [reading._replace(x=x) for reading, x in zip(first, values, strict=True)]
        rates = [[rate(reading, concept) for reading in at[concept.hook_point]] for concept in self.concepts]
        costs, again = (np.array([getattr(reading, key) for reading in first]) for key in ("nll", "repetition"))
        return Reading(np.array(rates), costs, again, kl, texts)


# --- figures ---------------------------------------------------------------------------------------------------------


def _arm(
    measured: Sequence[tuple[Stack, Reading]],
    base: Reading,
    alone: Float[np.ndarray, "axis prompt"],
    bounds: Bounds,
    seed: int,
) -> dict[str, Any]:
    """The curves of one arm, its limit, and the retention of each axis."""
    n_prompts = len(base.nll)
    weights = np.concatenate([np.ones((1, n_prompts)), draw(n_prompts, RESAMPLES, np.random.default_rng(seed))])
    by_k: dict[int, list[dict[str, Any]]] = {}
    for stack, reading in measured:
        by_k.setdefault(stack.k, []).append(_figures(stack, reading, base, alone, weights / n_prompts))
    ks = sorted(by_k)
    curve = {str(k): _row(by_k[k]) for k in ks}
    per_order = {k: [{key: each[key] for key in Bounds._fields} for each in by_k[k]] for k in ks if k > 0}
    axes: dict[int, dict[str, float]] = {}
    for k in ks:
        for axis in sorted({axis for each in by_k[k] for axis in each["axes"]}):
            values = [each["axes"][axis] for each in by_k[k] if axis in each["axes"]]
            axes.setdefault(axis, {})[str(k)] = float(np.mean(values))
    return {"curve": curve, "limit": limit_of(per_order, bounds, seed), "axes": axes}


def _figures(
    stack: Stack,
    reading: Reading,
    base: Reading,
    alone: Float[np.ndarray, "axis prompt"],
    weights: Float[np.ndarray, "draw prompt"],
) -> dict[str, Any]:
    """One stack's; the first draw of prompts is all of them once."""
    with np.errstate(divide="ignore", invalid="ignore"):  # prompts may be drawn on which an axis does nothing
        ratio = ((reading.rates - base.rates) @ weights.T) / (alone @ weights.T)  # [axis, draw]
    others = [i for i in range(len(alone)) if i not in stack.axes]
    return {
        "axes": {axis: float(ratio[axis, 0]) for axis in stack.axes},
        "retention": float(ratio[list(stack.axes), 0].mean()) if stack.axes else None,
        "drawn": ratio[list(stack.axes), 1:].mean(axis=0) if stack.axes else None,
        "crosstalk": float(np.abs(ratio[others, 0]).mean()) if others else None,
        "kl": reading.kl,
        "nll_rise": float((reading.nll - base.nll).mean()),
        "repetition_rise": float((reading.repetition - base.repetition).mean()),
        "joint_dose": max(joint_doses(stack.vectors).values(), default=0.0),
    }


def _row(some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One k of a curve: means over the orders, and the interval of retention over prompts."""
    found: dict[str, Any] = {"n_orders": len(some)}
    for key in ("joint_dose", "retention", "crosstalk", "kl", "nll_rise", "repetition_rise"):
        values = [each[key] for each in some]
        found[key] = None if None in values else float(np.mean(values))
        if key == "retention":
            low, high = (None, None)
            if found[key] is not None:
                low, high = _finite_interval(np.array([each["drawn"] for each in some]))
            found |= {"retention_low": low, "retention_high": high}
    return found


def _finite_interval(drawn: Float[np.ndarray, "order draw"]) -> tuple[float | None, float | None]:
    """Of means over orders; none at an end that is not bounded, since an axis might do nothing alone."""
    with np.errstate(invalid="ignore"):
        means = drawn.mean(axis=0)
    either = np.concatenate([np.nan_to_num(means, nan=np.inf), np.nan_to_num(means, nan=-np.inf)])
    ends = np.quantile(either, [0.025, 0.975], method="nearest")
    low, high = (float(end) if np.isfinite(end) else None for end in ends)
    return low, high


def limit_of(per_order: Mapping[int, Sequence[Mapping[str, float]]], bounds: Bounds, seed: int) -> dict[str, Any]:
    """The largest k up to which figures, averaged over orders, are within bounds.

    Args:
      per_order: k from 1 on -> the figures of each order.
    Returns: `k`, 0 if not even one is; `ci95` over orders drawn again; `stopped_by`, what the next k breaks.
    """
    n = len(per_order[1])
    tables = {
        key: np.array([[each[key] for each in per_order[k]] for k in sorted(per_order)]) for key in Bounds._fields
    }

    def largest(weights: Float[np.ndarray, " order"]) -> tuple[int, list[str]]:
        for i in range(len(per_order)):
            if broken := bounds.broken({key: float(table[i] @ weights) for key, table in tables.items()}):
                return i, broken
        return len(per_order), []

    k, stopped_by = largest(np.full(n, 1 / n))
    drawn = draw(n, RESAMPLES, np.random.default_rng(seed)) / n
    low, high = np.quantile([largest(weights)[0] for weights in drawn], [0.025, 0.975], method="nearest").tolist()
    return {"k": k, "ci95": [int(low), int(high)], "stopped_by": stopped_by}


def _interval(values: Float[np.ndarray, " prompt"], seed: int) -> tuple[float, float]:
    drawn = draw(len(values), RESAMPLES, np.random.default_rng(seed)) @ values / len(values)
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return low, high


def _examples(
    measured: Sequence[tuple[Stack, Reading]], base: Reading, prompts: Sequence[str], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Texts of the first order, as the stack grows."""
    first = measured[1][0].arm
    grown = [(stack, reading) for stack, reading in measured if stack.order == 0 and stack.arm == first]
    found = []
    for i, prompt in enumerate(prompts[:EXAMPLES]):
        texts = [{"stack": "unsteered", "text": base.texts[i]}]
        texts += [{"stack": " + ".join(names[a] for a in stack.axes), "text": r.texts[i]} for stack, r in grown]
        found.append({"prompt": prompt, "arm": first, "texts": texts})
    return found


# --- what is measured ------------------------------------------------------------------------------------------------


def _chosen(config: InterferenceConfig) -> Vectors:
    library = load_library(config.library)
    vectors = [named(library, config.library, name) for name in dict.fromkeys(config.vectors or library)]
    if len(vectors) < 2:
        fix = "Make more with: saekit vector make"
        raise ConfigError(config.library, expected="two vectors or more, to stack", got=len(vectors), fix=fix)
    return vectors


def _check_enough(
    vectors: Sequence[SteeringVector],
    kept: Sequence[int],
    effects: np.ndarray,
    intervals: Sequence[tuple[float, float]],
) -> None:
    if len(kept) >= 2:
        return
    found = [
        f"{vector.name} {effect.mean():+.3f} ({low:+.3f} to {high:+.3f})"
        for vector, effect, (low, high) in zip(vectors, effects, intervals, strict=True)
    ]
    raise ConfigError(
        "vectors",
        expected="two or more whose effect alone can be told from none",
        got=", ".join(found),
        fix="Raise their coefficients, or give more prompts.",
    )

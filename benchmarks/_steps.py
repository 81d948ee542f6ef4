"""What all share that time a training step: what they train on, how they are timed, and what they report.

Needs numpy alone, so that it runs in every peer's environment. Activations are x = scale sum_i m_i d_i + noise, of
variance 1 a dimension. Features i fire independently of each other, k a token on average, with rates that fall as
1 / (rank + 10), m_i is uniform in 1/2 .. 3/2, and the directions d_i are random unit vectors, twice as many as
dimensions. Each trainer draws them itself, on its device; what differs between trainers is the random numbers.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

NOISE = 0.05
LOWEST, HIGHEST = 0.5, 1.5
"""of the magnitudes"""
FEATURES = 2
"""directions a dimension"""
BATCHES, BATCHES_BYTES = 8, 1 << 30
"""distinct batches, and what they may take together; at least two"""
SLEEPING = -1000.0
"""encoder bias of latents that must never be active"""
REPEAT_S, PROBE_S = 0.5, 0.1
"""how long a repeat is to take, and what is long enough to tell"""


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    arch: str = "topk"
    d_model: int = 576
    d_sae: int = 4608
    k: int = 32
    batch: int = 2048
    dead: float = 0.0
    """share of the latents that are dead all the time"""
    steps: int | None = None
    """steps a repeat; None: as many as take half a second"""
    repeats: int = 5
    warm: int = 10
    """steps before the first repeat, which compile and start to learn"""
    seed: int = 0

    @property
    def n_batches(self) -> int:
        """Distinct batches to go through in turn."""
        return min(max(BATCHES_BYTES // (4 * self.batch * self.d_model), 2), BATCHES)

    @property
    def n_features(self) -> int:
        """Directions that activations are made of."""
        return FEATURES * self.d_model

    @property
    def n_dead(self) -> int:
        """Latents that are dead: the first ones."""
        return round(self.dead * self.d_sae)


class Recipe(NamedTuple):
    """What activations are made with, besides random numbers."""

    rates: np.ndarray
    """share of the tokens on which each feature fires"""
    scale: float
    """by which the sum of features is multiplied"""


def recipe(settings: Settings) -> Recipe:
    """Rates that add up to k, unless that takes one above 0.9, and the scale that makes the variance 1 a dimension.

    >>> rates, scale = recipe(Settings(d_model=64, k=4))
    >>> round(float(rates.sum()), 3), round(float(rates[0] / rates[10]), 3)
    (4.0, 2.0)
    """
    rates = 1 / (np.arange(settings.n_features) + 10)
    rates = np.minimum(rates * settings.k / rates.sum(), 0.9)
    mean, mean_square = (LOWEST + HIGHEST) / 2, (HIGHEST**3 - LOWEST**3) / 3 / (HIGHEST - LOWEST)
    variance = (rates * mean_square - (rates * mean) ** 2).sum()
    return Recipe(rates.astype(np.float32), math.sqrt(settings.d_model / variance))


class Timing(NamedTuple):
    """What the clock said."""

    steps: int
    """steps a repeat"""
    seconds: list[float]
    """of each repeat"""


def measure(run: Callable[[int], None], settings: Settings) -> Timing:
    """Time `run(n)`, which takes n steps and waits until the device has done them."""
    run(settings.warm)
    steps = settings.steps or _enough(run)
    return Timing(steps, [_clock(run, steps) for _ in range(settings.repeats)])


def _enough(run: Callable[[int], None]) -> int:
    steps = 1
    while (seconds := _clock(run, steps)) < PROBE_S:
        steps *= 2
    return max(math.ceil(REPEAT_S / seconds * steps), 1)


def _clock(run: Callable[[int], None], steps: int) -> float:
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start


def figures(settings: Settings, timing: Timing) -> dict[str, Any]:
    """Milliseconds a step, of each repeat and of the median one, and tokens a second.

    >>> figures(Settings(batch=10), Timing(2, [0.2, 0.4, 0.1]))
    {'tok_s': 100, 'ms_step': 100.0, 'steps': 2, 'repeats': 3, 'all_ms': [100.0, 200.0, 50.0]}
    """
    all_ms = [1000 * seconds / timing.steps for seconds in timing.seconds]
    median = statistics.median(all_ms)
    return {
        "tok_s": round(1000 * settings.batch / median),
        "ms_step": round(median, 4),
        "steps": timing.steps,
        "repeats": len(all_ms),
        "all_ms": [round(ms, 4) for ms in all_ms],
    }

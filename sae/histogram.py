"""Histograms of activations whose range is not known beforehand, in numpy alone.

Bins are log-linear: each octave [2^e, 2^(e+1)) is cut into STEPS equal parts, so that the bin of a float32 is the upper
bits of its own bit pattern: exact on any device, the same in every run, and counts of two runs add up. A bin is
between 1/(2 STEPS) and 1/STEPS of its value wide. What is below or above all bins counts in the first or last.
"""

import numpy as np
from jaxtyping import Float, Int

from sae.metrics import histogram_quantile

STEPS = 4
LOWEST, HIGHEST = -16, 16
N_BINS = STEPS * (HIGHEST - LOWEST)
SHIFT = 21
"""bits of a float32 below its exponent and the first two bits of its fraction"""
FIRST = STEPS * (127 + LOWEST)
"""upper bits of 2^LOWEST"""


def edges(start: int = 0, n: int = N_BINS) -> Float[np.ndarray, " edge"]:
    """Lower edges of `n` bins from number `start` on, and the upper edge of the last.

    >>> edges(64, 4).tolist()
    [1.0, 1.25, 1.5, 1.75, 2.0]
    """
    octave, step = np.divmod(np.arange(start, start + n + 1), STEPS)
    return np.exp2(octave + LOWEST) * (1 + step / STEPS)


def trim(counts: Int[np.ndarray, " bin"]) -> tuple[int, Int[np.ndarray, " part"]]:
    """Number of the first bin that is not empty, and the counts from there to the last such; (0, none) if all are."""
    used = np.flatnonzero(counts)
    return (int(used[0]), counts[used[0] : used[-1] + 1]) if len(used) else (0, counts[:0])


def share_below(counts: list[int], start: int, value: float) -> float:
    """Share of what was counted that is below `value`, taking each bin as evenly filled; within a bin of the truth."""
    if not counts:
        return 0.0
    below = np.interp(value, edges(start, len(counts)), np.concatenate([[0], np.cumsum(counts)]))
    return float(below / sum(counts))


def quantile(counts: list[int], start: int, share: float) -> float:
    """The value below which `share` of what was counted lies, taking each bin as evenly filled; 0 if nothing was."""
    if not counts:
        return 0.0
    return histogram_quantile(np.array(counts), edges(start, len(counts)), share)

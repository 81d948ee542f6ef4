"""How fast annotators work, from the times of their events, pauses left out.

The time from an event to the next is spent on the next one's latent. Where it is longer than `PAUSE` seconds it is a
pause, and the latent counts for nothing, since how much of it was work is not known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from sae.annotation.events import Event

PAUSE = 300.0
"""seconds without an event that are a pause"""


@dataclass(frozen=True)
class Pace:
    """How fast somebody worked."""

    latents: int
    """that were worked on in the time that counts"""
    seconds: float
    """time that counts"""
    latents_an_hour: float | None
    """None where no time counts"""
    median_seconds: float | None
    """a latent"""
    pauses: int


def pace(events: Sequence[Event]) -> Pace:
    """Of one annotator's events.

    >>> minutes = (0, 1, 3, 9)
    >>> at = [Event("k", i, "ann", "accept", created=f"2026-01-01T00:0{m}:00+00:00") for i, m in enumerate(minutes)]
    >>> pace(at)
    Pace(latents=2, seconds=180.0, latents_an_hour=40.0, median_seconds=90.0, pauses=1)
    """
    ordered = sorted(events, key=lambda event: (event.created, event.id))
    times = [datetime.fromisoformat(event.created).timestamp() for event in ordered]
    spent: dict[int, float] = {}
    pauses = 0
    for event, gap in zip(ordered[1:], np.diff(times).tolist(), strict=True):
        if gap > PAUSE:
            pauses += 1
        else:
            spent[event.latent] = spent.get(event.latent, 0.0) + gap
    total = sum(spent.values(), 0.0)
    return Pace(
        latents=len(spent),
        seconds=total,
        latents_an_hour=3600 * len(spent) / total if total else None,
        median_seconds=float(np.median([*spent.values()])) if spent else None,
        pauses=pauses,
    )

"""When the next request may be sent, and how long to wait behind one that failed.

Turns are spaced evenly: each takes 60 / requests_per_minute seconds, or 60 * tokens / tokens_per_minute if that is
more. Clock and chance are given, so that tests wait for nothing.
"""

import asyncio
import random
import time
from typing import Protocol, runtime_checkable

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


@runtime_checkable
class Clock(Protocol):
    """Time, and waiting."""

    def now(self) -> float:
        """Seconds since some moment."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class WallClock:
    """The clock on the wall."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


class Pace:
    """Turns that all requests to an endpoint take."""

    def __init__(self, clock: Clock, requests_per_minute: float | None, tokens_per_minute: float | None):
        self._clock, self._next = clock, clock.now()
        self._a_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._a_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._paused_until = clock.now()

    async def turn(self, tokens: int) -> None:
        """Wait until a request of so many tokens may be sent."""
        at = max(self._clock.now(), self._next)
        self._next = at + max(self._a_request, tokens * self._a_token)
        while (at := max(at, self._paused_until)) > (now := self._clock.now()):
            await self._clock.sleep(at - now)

    def pause(self, seconds: float) -> None:
        """Let nobody send for so long."""
        self._paused_until = max(self._paused_until, self._clock.now() + seconds)


def wait_s(n_failures: int, chance: random.Random) -> float:
    """Seconds to wait behind the n-th failure in a row, from 1: doubling up to a minute, less up to a half by chance.

    >>> [round(wait_s(n, random.Random(0)) / min(2 ** (n - 1), 60), 3) for n in (1, 4, 9)]
    [0.922, 0.922, 0.922]
    """
    return min(FIRST_WAIT_S * 2.0 ** min(n_failures - 1, 30), LONGEST_WAIT_S) * chance.uniform(0.5, 1)

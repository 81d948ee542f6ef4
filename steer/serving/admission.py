"""How much is taken in: answers that run or wait, in all and of one key; what is beyond is refused at once.

Left out: who runs first, which is the engine's.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import HTTPException

from steer.browser.guard import refusal


class Admission:
    """Counts answers, in one event loop."""

    def __init__(self, most: int, most_per_key: int | None):
        self._most, self._most_per_key = most, most_per_key
        self._of: Counter[str] = Counter()

    @property
    def n(self) -> int:
        """Answers that run or wait."""
        return self._of.total()

    @contextmanager
    def of(self, key: str, n: int) -> Iterator[None]:
        """Room for `n` answers, as long as the context lasts. Raises: HTTPException 429."""
        if self.n + n > self._most:
            raise self._refused(f"at most {self._most} answers at once", f"{self.n + n}")
        if self._most_per_key is not None and self._of[key] + n > self._most_per_key:
            raise self._refused(f"at most {self._most_per_key} answers of one key", f"{self._of[key] + n}")
        self._of[key] += n
        try:
            yield
        finally:
            self._of[key] -= n
            if not self._of[key]:
                del self._of[key]

    def _refused(self, expected: str, got: str) -> HTTPException:
        again = {"retry-after": "1"}
        return refusal(429, "server", expected=expected, got=got, fix="Try again later.", headers=again)

"""How much is taken in: answers that run or wait, in all and of one key; what is beyond is refused at once.

A client tries again after 429, so a request for which there will never be room is refused with 400.

Left out: who runs first, which is the engine's.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

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
        """Room for `n` answers, as long as the context lasts.

        Raises: HTTPException 429; 400 if there never is room for as many.
        """
        self._check(n, self.n, self._most, "at once")
        if self._most_per_key is not None:
            self._check(n, self._of[key], self._most_per_key, "of one key")
        self._of[key] += n
        try:
            yield
        finally:
            self._of[key] -= n
            if not self._of[key]:
                del self._of[key]

    def _check(self, n: int, there: int, most: int, whose: str) -> None:
        expected = f"at most {most} answers {whose}"
        if n > most:
            raise refusal(400, "n", expected=expected, got=f"{n} in one request", fix="Ask for fewer at once.")
        if there + n > most:
            again = {"retry-after": "1"}
            got, fix = f"{there + n}", "Try again later."
            raise refusal(429, "server", expected=expected, got=got, fix=fix, headers=again)

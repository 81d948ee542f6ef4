"""Items that a thread makes before they are asked for."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

_T = TypeVar("_T")


@contextmanager
def ahead(items: Iterator[_T], n: int) -> Iterator[Iterator[_T]]:
    """The same items, of which a thread makes up to `n` before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        made = deque(pool.submit(next, items, None) for _ in range(n))

        def take() -> Iterator[_T]:
            while (item := made.popleft().result()) is not None:
                made.append(pool.submit(next, items, None))
                yield item

        try:
            yield take()
        finally:
            pool.shutdown(cancel_futures=True)

"""Many things, some at a time."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def parts(values: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Lists of up to n of them, in order; none of which is empty.

    >>> list(parts("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    remaining = iter(values)
    while part := list(islice(remaining, n)):
        yield part

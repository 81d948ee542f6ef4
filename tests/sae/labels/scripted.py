"""A model that answers by a function, and remembers what it was asked."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

from sae.labels.chat import Message, Reply, Request


class Scripted:
    """A `Chat` of 10 tokens a prompt and at most 5 an answer, one request at a time."""

    name = "scripted"
    settings: Mapping[str, Any] = {"t": 0}
    max_answer_tokens = 5

    def __init__(
        self,
        answer: Callable[[Request], Reply] = lambda request: Reply("yes", 10, 5),
        price_in: float = 0.0,
        price_out: float = 0.0,
    ):
        self._answer, self.price_in, self.price_out = answer, price_in, price_out
        self.asked: list[Request] = []

    def count(self, messages: tuple[Message, ...]) -> int:
        return 10

    async def answers(self, requests: Iterable[Request]) -> AsyncIterator[tuple[Request, Reply]]:
        for request in requests:
            self.asked.append(request)
            yield request, self._answer(request)

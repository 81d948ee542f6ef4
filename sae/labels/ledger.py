"""Every question goes through here: what was answered before is not asked again, and what may be spent is watched.

Flow of questions: 1. those whose answer is kept are answered; 2. of the others, each is admitted if its prompt and the
longest answer, beside all in flight, fit the budget; 3. each answer is written before it is used. Left out: asking.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from activations.errors import ConfigError
from activations.progress import progress
from sae.labels.chat import Chat, Reply, Request, cost_of, key_of
from sae.labels.config import BudgetConfig
from sae.labels.store import LabelStore, Spent


class Estimate(NamedTuple):
    """What requests would take that are not answered yet."""

    requests: int = 0
    kept: int = 0
    """requests that are answered already"""
    tokens_in: int = 0
    """about, rather too many"""
    tokens_out: int = 0
    """at most"""
    cost: float = 0.0
    """at most, in the unit of the prices"""

    def __add__(self, other: Any) -> "Estimate":
        """Both together."""
        return Estimate(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Estimate":
        """As much so many times."""
        *counts, cost = self
        return Estimate(*(round(factor * count) for count in counts), cost=factor * cost)


class Ledger:
    """Answers that are kept, and what may still be spent on others."""

    def __init__(self, store: LabelStore, budget: BudgetConfig, chats: Iterable[Chat]):
        self._store, self._budget = store, budget
        self._names = {chat.name for chat in chats}
        self._spent = store.spent(self._names)
        self._reserved: dict[str, tuple[int, float]] = {}
        self.stopped: str | None = None
        """why no more is asked; none while it is"""
        self.n_answered = self.n_kept = self.n_failed = 0
        """requests to these models: answered now, answered before, and failed"""

    @property
    def spent(self) -> Spent:
        """What the models took, in this run and before."""
        return self._spent

    async def answers(self, chat: Chat, requests: Iterable[Request], what: str) -> dict[str, Reply]:
        """Replies by key; none for what the budget had no room for, or what failed but may work another time."""
        by_key = {key_of(chat, request.messages): request for request in requests}
        replies = {key: Reply(text) for key, text in self._store.answers(by_key).items()}
        is_counted = chat.name in self._names
        self.n_kept += is_counted * len(replies)
        missing = {key: request for key, request in by_key.items() if key not in replies}
        if not missing:
            return replies
        with progress(what, len(missing), "requests") as advance:
            async for request, reply in chat.answers(self._admitted(chat, missing)):
                key = key_of(chat, request.messages)
                self._store.keep(chat, request, reply)
                del self._reserved[key]
                self._spent = self._spent.plus(reply.tokens_in, reply.tokens_out, cost_of(chat, *reply[1:3]))
                self.n_answered += is_counted and reply.text is not None
                self.n_failed += is_counted and reply.text is None
                if reply.text is not None or reply.is_refused:
                    replies[key] = reply
                advance(1)
        return replies

    def estimate(self, chat: Chat, requests: Iterable[Request]) -> Estimate:
        """What asking would take."""
        by_key = {key_of(chat, request.messages): request for request in requests}
        kept = self._store.answers(by_key)
        counts = [chat.count(request.messages) for key, request in by_key.items() if key not in kept]
        tokens_in, tokens_out = sum(counts), len(counts) * chat.max_answer_tokens
        return Estimate(len(counts), len(kept), tokens_in, tokens_out, cost_of(chat, tokens_in, tokens_out))

    def kept(self, chat: Chat, request: Request) -> str | None:
        """The answer to a request, if it is kept."""
        key = key_of(chat, request.messages)
        return self._store.answers([key]).get(key)

    def _admitted(self, chat: Chat, requests: dict[str, Request]) -> Iterator[Request]:
        """Requests as long as the budget has room for them."""
        for key, request in requests.items():
            tokens_in = chat.count(request.messages)
            needed = tokens_in + chat.max_answer_tokens, cost_of(chat, tokens_in, chat.max_answer_tokens)
            if chat.name in self._names:  # what nobody is paid for needs no budget
                self.stopped = self.stopped or self._over(*needed)
                if self.stopped:
                    return
            self._reserved[key] = needed
            yield request

    def _over(self, tokens: int, cost: float) -> str | None:
        """What budget would be exceeded, with all that is in flight, by so much more."""
        max_tokens, max_cost = self._budget.max_tokens or math.inf, self._budget.max_cost or math.inf
        if math.isinf(max_tokens) and math.isinf(max_cost):
            return None
        tokens += self._spent.tokens_in + self._spent.tokens_out + sum(each for each, _ in self._reserved.values())
        cost += self._spent.cost + sum(each for _, each in self._reserved.values())
        if tokens > max_tokens:
            return f"budget.max_tokens {max_tokens:,} has no room for another request"
        return f"budget.max_cost {max_cost:g} has no room for another request" if cost > max_cost else None


def check_budget(budget: BudgetConfig, prices: Iterable[tuple[float | None, float | None]]) -> None:
    """Raise ConfigError for a budget of money where no prices are known."""
    if budget.max_cost is not None and any(None in pair for pair in prices):
        raise ConfigError(
            "budget.max_cost",
            expected="price_in and price_out of every endpoint",
            got="none",
            fix="Set explainer.price_in and explainer.price_out, and those of judge if there is one.",
        )

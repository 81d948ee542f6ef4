"""What a model that explains or judges is asked, what it answers, and what every such model can do.

A request's key is a hash of all that decides its answer: model, messages and settings. Left out: the two kinds of
models, `sae.labels.endpoint` and `sae.labels.local`, and keeping answers (`sae.labels.ledger`).
"""

import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

LETTERS_A_TOKEN = 3
"""fewer than most tokenizers need for English, so that estimates lie above what is used"""
TOKENS_A_MESSAGE = 8


class Message(NamedTuple):
    """A turn of a conversation."""

    role: str
    """system or user; or assistant, in the last message alone: how to begin, where a model can be made to"""
    content: str


class Request(NamedTuple):
    """Something to ask."""

    purpose: str
    """explanation, or the method of scoring"""
    latent: int
    messages: tuple[Message, ...]


class Reply(NamedTuple):
    """What became of a request."""

    text: str | None
    """the raw answer, its beginning included where that was given; none if there was none"""
    tokens_in: int = 0
    tokens_out: int = 0
    error: str | None = None
    """in one line, why there is no answer"""
    is_refused: bool = False
    """whether the endpoint refused this very request, so that repeating it is of no use"""
    tries: int = 1


@runtime_checkable
class Chat(Protocol):
    """A model that answers."""

    name: str
    """the author of what it writes"""
    settings: Mapping[str, Any]
    """what beside name and messages decides an answer"""
    price_in: float
    """money a million tokens of prompts"""
    price_out: float
    max_answer_tokens: int

    def count(self, messages: tuple[Message, ...]) -> int:
        """Tokens of a prompt, rather too many than too few."""
        ...

    def answers(self, requests: Iterable[Request]) -> AsyncIterator[tuple[Request, Reply]]:
        """Answer requests, each as soon as it can be, and take the next one only when there is room for it."""
        ...


def key_of(chat: Chat, messages: tuple[Message, ...]) -> str:
    """SHA-256 of model, messages and settings."""
    return digest([chat.name, dict(chat.settings), messages])


def digest(content: Any) -> str:
    """SHA-256 of JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def about_tokens(messages: tuple[Message, ...]) -> int:
    """Tokens of a prompt where the tokenizer is not known.

    >>> about_tokens((Message("user", "Is it so?"),))
    11
    """
    return sum(TOKENS_A_MESSAGE + len(message.content.encode()) // LETTERS_A_TOKEN for message in messages)


def cost_of(chat: Chat, tokens_in: int, tokens_out: int) -> float:
    """Money, in the unit of the prices."""
    return (tokens_in * chat.price_in + tokens_out * chat.price_out) / 1e6

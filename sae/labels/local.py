"""A model that runs here, through transformers: the same as an endpoint, but slower, free and offline."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from itertools import islice
from typing import Any

from activations.chat import chat_prompt
from activations.errors import ConfigError
from activations.generate import generate
from activations.models import LoadedModel
from sae.labels.chat import Message, Reply, Request
from sae.labels.config import LOCAL, ChatModelConfig


class LocalChat:
    """A `Chat` of a loaded model, `concurrency` prompts a batch."""

    price_in = price_out = 0.0

    def __init__(self, config: ChatModelConfig, loaded: LoadedModel):
        self._loaded, self._batch = loaded, config.concurrency
        self._temperature = config.temperature if config.temperature is not None else 1.0
        self.name = f"{LOCAL}{loaded.id}"
        self.max_answer_tokens = config.max_answer_tokens
        self.settings: Mapping[str, Any] = {
            "fingerprint": loaded.fingerprint,
            "temperature": self._temperature,
            "max_tokens": config.max_answer_tokens,
        }

    def count(self, messages: tuple[Message, ...]) -> int:
        """Tokens of a prompt."""
        return self._tokens(self._prompt(messages))

    async def answers(self, requests: Iterable[Request]) -> AsyncIterator[tuple[Request, Reply]]:
        """Answer requests batch by batch."""
        waiting = iter(requests)
        while batch := list(islice(waiting, self._batch)):
            for answered in zip(batch, self._replies(batch), strict=True):
                yield answered
            await asyncio.sleep(0)  # so that Ctrl-C is heard

    def _replies(self, batch: list[Request]) -> list[Reply]:
        prompts = [self._prompt(request.messages) for request in batch]
        try:
            texts = generate(
                self._loaded,
                prompts,
                max_new_tokens=self.max_answer_tokens,
                temperature=self._temperature,
                add_special_tokens=False,
            )
        except ConfigError as error:  # a prompt that is too long for the model
            if len(batch) > 1:
                return [self._replies([request])[0] for request in batch]
            return [Reply(None, error=str(error), is_refused=True)]
        return [
            Reply(_beginning(request) + text, self._tokens(prompt), min(self._tokens(text), self.max_answer_tokens))
            for request, prompt, text in zip(batch, prompts, texts, strict=True)
        ]

    def _prompt(self, messages: tuple[Message, ...]) -> str:
        return chat_prompt(self._loaded, [message._asdict() for message in messages])

    def _tokens(self, text: str) -> int:
        return len(self._loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _beginning(request: Request) -> str:
    """How the answer was made to begin."""
    last = request.messages[-1]
    return last.content if last.role == "assistant" else ""

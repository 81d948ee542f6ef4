"""A model that runs here answers like an endpoint."""

import asyncio
from collections.abc import Iterator

from activations.chat import chat_prompt
from activations.generate import generate
from sae.labels.chat import Message, Reply, Request
from sae.labels.config import ChatModelConfig
from sae.labels.local import LocalChat
from tests.sae.labels.conftest import Indexed


def asked(n: int, letters: int = 4) -> list[Request]:
    return [
        Request("p", i, (Message("user", "la " * letters + str(i)), Message("assistant", "Answer:"))) for i in range(n)
    ]


def run(chat: LocalChat, requests: Iterator[Request] | list[Request]) -> dict[int, Reply]:
    async def collect() -> dict[int, Reply]:
        return {request.latent: reply async for request, reply in chat.answers(requests)}

    return asyncio.run(collect())


def test_answers_are_greedy_begin_as_told_and_are_counted(indexed: Indexed) -> None:
    loaded = indexed.loaded
    chat = LocalChat(ChatModelConfig(max_answer_tokens=5, concurrency=2), loaded)
    replies = run(chat, asked(3))
    for request in asked(3):
        prompt = chat_prompt(loaded, [message._asdict() for message in request.messages])
        assert prompt.endswith("Answer:")
        text = generate(loaded, [prompt], max_new_tokens=5, temperature=0.0, add_special_tokens=False)[0]
        size = len(loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        reply = replies[request.latent]
        assert (reply.text, reply.tokens_in) == ("Answer:" + text, size)
        assert 0 < reply.tokens_out <= 5
        assert chat.count(request.messages) == size
    assert chat.name == f"local:{loaded.id}"
    assert chat.settings == {"fingerprint": loaded.fingerprint, "temperature": 0.0, "max_tokens": 5}


def test_no_more_is_taken_than_a_batch_has_room_for(indexed: Indexed) -> None:
    taken: list[int] = []

    def requests() -> Iterator[Request]:
        for request in asked(5):
            taken.append(request.latent)
            yield request

    async def first() -> None:
        chat = LocalChat(ChatModelConfig(max_answer_tokens=2, concurrency=2), indexed.loaded)
        async for _ in chat.answers(requests()):
            assert taken == [0, 1]
            return

    asyncio.run(first())


def test_a_prompt_that_is_too_long_is_refused_and_the_others_are_answered(indexed: Indexed) -> None:
    chat = LocalChat(ChatModelConfig(max_answer_tokens=2, concurrency=4), indexed.loaded)
    long = asked(1, letters=20_000)[0]._replace(latent=7)
    replies = run(chat, [*asked(2), long])
    assert replies[7].is_refused
    assert "at most" in (replies[7].error or "")
    assert all((replies[i].text or "").startswith("Answer:") for i in (0, 1))

"""What an answer says of its steering, whatever its engine computed beyond it."""

import asyncio

import pytest

from activations.errors import EngineError
from activations.models import LoadedModel
from steer.serving.engine import Job, Ticket
from steer.serving.one_by_one import OneByOne
from steer.serving.sampling import Sampling, Step
from steer.serving.writes import Answers, Choice


def test_gates_are_told_of_tokens_that_the_answer_was_computed_from() -> None:
    async def fired() -> dict[str, list[int]]:
        return {"own": [1, 4, 5, 6, 7], "other": []}

    async def settled() -> Choice:
        job, loop, scaled = Job("a", [5] * 5, Sampling(8)), asyncio.get_running_loop(), {"resid_post.1": 0.5}
        ticket = Ticket(job, loop, frozenset(), None, scaled, fired_on=fired)
        choice = Choice(ticket, n_read=2)
        await choice.settle()
        return choice

    # Five tokens of a prompt, and two that were written, of which the second was computed from the first.
    found = asyncio.run(settled()).record()
    assert found == {"fired": {"own": [1, 4, 5], "other": []}, "scaled": {"resid_post.1": 0.5}}


def test_what_nobody_foresaw_is_told_at_once(served: LoadedModel) -> None:
    """A token that its tokenizer cannot decode ends the answer, not the deadline."""

    async def read() -> None:
        answers = Answers(OneByOne(served), [Job("a", [5], Sampling(8))], [], float("inf"))
        answers.choices[0].ticket.heard([Step(-1, None, [])])
        async for _ in answers.deltas():
            pass

    with pytest.raises(EngineError, match="StreamInput"):
        asyncio.run(asyncio.wait_for(read(), 20))


def test_answers_that_were_asked_for_are_given_up_where_the_next_one_fails(served: LoadedModel) -> None:
    """Whoever asked has no answers by which to cancel them."""
    asked = list[Ticket]()

    class Failing(OneByOne):
        def submit(self, job: Job) -> Ticket:
            if asked:
                raise RuntimeError("out of memory")
            asked.append(super().submit(job))
            return asked[-1]

    async def ask() -> None:
        Answers(Failing(served), [Job(name, [5], Sampling(8)) for name in "ab"], [], float("inf"))

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(ask())
    assert [ticket.stop.is_set() for ticket in asked] == [True]


def test_tokens_behind_a_stop_string_are_not_counted(served: LoadedModel) -> None:
    """An engine may be ahead of whoever looks for the string."""

    async def read() -> tuple[int, int]:
        job, tokens = Job("a", [5], Sampling(8)), served.tokenizer("abcd")["input_ids"]
        answers = Answers(OneByOne(served), [job], ["b"], float("inf"))
        ticket = answers.choices[0].ticket
        ticket.n_written = len(tokens)
        ticket.heard([Step(token, None, []) for token in tokens])
        async for _ in answers.deltas():
            pass
        return answers.n_read, len(tokens)

    n_read, n_written = asyncio.run(read())
    assert 0 < n_read < n_written

"""What an answer says of its steering, whatever its engine computed beyond it."""

import asyncio

from steer.serving.engine import Account, Job, Ticket
from steer.serving.sampling import Sampling
from steer.serving.writes import Choice


def test_gates_are_told_of_tokens_that_the_answer_was_computed_from() -> None:
    async def account() -> Account:
        return Account({"own": [1, 4, 5, 6, 7], "other": []}, {"resid_post.1": 0.5})

    async def settled() -> Choice:
        ticket = Ticket(Job("a", [5] * 5, Sampling(8)), asyncio.get_running_loop(), frozenset(), None)
        ticket.on_account = account
        choice = Choice(ticket, n_read=2)
        await choice.settle()
        return choice

    # Five tokens of a prompt, and two that were written, of which the second was computed from the first.
    found = asyncio.run(settled()).record()
    assert found == {"fired": {"own": [1, 4, 5], "other": []}, "scaled": {"resid_post.1": 0.5}}

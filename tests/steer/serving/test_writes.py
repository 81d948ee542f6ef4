"""What an answer says of its steering, whatever its engine computed beyond it."""

import asyncio

from steer.serving.engine import Job, Ticket
from steer.serving.sampling import Sampling
from steer.serving.writes import Choice


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

"""No answer is paid for twice, and no budget is exceeded."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from activations.errors import ConfigError
from sae.labels.chat import Message, Reply, Request, key_of
from sae.labels.config import BudgetConfig
from sae.labels.ledger import Estimate, Ledger, check_budget
from sae.labels.store import LabelStore
from tests.sae.labels.conftest import Indexed
from tests.sae.labels.scripted import Scripted


@pytest.fixture
def store(tmp_path: Path, indexed: Indexed) -> Iterator[LabelStore]:
    shutil.copytree(indexed.index, tmp_path / "index")
    with LabelStore.open(tmp_path / "index", "5ae") as store:
        yield store


def asked(n: int) -> list[Request]:
    return [Request("p", i, (Message("user", f"question {i}"),)) for i in range(n)]


def ask(store: LabelStore, chat: Scripted, requests: list[Request], **budget: float) -> tuple[Ledger, dict[str, Reply]]:
    ledger = Ledger(store, BudgetConfig.model_validate(budget), [chat])
    return ledger, asyncio.run(ledger.answers(chat, requests, "test"))


def test_the_same_question_is_asked_once(store: LabelStore) -> None:
    chat = Scripted()
    ledger, replies = ask(store, chat, asked(3) + asked(2))
    assert len(replies) == len(chat.asked) == ledger.n_answered == 3
    again, replies = ask(store, chat, asked(4))
    assert [request.latent for request in chat.asked[3:]] == [3]
    assert (len(replies), again.n_answered, again.n_kept) == (4, 1, 3)
    other = Scripted()
    other.settings = {"t": 1}
    ask(store, other, asked(1))
    assert len(other.asked) == 1


def test_an_answer_is_kept_before_the_next_question(store: LabelStore) -> None:
    chat = Scripted()

    def answer(request: Request) -> Reply:
        kept = store.answers(key_of(chat, each.messages) for each in asked(request.latent))
        assert len(kept) == request.latent
        return Reply("yes", 10, 5)

    chat._answer = answer
    assert len(ask(store, chat, asked(4))[1]) == 4


def test_what_failed_is_asked_again_the_next_time_and_a_refusal_counts_as_an_answer(store: LabelStore) -> None:
    said = {0: Reply(None, error="HTTP 503"), 1: Reply(None, error="HTTP 400", is_refused=True)}
    chat = Scripted(lambda request: said.get(request.latent, Reply("yes")))
    ledger, replies = ask(store, chat, asked(3))
    assert [replies.get(key_of(chat, request.messages)) for request in asked(3)] == [None, said[1], Reply("yes")]
    assert (ledger.n_failed, ledger.n_answered) == (2, 1)
    ask(store, chat, asked(3))
    assert [request.latent for request in chat.asked[3:]] == [0, 1]


@pytest.mark.parametrize("tokens", [1, 14, 15, 24, 40, 67, 100])
def test_a_budget_of_tokens_is_not_exceeded_and_leaves_no_room_for_another(store: LabelStore, tokens: int) -> None:
    chat = Scripted(lambda request: Reply("yes", 9, request.latent % 5))
    ledger, _ = ask(store, chat, asked(20), max_tokens=tokens)
    spent = ledger.spent.tokens_in + ledger.spent.tokens_out
    assert spent <= tokens
    assert ledger.stopped is not None
    assert spent + 15 > tokens
    n = len(chat.asked)
    again, replies = ask(store, chat, asked(20), max_tokens=tokens + 15)
    assert len(chat.asked) > n
    assert len(replies) == len(chat.asked)
    assert again.spent.tokens_in == 9 * len(chat.asked)


def test_a_budget_of_money_counts_earlier_runs(store: LabelStore) -> None:
    chat = Scripted(price_in=1e6, price_out=1e6)
    ledger, _ = ask(store, chat, asked(9), max_cost=40)
    assert (len(chat.asked), ledger.spent.cost) == (2, 30)
    assert ledger.stopped == "budget.max_cost 40 has no room for another request"
    ledger, _ = ask(store, chat, asked(9), max_cost=40)
    assert len(chat.asked) == 2
    ledger, replies = ask(store, chat, asked(9), max_cost=1000)
    assert (len(chat.asked), len(replies), ledger.stopped) == (9, 9, None)


def test_requests_in_flight_count(store: LabelStore) -> None:
    chat = Scripted()
    ledger = Ledger(store, BudgetConfig(max_tokens=50), [chat])
    admitted = list(ledger._admitted(chat, {str(i): request for i, request in enumerate(asked(9))}))
    assert len(admitted) == 3


def test_an_estimate_counts_what_is_not_answered(store: LabelStore) -> None:
    chat = Scripted(price_in=2.0, price_out=4.0)
    ledger, _ = ask(store, chat, asked(2))
    found = ledger.estimate(chat, asked(5) + asked(5))
    assert found == Estimate(3, 2, 30, 15, pytest.approx(120e-6))
    assert (found + found).times(0.5) == found
    assert len(chat.asked) == 2


def test_a_budget_of_money_needs_prices() -> None:
    check_budget(BudgetConfig(max_cost=1), [(1.0, 0.0)])
    check_budget(BudgetConfig(max_tokens=1), [(None, None)])
    with pytest.raises(ConfigError, match=r"budget\.max_cost.*price_in"):
        check_budget(BudgetConfig(max_cost=1), [(1.0, 0.0), (1.0, None)])

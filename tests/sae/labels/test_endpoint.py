"""An endpoint that is slow, down, out of patience or hostile costs time and nothing else."""

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError, EndpointError
from sae.labels.chat import Message, Reply, Request
from sae.labels.config import ChatModelConfig
from sae.labels.endpoint import MAX_BYTES, REFUSALS, Answered, Endpoint, Trouble, read_response
from tests.sae.labels.stand_in import FakeClock, Fault, StandIn, completion, stand_in

LIMITED = Fault(429, b'{"error": {"message": "slow down"}}')
DOWN = Fault(503, b"<html>unavailable</html>")


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in(lambda body: "to " + body["messages"][-1]["content"]) as server:
        yield server


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def endpoint(server: StandIn | None, clock: FakeClock, **settings: Any) -> Endpoint:
    url = {} if server is None else {"base_url": server.url}
    config = ChatModelConfig(**{"model": "m", "concurrency": 1, **url, **settings})
    return Endpoint(config, clock, random.Random(0))


def asked(n: int) -> list[Request]:
    return [
        Request("p", i, (Message("system", "s"), Message("user", f"question {i}"), Message("assistant", "A:")))
        for i in range(n)
    ]


def run(chat: Endpoint, n: int = 1) -> list[Reply]:
    """Replies in the order of the requests."""

    async def collect() -> dict[int, Reply]:
        return {request.latent: reply async for request, reply in chat.answers(asked(n))}

    found = asyncio.run(collect())
    return [found[i] for i in range(n)]


def test_what_is_sent_and_what_comes_back(server: StandIn, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "k-123")
    chat = endpoint(server, clock, key_env="THE_KEY", extra={"seed": 3}, temperature=0.5, max_answer_tokens=9)
    assert run(chat) == [Reply("to question 0", 100, 7)]
    assert server.bodies == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "question 0"}],
            "temperature": 0.5,
            "max_tokens": 9,
            "seed": 3,
        }
    ]
    assert server.headers[0]["Authorization"] == "Bearer k-123"
    assert chat.settings == {"temperature": 0.5, "max_tokens": 9, "seed": 3}


def test_what_is_null_is_left_out(server: StandIn, clock: FakeClock) -> None:
    extra = {"max_tokens": None, "max_completion_tokens": 50}
    run(endpoint(server, clock, temperature=None, extra=extra))
    assert server.bodies[0].keys() == {"model", "messages", "max_completion_tokens"}
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "fault",
    [
        LIMITED,
        DOWN,
        Fault(500),
        Fault(200, b""),
        Fault(200, b"<html>"),
        Fault(200, completion("cut")[:40]),
        Fault(200, completion("short"), cut=30),
        Fault(200, b"\xff\xfe\x00"),
        Fault(200, b"[" * 100_000),
        Fault(200, completion("x", role="user")),
        Fault(200, completion(3)),
        Fault(200, completion([{"type": "text"}])),
        Fault(200, b'{"choices": []}'),
        Fault(200, completion("x" * MAX_BYTES)),
    ],
    ids=lambda fault: f"{fault.status} {fault.content[:12]!r}",
)
def test_whatever_comes_once_the_next_try_is_answered(server: StandIn, clock: FakeClock, fault: Fault) -> None:
    server.faults.append(fault)
    (reply,) = run(endpoint(server, clock))
    assert (reply.text, reply.error, reply.tries) == ("to question 0", None, 2)
    assert len(clock.slept) == 1
    assert 0.5 <= clock.slept[0] <= 1


def test_a_timeout_is_tried_again(server: StandIn, clock: FakeClock) -> None:
    server.faults.append(Fault(hangs=True))
    (reply,) = run(endpoint(server, clock, timeout_s=0.2))
    assert (reply.text, reply.tries) == ("to question 0", 2)


def test_retry_after_holds_all_back(server: StandIn, clock: FakeClock) -> None:
    server.faults.append(LIMITED._replace(headers={"Retry-After": "17"}))
    replies = run(endpoint(server, clock, concurrency=1), 3)
    assert [reply.text for reply in replies] == ["to question 0", "to question 1", "to question 2"]
    assert clock.slept == [17]


def test_an_endpoint_that_asks_to_come_back_at_once_is_not_hammered(server: StandIn, clock: FakeClock) -> None:
    server.faults.extend([LIMITED._replace(headers={"Retry-After": "0"})] * 3)
    run(endpoint(server, clock))
    assert clock.slept == [1, 1, 1]


def test_waiting_doubles_and_a_request_that_always_fails_is_left_behind(server: StandIn, clock: FakeClock) -> None:
    server.faults.extend([DOWN] * 5)
    first, second = run(endpoint(server, clock, retries=4), 2)
    assert first == Reply(None, 0, 0, "HTTP 503: <html>unavailable</html>", tries=5)
    assert second.text == "to question 1"
    assert all(0.5 * 2**i <= slept <= 2**i for i, slept in enumerate(clock.slept))
    assert len(clock.slept) == 4


def test_an_hour_of_429_stops_the_run_with_one_line(server: StandIn, clock: FakeClock) -> None:
    server.always = LIMITED
    with pytest.raises(EndpointError, match=r"none for \d+ s \(HTTP 429: slow down\)") as caught:
        run(endpoint(server, clock, give_up_s=600, retries=2))
    assert "run the same command again" in str(caught.value)
    assert 600 < clock.time < 660


def test_to_be_asked_to_wait_longer_than_that_stops_it_at_once(server: StandIn, clock: FakeClock) -> None:
    server.always = LIMITED._replace(headers={"Retry-After": "3600"})
    with pytest.raises(EndpointError, match="asked to wait 3600 s more"):
        run(endpoint(server, clock))
    assert clock.slept == []


def test_an_endpoint_that_stays_down_stops_the_run_although_requests_are_left_behind(
    server: StandIn, clock: FakeClock
) -> None:
    server.always = DOWN
    with pytest.raises(EndpointError, match="HTTP 503"):
        run(endpoint(server, clock, retries=3), 1000)
    assert 500 < clock.time < 700


def test_answers_that_came_with_the_failure_are_given_on(server: StandIn, clock: FakeClock) -> None:
    together = threading.Barrier(2, timeout=20)
    server.gate = together.wait
    server.answer = lambda body: "good"
    server.faults.append(Fault(401))
    seen = []

    async def collect() -> None:
        async for _, reply in endpoint(server, clock, concurrency=2).answers(asked(2)):
            seen.append(reply.text)

    with pytest.raises(EndpointError):
        asyncio.run(collect())
    assert seen in ([], ["good"])


@pytest.mark.parametrize(("status", "about"), [(401, "the key"), (402, "the account"), (404, "the address")])
def test_what_no_patience_mends_stops_at_once(server: StandIn, clock: FakeClock, status: int, about: str) -> None:
    server.always = Fault(status, b'{"error": "no"}')
    with pytest.raises(EndpointError, match=f"HTTP {status}: no .about {about}"):
        run(endpoint(server, clock))
    assert (len(server.bodies), clock.slept) == (1, [])


def test_a_redirect_is_not_followed(server: StandIn, clock: FakeClock) -> None:
    server.always = Fault(302, headers={"Location": f"{server.url}/elsewhere"})
    with pytest.raises(EndpointError, match="HTTP 302"):
        run(endpoint(server, clock))
    assert len(server.bodies) == 1


def test_a_refused_request_is_not_repeated_and_the_others_go_on(server: StandIn, clock: FakeClock) -> None:
    server.faults.append(Fault(400, b'{"error": {"message": "too long"}}'))
    first, second = run(endpoint(server, clock), 2)
    assert (first.text, first.error, first.is_refused) == (None, "HTTP 400: too long", True)
    assert second.text == "to question 1"


def test_an_endpoint_that_refuses_everything_stops_the_run(server: StandIn, clock: FakeClock) -> None:
    server.always = Fault(400, b'{"error": {"message": "temperature"}}')
    with pytest.raises(EndpointError, match="5 refusals: HTTP 400: temperature"):
        run(endpoint(server, clock), 50)
    assert len(server.bodies) == REFUSALS


def test_nobody_at_the_address_is_found_out_soon(clock: FakeClock) -> None:
    with pytest.raises(EndpointError, match="Check base_url"):
        run(endpoint(None, clock, base_url="http://127.0.0.1:9/v1"))
    assert clock.time < 5


def test_concurrency_is_reached_and_not_exceeded(server: StandIn, clock: FakeClock) -> None:
    full = threading.Event()

    def gate() -> None:
        if server.in_flight >= 4:
            full.set()
        assert full.wait(20)

    server.gate = gate
    assert all(reply.text for reply in run(endpoint(server, clock, concurrency=4), 20))
    assert server.most_in_flight == 4


@pytest.mark.parametrize("limits", [{"requests_per_minute": 30}, {"tokens_per_minute": 30 * (36 + 100)}])
def test_rates_are_kept(server: StandIn, clock: FakeClock, limits: dict[str, float]) -> None:
    chat = endpoint(server, clock, concurrency=4, **limits)
    assert chat.count(asked(1)[0].messages) == 27
    run(chat, 11)
    assert clock.time == pytest.approx(20, rel=0.1)


def test_the_key_is_neither_kept_nor_said(server: StandIn, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "k-123")
    server.answer = lambda body: "your key is k-123"
    server.faults.append(Fault(400, b'{"error": {"message": "Bearer k-123 is odd"}}'))
    refused, answered = run(endpoint(server, clock, key_env="THE_KEY"), 2)
    assert (refused.error, answered.text) == ("HTTP 400: Bearer [key] is odd", "your key is [key]")
    server.always = Fault(401, b"k-123 is wrong")
    with pytest.raises(EndpointError) as caught:
        run(endpoint(server, clock, key_env="THE_KEY"))
    assert "k-123" not in str(caught.value)


def test_a_key_that_is_not_there_is_one_line(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"environment variable THE_KEY.*export THE_KEY="):
        endpoint(None, clock, base_url="http://x/v1", key_env="THE_KEY")


@pytest.mark.parametrize("url", [None, "", "host/v1", "ftp://host/v1", "http://", "http://[x", "https://u:secret@h/v1",
                                 "https://h/v1?key=secret"])  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret_is_refused_without_saying_it(
    clock: FakeClock, url: str | None
) -> None:
    with pytest.raises(ConfigError, match="base_url") as caught:
        endpoint(None, clock, base_url=url)
    assert "secret" not in str(caught.value).replace("nothing secret in it", "")


def test_usage_that_is_no_number_is_estimated() -> None:
    whole = json.loads(completion("x"))
    for wrong in ("many", -1, 1.5, True, 10**12, None):
        whole["usage"] = {"prompt_tokens": wrong, "completion_tokens": 5}
        assert read_response(200, {}, json.dumps(whole).encode()) == Answered("x", None, 5)


def test_an_answer_without_text_is_an_empty_one_and_parts_are_joined() -> None:
    assert read_response(200, {}, completion(None)) == Answered("", 100, 7)
    assert read_response(200, {}, completion(None, refusal="I can't.")) == Answered("I can't.", 100, 7)
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert read_response(200, {}, completion(parts)) == Answered("ab", 100, 7)


def test_lone_surrogates_are_replaced() -> None:
    found = read_response(200, {}, completion("a\ud800b"))
    assert isinstance(found, Answered)
    assert found.text.encode()


def test_retry_after_may_be_a_date() -> None:
    headers = {"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}
    assert read_response(429, headers, b"") == Trouble("limited", "HTTP 429", 30)
    for wrong in ("soon", "nan", "-1", "1e99"):
        assert read_response(429, {"retry-after": wrong}, b"") == Trouble("limited", "HTTP 429", None)


@given(st.integers(200, 599), st.binary(max_size=60) | st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "role", "usage", "error", "type", "text"]), inner, max_size=3
    ),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_nothing_that_comes_is_an_exception(status: int, content: bytes) -> None:
    found = read_response(status, {}, content)
    assert isinstance(found, Answered | Trouble)
    assert isinstance(found, Trouble) or status == 200

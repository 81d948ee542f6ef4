"""The server as its clients see it: the real OpenAI client, curl, and sockets that misbehave."""

import json
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from activations.chat import chat_prompt
from activations.errors import ConfigError, CorruptArtefactError, MismatchError
from activations.generate import generate
from activations.models import LoadedModel
from steer.generate import generate as steered_generate
from steer.library import load_library
from steer.operations import Intervention
from steer.serving.config import ServeConfig
from steer.serving.keys import Keys
from tests.steer.serving.conftest import Server, answering, at_rest

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "The river?"}], "max_tokens": 16}
UP = {"steering": {"steer": [{"vector": "up", "dose": 1.0}]}}
KEY = "a-key-of-some-length"
get, head, post = (partial(how, timeout=60) for how in (httpx.get, httpx.head, httpx.post))


def content(completion: Any) -> str:
    return completion.choices[0].message.content


# --- what is answered ------------------------------------------------------------------------------------------------


def test_an_answer_is_what_the_model_writes_by_itself(server: Server, tiny: LoadedModel, library: Path) -> None:
    client = server.client()
    prompt = chat_prompt(tiny, "The river?")
    plain = generate(tiny, [prompt], max_new_tokens=16, temperature=0.0, add_special_tokens=False)[0]
    found = client.chat.completions.create(**ASK, temperature=0)
    assert content(found) == plain
    up = load_library(library)["up"]
    steered = steered_generate(
        tiny, [prompt], max_new_tokens=16, temperature=0.0, add_special_tokens=False,
        interventions=[Intervention.of(up, 4.0)],
    )[0]  # fmt: skip
    assert steered != plain
    assert content(client.chat.completions.create(**ASK, temperature=0.0, extra_body=UP)) == steered
    text = client.completions.create(model="tiny", prompt=prompt, max_tokens=16, temperature=0)
    assert text.choices[0].text == plain


def test_a_name_that_is_a_preset_steers_clients_that_know_of_nothing(server: Server, library: Path) -> None:
    client = server.client()
    own = client.chat.completions.create(**ASK, temperature=0.0, extra_body={"steering": {"steer": [{"vector": "up"}]}})
    preset = client.chat.completions.create(**{**ASK, "model": "tiny-up"}, temperature=0)
    assert content(preset) == content(own) != content(client.chat.completions.create(**ASK, temperature=0))
    assert preset.model == "tiny-up"
    assert preset.saekit["steering_sha256"] == own.saekit["steering_sha256"]


def test_every_answer_says_what_steered_it(server: Server, library: Path, served: LoadedModel) -> None:
    client, manifest = server.client(), json.loads((library / "manifest.json").read_text())
    asked = {"steering": {"steer": [
        {"vector": "gated", "dose": 1.0}, {"latent": 3, "clamp": 2.5, "scope": "generated"}, {"vector": "both"},
    ], "budget": 2.0}}  # fmt: skip
    found = client.chat.completions.create(**ASK, temperature=0.0, extra_body=asked).saekit
    assert found["fingerprint"] == served.fingerprint
    assert {each["library_sha256"] for each in found["steering"]} == {manifest["content_sha256"]}
    named = [(each["item"], each["name"], each["hook_point"]) for each in found["steering"]]
    assert named == [
        (1, "gated", "resid_post.2"), (2, "latent-3", "resid_post.1"), (3, "up", "resid_post.1"),
        (3, "tone@resid_post.0", "resid_post.0"), (3, "tone@resid_post.3", "resid_post.3"),
    ]  # fmt: skip
    assert found["steering"][0]["dose"] == 1.0
    assert found["steering"][0]["sha256"] == load_library(library)["gated"].sha256
    assert (found["steering"][1]["operation"], found["steering"][1]["value"]) == ("clamp", 2.5)
    assert found["budget"] == 2.0
    (choice,) = found["choices"]
    assert choice["fired"].keys() == {"1 own"}
    unsteered = client.chat.completions.create(**ASK).saekit
    assert (unsteered["steering"], unsteered["choices"]) == ([], [{"fired": {}, "scaled": {}}])


def test_a_stream_is_the_same_answer_in_pieces(server: Server) -> None:
    client = server.client()
    how = {"temperature": 0.9, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2, "extra_body": UP}
    whole = client.chat.completions.create(**ASK, **how)
    texts, tokens, ends, accounts, usage = ["", ""], [[], []], {}, {}, None
    for chunk in client.chat.completions.create(**ASK, **how, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        assert "usage" in chunk.model_fields_set
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            if choice.finish_reason:
                ends[choice.index], accounts[choice.index] = choice.finish_reason, chunk.saekit
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    for index, choice in enumerate(whole.choices):
        assert [each.token for each in tokens[index]] == [each.token for each in choice.logprobs.content]
        assert all(len(each.top_logprobs) == 2 for each in tokens[index])
        assert accounts[index]["steering"] == whole.saekit["steering"]
    assert usage == whole.usage


def test_log_probabilities_add_up_and_name_their_tokens(server: Server) -> None:
    found = server.client().chat.completions.create(**ASK, temperature=0.0, logprobs=True, top_logprobs=20)
    for each in found.choices[0].logprobs.content:
        assert each.logprob == each.top_logprobs[0].logprob
        assert [top.logprob for top in each.top_logprobs] == sorted(
            (t.logprob for t in each.top_logprobs), reverse=True
        )
    said = bytes(byte for each in found.choices[0].logprobs.content for byte in each.bytes)
    assert said.decode(errors="replace") == content(found)
    legacy = server.client().completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=5, logprobs=2, temperature=0
    )
    assert [choice.index for choice in legacy.choices] == [0, 1]
    told = server.client().completions.create(model="tiny", prompt="a", max_tokens=8, logprobs=0, seed=1).choices[0]
    assert [each.keys() for each in told.logprobs.top_logprobs] == [{token} for token in told.logprobs.tokens]
    for choice in legacy.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)
        assert max(choice.logprobs.top_logprobs[0].values()) == choice.logprobs.token_logprobs[0]


def test_an_answer_ends_at_a_stop_string_at_its_length_or_by_itself(server: Server, tiny: LoadedModel) -> None:
    client = server.client()
    whole = content(client.chat.completions.create(**ASK, temperature=0))
    stop = whole[len(whole) // 2 :][:3]
    stopped = client.chat.completions.create(**ASK, temperature=0.0, stop=[stop, "never in it"])
    assert content(stopped) == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 16
    cut = client.chat.completions.create(**{**ASK, "max_tokens": 3}, temperature=0)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    end = {str(tiny.tokenizer.eos_token_id): 100}
    ended = client.chat.completions.create(**ASK, temperature=0.0, logit_bias=end)
    assert (content(ended), ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("", "stop", 1)


def test_a_seed_gives_the_same_answer_again_and_none_another(server: Server) -> None:
    client = server.client()
    first, again = (content(client.chat.completions.create(**ASK, seed=4, temperature=1.5)) for _ in range(2))
    others = {content(client.chat.completions.create(**ASK, temperature=1.5)) for _ in range(4)}
    assert first == again
    assert len(others) > 1


def test_what_there_is_to_steer_with_is_told(server: Server, library: Path) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-up"]
    assert client.models.retrieve("tiny-up").steering == [{"vector": "up"}]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    (told,) = get(f"{server.address}/v1/steering").json()["libraries"]
    assert (told["library"], told["version"], told["signature"]) == ("rivers", "1.0.0", "unsigned")
    assert {each["name"] for each in told["vectors"]} == {"up", "gated", "tone"}
    assert told["kits"] == [{"name": "both", "summary": "", "vectors": {"up": 0.5, "tone": -1.0}}]
    assert told["sae"]["d_sae"] == 8


def test_curl_speaks_to_it(server: Server) -> None:
    url = f"{server.address}/v1/chat/completions"
    command = ["curl", "-sSN", url, "-H", "content-type: application/json", "-d", json.dumps({**ASK, "stream": True})]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"
    assert not any("usage" in json.loads(event) for event in events[:-1])
    health = subprocess.run(["curl", "-sS", f"{server.address}/health"], capture_output=True, text=True, check=True)
    assert json.loads(health.stdout)["status"] == "ok"


def test_what_clients_send_along_and_changes_nothing_is_left(server: Server) -> None:
    client = server.client()
    plain = client.chat.completions.create(**ASK, temperature=0)
    idle: dict[str, Any] = {
        "user": "ada", "metadata": {"chat": "1"}, "store": False, "service_tier": "auto", "safety_identifier": "a",
        "prompt_cache_key": "b", "prompt_cache_retention": "24h", "parallel_tool_calls": True, "tools": [],
        "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"],
    }  # fmt: skip
    nulls = dict.fromkeys(["audio", "functions", "prediction", "n", "stop", "logit_bias", "seed", "steering"])
    told = client.chat.completions.create(**ASK, temperature=0, extra_body={**idle, **nulls})
    assert content(told) == content(plain)
    # An answer that is sent back as the client's own object dumps it has keys that say nothing.
    turns = [*ASK["messages"], plain.choices[0].message.model_dump(), {"role": "user", "content": "Why?"}]
    assert {"tool_calls", "function_call", "audio", "annotations"} <= turns[1].keys()
    client.chat.completions.create(**{**ASK, "messages": turns})
    kept = {"cache_control": {"type": "ephemeral"}}  # as LiteLLM hands it on
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "The river?", **kept}], **kept}]
    assert content(client.chat.completions.create(**{**ASK, "messages": parts}, temperature=0)) == content(plain)
    greedy = client.chat.completions.create(**ASK, top_p=0, seed=1)
    assert content(greedy) == content(plain)
    drawn = content(client.chat.completions.create(**ASK, temperature=1.5, seed=1))
    for off in (0, -1):
        assert (
            content(client.chat.completions.create(**ASK, temperature=1.5, seed=1, extra_body={"top_k": off})) == drawn
        )
    likeliest = client.chat.completions.create(**ASK, temperature=1.5, seed=1, extra_body={"top_k": 1})
    assert content(likeliest) == content(plain) != drawn
    untold = client.chat.completions.create(**ASK, top_p=0, logprobs=False, top_logprobs=0)
    assert (content(untold), untold.choices[0].logprobs) == (content(plain), None)


def test_a_head_of_health_is_what_probes_ask_for(server: Server) -> None:
    assert head(f"{server.address}/health").status_code == 200


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "says"), [
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": -0.1}, "top_p"),
    ({"n": 0}, "n:"), ({"n": 9}, "at most 8 answers"), ({"max_tokens": 65}, "at most 64"), ({"stop": ""}, "stop"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "'text', got"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "loud": 1}]}]}, "loud: expected only"),
    ({"logit_bias": {"999": 1}}, "below 300"), ({"logit_bias": {"x": 1}}, "below 300"),
    ({"logit_bias": {"0" * 9 + "299999": 1}}, "below 300"), ({"logit_bias": {"0" * 5000: 1}}, "below 300"),
    ({"wishes": 1}, "wishes"), ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_logprobs": 3}, "logprobs true"),
    ({"messages": [{"role": "user", "content": "river " * 600}]}, "at most 512"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "y"}]}]}, "tool_calls"),
    ({"top_k": -2}, "top_k"), ({"top_k": 2**70}, "top_k"),
    ({"seed": 2**70}, "seed"), ({"messages": [{"role": "user", "content": "\ud800"}]}, "unicode string"),
])  # fmt: skip
def test_a_request_that_cannot_be_done_is_refused_with_the_reason(
    server: Server, change: dict[str, Any], says: str
) -> None:
    body = json.dumps({**ASK, **change}).encode()
    found = post(f"{server.address}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400
    error = found.json()["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["detail"].keys() >= {"where", "expected", "got", "fix"}


@pytest.mark.parametrize("prompt", [[[-1]], [[0], [5, 10**12]], [300], "", [[]], []])
def test_a_prompt_of_tokens_that_are_not_there_is_refused_and_the_engine_goes_on(server: Server, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt"):
        server.client().completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert get(f"{server.address}/health").status_code == 200


@pytest.mark.parametrize(("steering", "says"), [
    ({"steer": [{"vector": "nope"}]}, "item 1: expected one of"), ({"steer": [{}]}, "a vector or a latent"),
    ({"steer": [{"vector": "up", "latent": 1}]}, "a vector or a latent"),
    ({"steer": [{"vector": "up", "dose": 3.0}]}, "a dose of at most 2"),
    ({"steer": [{"vector": "up", "scope": "sometimes"}]}, "sometimes"),
    ({"steer": [{"vector": "up", "scope": "thinking"}]}, "thinking markers"),
    ({"steer": [{"vector": "up", "operation": "explode"}]}, "operation"),
    ({"steer": [{"vector": "up", "clamp": 1.0}]}, "of a latent"),
    ({"steer": [{"latent": 3}]}, "a dose, clamp or scale"),
    ({"steer": [{"latent": 3, "clamp": 1.0, "scale": 2.0}]}, "clamp or scale"),
    ({"steer": [{"latent": 8, "scale": 0}]}, "0 to 7"), ({"steer": [{"latent": "seas/3", "scale": 0}]}, "rivers/N"),
    ({"steer": [{"latent": "x", "scale": 0}]}, "index of a latent"), ({"steer": [{"latent": -1, "scale": 0}]}, "index"),
    ({"steer": [{"vector": "up", "gate": {"on": 0.1, "off": 0.2}}]}, "off <= on"),
    ({"steer": [{"vector": "../../etc/passwd"}]}, "expected one of"), ({"steer": [{"vector": "up"}] * 9}, "steer"),
    ({"steer": [], "budget": 0}, "budget"), ({"steer": [{"vector": "up"}], "force": True}, "force"),
    ({"steer": [{"latent": 3, "clamp": 1e5}]}, "a dose of at most 2"),
])  # fmt: skip
def test_steering_that_cannot_be_done_is_refused_and_never_left_out(
    server: Server, steering: dict[str, Any], says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(**ASK, extra_body={"steering": steering})
    assert says in caught.value.body["message"]


@pytest.mark.parametrize(("change", "code", "param"), [
    ({"messages": [{"role": "user", "content": "river " * 600}]}, "context_length_exceeded", "prompt"),
    ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
    ({"verbosity": "low"}, "unsupported_parameter", "verbosity"),
    ({"temperature": -1}, None, "temperature"),
])  # fmt: skip
@pytest.mark.parametrize("streams", [True, False])
def test_a_refusal_has_the_code_by_which_clients_know_what_to_do(
    server: Server, change: dict[str, Any], code: str | None, param: str, streams: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(**{**ASK, "stream": streams, "extra_body": change})
    assert (caught.value.type, caught.value.code, caught.value.param) == ("invalid_request_error", code, param)


def test_a_model_that_is_not_there_is_404(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny-up") as caught:
        server.client().chat.completions.create(**{**ASK, "model": "gpt"})
    assert caught.value.code == "model_not_found"


def test_a_number_too_long_to_be_written_is_refused(server: Server) -> None:
    body = json.dumps({"model": "tiny", "prompt": ["a", "b"]}).removesuffix("}") + f', "n": {"9" * 4300}}}'
    found = post(f"{server.address}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "n")


def test_a_body_that_is_not_said_to_be_json_is_refused_with_how_to_say_it(server: Server) -> None:
    command = ["curl", "-sS", f"{server.address}/v1/chat/completions", "-d", json.dumps(ASK)]
    error = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["error"]
    assert error["detail"] == {
        "where": "content-type", "expected": "application/json", "got": "application/x-www-form-urlencoded",
        "fix": "Send the header content-type: application/json.",
    }  # fmt: skip


def test_hostile_requests_are_refused_and_the_server_goes_on(server: Server) -> None:
    url = f"{server.address}/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    deep = b'{"model":' + b"[" * 100_000
    for sent, headers, status in [
        (b"{", json_type, 400), (deep, json_type, 400), (b"[]", json_type, 400), (b"\xff\xfe", json_type, 400),
        (b"x" * ((1 << 20) + 1), json_type, 413), (json.dumps(ASK).encode(), {"content-type": "text/plain"}, 400),
        (json.dumps(ASK).encode(), json_type | {"host": "evil.example"}, 421),
    ]:  # fmt: skip
        assert post(url, content=sent, headers=headers).status_code == status
    assert get(url).status_code == 405
    assert get(f"{server.address}/../../etc/passwd").status_code == 404
    assert content(server.client().chat.completions.create(**ASK)) is not None


# --- limits, keys, endings -------------------------------------------------------------------------------------------


def slow(config: ServeConfig, **changes: Any) -> ServeConfig:
    """Answers that take a while: long ones, that no token ends."""
    return config.model_copy(update={"max_tokens": 400, **changes})


LONG = {**ASK, "max_tokens": 400, "logit_bias": {"0": -100}}


def eventually(what: Any, timeout_s: float = 60) -> None:
    """Wait until it holds."""
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def n_answers(server: Server) -> int:
    return get(f"{server.address}/health").json()["answers"]


def test_more_than_there_is_room_for_is_refused_at_once(served: LoadedModel, config: ServeConfig) -> None:
    with answering(served, slow(config, max_running=2, max_waiting=1), Keys(None)) as server:
        client = server.client()
        with at_rest(served):
            streams = [client.chat.completions.create(**LONG, stream=True) for _ in range(3)]
            with pytest.raises(openai.RateLimitError, match="at most 3 answers") as caught:
                client.chat.completions.create(**ASK)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.BadRequestError, match="at most 3 answers at once, got 4 in one request"):
            client.chat.completions.create(**ASK, n=4)
        for stream in streams:
            stream.close()
        eventually(lambda: n_answers(server) == 0)
        with pytest.raises(openai.BadRequestError, match="at most 3 answers at once"):
            client.completions.create(model="tiny", prompt=["a", "b"], n=2)
        assert content(client.chat.completions.create(**ASK)) is not None


@pytest.mark.parametrize("streams", [True, False])
def test_whoever_is_gone_is_written_for_no_longer(served: LoadedModel, config: ServeConfig, streams: bool) -> None:
    with answering(served, slow(config), Keys(None)) as server:
        host, port = server.address.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "stream": streams}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        with at_rest(served):
            with socket.create_connection((host, int(port))) as client:
                client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                if streams:
                    assert client.recv(1000).startswith(b"HTTP/1.1 200")
                eventually(lambda: n_answers(server) == 1)
            eventually(lambda: n_answers(server) == 0)
        eventually(lambda: any(line["why"] == "gone" for line in server.lines()))
        (line,) = [line for line in server.lines() if line["why"] == "gone"]
        assert line["status"] == 499
        assert line["n_written"] < 400


def test_whoever_does_not_read_is_left_when_the_time_is_over(
    served: LoadedModel, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.serving.routes.LATE_S", 0.1)
    with answering(served, slow(config, timeout_s=4.0), Keys(None)) as server:
        host, port = server.address.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "n": 8, "logprobs": True, "top_logprobs": 20, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            eventually(lambda: n_answers(server) == 8)
            eventually(lambda: n_answers(server) == 0)


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_that_takes_too_long_is_given_up(served: LoadedModel, config: ServeConfig, streams: bool) -> None:
    with answering(served, slow(config, timeout_s=0.2), Keys(None)) as server:
        with pytest.raises((openai.InternalServerError, openai.APIError), match="an answer in time"):
            for _ in server.client().chat.completions.create(**LONG, stream=streams):
                pass
        eventually(lambda: n_answers(server) == 0)
        assert [line["why"] for line in server.lines()] == ["timeout"]
        assert 'saekit_cancelled_requests_total{why="timeout"} 1.0' in get(f"{server.address}/metrics").text


def test_a_key_is_needed_where_there_are_keys(served: LoadedModel, config: ServeConfig, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nada {KEY}\nbob another-key-of-length\n")
    file.chmod(0o600)
    with answering(served, slow(config, max_running_per_key=1), Keys.read(file)) as server:
        for route in ("v1/models", "v1/steering", "metrics"):
            assert get(f"{server.address}/{route}").status_code == 401
        assert get(f"{server.address}/openapi.json").status_code == 404
        assert get(f"{server.address}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client("wrong" * 5).chat.completions.create(**ASK)
        assert caught.value.code == "invalid_api_key"
        ada, bob = server.client(KEY), server.client("another-key-of-length")
        with ThreadPoolExecutor(1) as pool, at_rest(served):
            stream = ada.chat.completions.create(**LONG, stream=True)
            with pytest.raises(openai.RateLimitError, match="of one key"):
                ada.chat.completions.create(**ASK)
            with pytest.raises(openai.BadRequestError, match="at most 1 answers of one key, got 2 in one request"):
                ada.chat.completions.create(**ASK, n=2)
            other = pool.submit(bob.chat.completions.create, **ASK)
            eventually(lambda: n_answers(server) == 2)
            stream.close()
            eventually(lambda: n_answers(server) == 1)
        assert content(other.result()) is not None
        eventually(lambda: "ada" in {line["key"] for line in server.lines() if line["why"] == "gone"})
        assert KEY not in server.log.getvalue()
        for _ in range(25):
            status = get(f"{server.address}/v1/models", headers={"authorization": "Bearer x"}).status_code
        assert status == 429


@pytest.mark.parametrize(("text", "mode", "says"), [
    ("ada short\n", 0o600, "keys:1"), ("", 0o600, "a key or more"), (f"ada {KEY}\n", 0o644, "only its owner"),
    (f"ada {KEY}\nbob {KEY}\n", 0o600, "keys:2"), (f"ada {KEY}\nada {KEY}x\n", 0o600, "keys:2"),
])  # fmt: skip
def test_a_file_of_keys_that_is_wrong_is_refused(tmp_path: Path, text: str, mode: int, says: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=says) as caught:
        Keys.read(file)
    assert KEY not in str(caught.value)


def test_a_body_that_does_not_come_is_not_waited_for(
    served: LoadedModel, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.serving.app.BODY_S", 0.2)
    with answering(served, config, Keys(None)) as server:
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            client.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
            assert b"408" in client.recv(1000).split(b"\r\n")[0]


def test_numbers_and_lines_tell_what_was_done_and_nothing_that_was_said(
    served: LoadedModel, config: ServeConfig
) -> None:
    with answering(served, config, Keys(None)) as server:
        client = server.client()
        first = client.chat.completions.create(**ASK, extra_body=UP)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**ASK, "model": "gpt"})
        get(f"{server.address}/nowhere")
        numbers = get(f"{server.address}/metrics").text
        for line in [
            'saekit_requests_total{route="/v1/chat/completions",status="200"} 1.0',
            'saekit_requests_total{route="/v1/chat/completions",status="404"} 1.0',
            f'saekit_tokens_total{{kind="prompt"}} {first.usage.prompt_tokens:.1f}',
            f'saekit_tokens_total{{kind="written"}} {first.usage.completion_tokens:.1f}',
            "saekit_steered_requests_total 1.0", "saekit_answers 0.0",
        ]:  # fmt: skip
            assert line in numbers
        one, two, three = server.lines()
        assert (one["status"], one["model"], one["steering"]) == (200, "tiny", first.saekit["steering_sha256"])
        assert first.id == f"chatcmpl-{one['id']}"
        assert (two["status"], two["why"]) == (404, None)
        assert three["status"] == 404
        assert "river" not in server.log.getvalue()


def test_a_server_that_cannot_start_says_why(
    served: LoadedModel, library: Path, config: ServeConfig, tmp_path: Path
) -> None:
    def start(**changes: Any) -> None:
        with answering(served, ServeConfig.parse(config.model_dump() | changes, where="test"), Keys(None)):
            pass

    with pytest.raises(ConfigError, match="Rename it"):
        start(presets={"tiny": {"steer": []}})
    with pytest.raises(ConfigError, match="dose of at most 2"):
        start(presets={"much": {"steer": [{"vector": "up", "dose": 9.0}]}})
    with pytest.raises(ConfigError, match="one of this name"):
        start(libraries=(str(library), str(library)))
    with pytest.raises(ConfigError, match="stear"):
        start(presets={"x": {"stear": []}})
    with pytest.raises(MismatchError, match="other weights"):
        start(libraries=("smollm2-135m",))
    damaged = tmp_path / "library"
    damaged.mkdir()
    (damaged / "manifest.json").write_text((library / "manifest.json").read_text())
    (damaged / "vectors.safetensors").write_bytes(b"x" * (library / "vectors.safetensors").stat().st_size)
    with pytest.raises(CorruptArtefactError):
        start(libraries=(str(damaged),))


def test_requests_at_once_do_not_touch_each_other(server: Server) -> None:
    """Each answer beside many others is that of the same request alone."""
    steering = [
        None, UP["steering"], {"steer": [{"vector": "gated", "dose": 1.5}]}, {"steer": [{"vector": "both"}]},
        {"steer": [{"latent": 2, "clamp": 3.0}]}, {"steer": [{"vector": "up", "scope": "generated"}]},
    ]  # fmt: skip
    bodies = [
        {**ASK, "messages": [{"role": "user", "content": f"{'The river ' * (i % 5 + 1)}{i}"}], "temperature": 0,
         "extra_body": {} if (asked := steering[i % len(steering)]) is None else {"steering": asked}}
        for i in range(24)
    ]  # fmt: skip
    client = server.client()

    def ask(body: dict[str, Any]) -> tuple[str, Any]:
        for _ in range(200):
            try:
                found = client.chat.completions.create(**body)
                return content(found), found.saekit
            except openai.RateLimitError:
                time.sleep(0.05)
        raise AssertionError("never let in")

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(ask, bodies)) == alone
    assert len({text for text, _ in alone}) > 12

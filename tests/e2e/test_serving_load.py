"""`saekit serve` as a process, with the real small model: 64 clients at once, each steered otherwise, and some hostile.

Every answer has to be the one that the same request gets when nothing else is there.
"""

import json
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI

N_CLIENTS = 64
COMMAND = [sys.executable, "-c", "from steer.cli import main; main()", "serve"]
STEERING: list[Any] = [
    None,
    {"steer": [{"vector": "formal_vs_casual"}]},
    {"steer": [{"vector": "formal_vs_casual", "dose": -0.3, "scope": "generated"}]},
    {"steer": [{"vector": "legal-brief"}], "budget": 0.4},
    {"steer": [{"latent": 1182, "clamp": 40.0}]},
    {"steer": [{"vector": "coffee-3036", "gate": {"on": 0.05, "tokens": 3}}, {"vector": "joyful_vs_gloomy"}]},
    {"steer": [{"latent": 3036, "scale": 0.0}, {"vector": "formal_vs_casual", "operation": "ablate"}]},
]
PROMPTS = ["Tell me about your weekend.", "What is a car?", "Why?"]


def start(*settings: str) -> tuple[subprocess.Popen[str], str]:
    """A server, and its address."""
    command = [*COMMAND, "--json", "--set", "port=0", *(word for each in settings for word in ("--set", each))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # which says one line, and no more
    assert process.stdout is not None
    with process.stdout:
        return process, json.loads(process.stdout.readline())["address"]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process, address = start(
        "libraries=smollm2-135m", "dtype=float32", "name=smollm2", "device=cpu", f"max_running={N_CLIENTS}",
        "presets={formal: {steer: [{vector: formal_vs_casual}]}}",
    )  # fmt: skip
    yield process, address
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (0, -signal.SIGTERM)


@pytest.fixture
def address(server: tuple[subprocess.Popen[str], str]) -> str:
    return server[1]


def requests() -> list[dict[str, Any]]:
    """Every prompt under every steering, and under a preset."""
    found = []
    for prompt in PROMPTS:
        base = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 10, "temperature": 0}
        for steering in STEERING:
            found.append({**base, "model": "smollm2", **({} if steering is None else {"steering": steering})})
        found.append({**base, "model": "formal"})
    return found


def ask(client: OpenAI, body: dict[str, Any]) -> tuple[str, Any]:
    """The text of an answer, and what it says that it was steered with."""
    given = {key: value for key, value in body.items() if key != "steering"}
    extra = {"steering": body["steering"]} if "steering" in body else None
    found = client.chat.completions.create(**given, extra_body=extra)
    return found.choices[0].message.content or "", found.saekit  # type: ignore[attr-defined]


def streamed(client: OpenAI, body: dict[str, Any]) -> tuple[str, Any]:
    """The same as a stream."""
    given = {key: value for key, value in body.items() if key != "steering"}
    text, account = "", None
    for chunk in client.chat.completions.create(
        **given, stream=True, extra_body={"steering": body["steering"]} if "steering" in body else None
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            account = chunk.saekit if choice.finish_reason else account  # type: ignore[attr-defined]
    return text, account


def misbehave(address: str, stop: threading.Event, seed: int) -> int:
    """Ask for what cannot be, and leave in the middle, until told to stop; how often."""
    rng, done = random.Random(seed), 0
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    url, n = f"{address}/chat/completions", {"json": {"content-type": "application/json"}}
    while not stop.is_set():
        kind, done = rng.randrange(5), done + 1
        if kind == 0:  # a client that is killed while it is written for
            body = json.dumps({**requests()[rng.randrange(8)], "stream": True, "max_tokens": 200}).encode()
            with socket.create_connection((host, int(port))) as client:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
                client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                client.recv(300)
        elif kind == 1:
            assert httpx.post(url, content=b"x" * (2 << 20), headers=n["json"]).status_code == 413
        elif kind == 2:
            assert httpx.post(url, content=b'{"model": [', headers=n["json"]).status_code == 400
        elif kind == 3:
            unknown = {**requests()[0], "steering": {"steer": [{"vector": f"no-{done}"}]}}
            assert httpx.post(url, json=unknown, timeout=60).status_code in (400, 429)
        else:
            much = {**requests()[0], "steering": {"steer": [{"vector": "formal_vs_casual", "dose": 8.0}]}}
            assert httpx.post(url, json=much, timeout=60).status_code in (400, 429)
        stop.wait(0.05)
    return done


def test_answers_of_64_clients_are_those_of_each_alone_whatever_others_do(address: str) -> None:
    bodies = requests()
    with OpenAI(base_url=address, api_key="none", max_retries=30, timeout=300) as client:
        alone = [ask(client, body) for body in bodies]
        assert len({text for text, _ in alone}) > len(bodies) // 2
        mixed = [(i, body) for i in range(2) for body in bodies] + [(0, body) for body in bodies[:16]]
        random.Random(0).shuffle(mixed)
        stop = threading.Event()
        with ThreadPoolExecutor(N_CLIENTS + 3) as pool:
            hostile = [pool.submit(misbehave, address, stop, seed) for seed in range(3)]
            found = [pool.submit(streamed if i else ask, client, body) for i, body in mixed]
            answers = [future.result() for future in found]
            stop.set()
            n_hostile = [future.result() for future in hostile]
    assert min(n_hostile) > 0
    for (_, body), answer in zip(mixed, answers, strict=True):
        text, account = alone[bodies.index(body)]
        assert answer[0] == text, body
        assert answer[1]["steering"] == account["steering"]
        assert answer[1]["choices"] == account["choices"]
    health = httpx.get(address.replace("/v1", "/health")).json()
    assert health["status"] == "ok"


def test_a_server_that_is_told_to_stop_lets_an_answer_end(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server  # the last that is asked of it
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 20, "stream": True}
    with OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(**body, logit_bias={"2": -100})  # type: ignore[call-overload]
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        ends = [choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason]
        assert ends == ["length"]
        assert process.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


@pytest.mark.parametrize(("settings", "says"), [
    (["host=0.0.0.0"], "expected a loopback address without keys"), (["libraries=nowhere"], "expected a library"),
    (["keys=nowhere"], "expected a file of API keys"), (["modle=x"], "unknown key 'modle'"),
    (["presets={a: {steer: [{vectr: x}]}}"], "unknown key 'presets.a.steer.0.vectr'"),
])  # fmt: skip
def test_a_server_that_cannot_start_says_why_in_one_line(settings: list[str], says: str, tmp_path: Path) -> None:
    command = [*COMMAND, "--set", "port=0", *(word for each in settings for word in ("--set", each))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert found.returncode == 1
    assert found.stderr.startswith("saekit: ")
    assert says in found.stderr
    assert found.stderr.count("\n") == 1

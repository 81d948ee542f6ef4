"""`saekit serve` on vLLM answers as it does on transformers: two real servers, the same requests over HTTP.

Both run as their users run them: vLLM with a model that it compiles, in processes of its own. Logprobs of the two
differ by rounding; TOLERANCE is a few times that.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
import yaml

from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from steer.config import AddConfig, InitConfig
from steer.gates import Gate, energy
from steer.library import save_library
from steer.library_edit import add, init
from steer.scopes import ROLES
from steer.vectors import SteeringVector
from tests.peers.test_vllm import IMPORTS, PACKAGES

TOLERANCE = 1e-4
ROOT = Path(__file__).resolve().parents[2]
RIVER, MILL = "The river ran past the mill and", "def add(a, b):\n    return"
TURNS = "<|im_start|>user\nThe mill?<|im_end|>\n<|im_start|>assistant\n"
END, BATCH_TOKENS = "<|im_end|>", 128
GATE = {"on": 0.1, "off": 0.05, "tokens": 2}
SERVE = "from steer.cli import main; main()"
REFUSED = """
import sys
from activations.errors import ConfigError
from steer.serving.config import ServeConfig
from steer.serving.serve import serve

for setting in sys.argv[2:]:
    try:
        serve(ServeConfig.load(sys.argv[1], ["backend=vllm", setting]))
    except ConfigError as error:
        print(error)
"""
Body = dict[str, Any]


def steered(*items: Body, **more: Any) -> Body:
    return {"steering": {"steer": [*items], **more}}


CASES: dict[str, Body] = {
    "unsteered": {},
    "other prompt": {"prompt": MILL},
    "tokens": {"prompt": [[5, 6, 7, 8], [9, 10, 11]]},
    "added": steered({"vector": "plus", "dose": 1.0}),
    "away": steered({"vector": "rivers/plus", "dose": -0.7}),
    "ablated": steered({"vector": "out"}),
    "turned": steered({"vector": "turned"}),
    "gated": steered({"vector": "plus", "dose": 1.0, "gate": GATE}),
    "own gate": steered({"vector": "gated"}),
    "clamped": steered({"latent": 3, "clamp": 6.0}),
    "scaled": steered({"latent": "rivers/5", "scale": 0.0}),
    "group": steered({"vector": "tone"}),
    "kit": steered({"vector": "both"}),
    "generated": steered({"vector": "plus", "dose": 1.0, "scope": "generated"}),
    "window": steered({"vector": "plus", "dose": 1.0, "scope": "after:4 before:20"}),
    "budget": steered({"vector": "plus", "dose": 1.0}, {"vector": "tone"}, {"vector": "gated"}, budget=0.4),
    "several": steered({"vector": "plus"}, {"vector": "out"}, {"latent": 2, "clamp": 3.0, "gate": GATE}),
    "preset": {"model": "small-up"},
    "preset and more": {"model": "small-up", **steered({"vector": "out"}, {"vector": "gated"})},
    "n": {"n": 2, **steered({"vector": "gated", "dose": 1.5})},
    "penalties": {"frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {"70": 5, "71": -100}},
    "ended": {"logit_bias": {"0": 100}, **steered({"vector": "gated"})},
    "role": {"prompt": TURNS, **steered({"vector": "plus", "dose": 1.0, "scope": "assistant"})},
    "role that ends": {
        "prompt": TURNS,
        "logit_bias": {"2": 4},
        **steered({"vector": "plus", "dose": 1.0, "scope": "final"}),
    },
    "gated role": {"prompt": TURNS, **steered({"vector": "plus", "dose": 1.0, "scope": "user", "gate": GATE})},
    "without logprobs": {"logprobs": None, **steered({"vector": "plus"})},
}
WRONG: dict[str, tuple[Body, int, str]] = {
    "model": ({"model": "gpt"}, 404, "one of small, small-up"),
    "dose": (steered({"vector": "plus", "dose": 9}), 400, "a dose of at most 2"),
    "vector": (steered({"vector": "nope"}), 400, "expected one of"),
    "latent": (steered({"latent": 99, "scale": 0}), 400, "0 to 15"),
    "long": ({"prompt": "river " * 1500}, 400, "at most 2048"),
    "tokens": ({"max_tokens": 1501}, 400, "at most 1500"),
    "temperature": ({"temperature": 3}, 400, "temperature"),
    "markers": (steered({"vector": "plus", "scope": "thinking"}), 400, "thinking markers in the model's chat template"),
    "bias": ({"logit_bias": {"300": 1}}, 400, "below 300"),
    "tools": ({"suffix": "x"}, 400, "suffix"),
}
LONG = {"max_tokens": 1500, "logit_bias": {"0": -100}}
ONLY_OF_VLLM = {
    "roles": (
        steered({"vector": "gated"}, *({"vector": "plus", "dose": 0.1, "scope": role} for role in ROLES)),
        "at most 4 gates, roles, phases and tool calls",
    ),
    "age": (steered({"vector": "plus", "gate": {"on": 0.1, "tokens": 99}}), "at most 16 tokens"),
    "slots": (steered(*({"vector": "out", "scope": f"after:{i}"} for i in range(1, 6))), "SAEKIT_VLLM_SLOTS"),
    "items": ({"model": "small-up", **steered(*[{"vector": "plus", "dose": 0.1}] * 8)}, "at most 8 items"),
}


@dataclass
class Served:
    """A server that answers."""

    process: subprocess.Popen[str]
    address: str
    log: Path
    client: httpx.Client

    def get(self, route: str) -> httpx.Response:
        return self.client.get(f"{self.address.removesuffix('/v1')}{route}")

    def post(self, body: Body, route: str = "completions") -> httpx.Response:
        return self.client.post(f"{self.address}/{route}", json=body)

    def ask(self, change: Body) -> Body:
        """The answer to the usual request with some changes."""
        found = self.post(usual(change))
        assert found.status_code == 200, found.text
        return found.json()

    def lines(self) -> list[Body]:
        """What it logged of requests."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith('{"time"')]


def usual(change: Body) -> Body:
    return {"model": "small", "prompt": RIVER, "max_tokens": 24, "temperature": 0, "logprobs": 3, **change}


@contextmanager
def running(python: str | Path, folder: Path, backend: str, *more: str) -> Iterator[Any]:
    """Start a server; call what is yielded to wait until it answers."""
    log = folder / f"{backend}.log"
    words = ["serve", str(folder / "serve.yaml"), "--json", "--set", f"backend={backend}", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [str(python), "-c", SERVE, *words], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def answering() -> Served:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()[-3000:]
        return Served(process, json.loads(line)["address"], log, client)

    try:
        with httpx.Client(timeout=120) as client, process:
            yield answering
            process.terminate()
            process.wait(120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def library(small: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Named rivers: vectors of all operations, one with a gate of its own, a group, a kit, and an SAE."""
    path = tmp_path_factory.mktemp("serving") / "library"

    def made(name: str, layer: int, norm: float = 16.0, **changes: Any) -> SteeringVector:
        drawn = np.random.default_rng(layer + len(name)).standard_normal(small.d_model).astype(np.float32)
        direction, point = drawn / np.linalg.norm(drawn), f"resid_post.{layer}"
        fields = {"coefficient": 8.0, **changes}
        return SteeringVector(name, direction, point, small.ref, norm, {"kind": "random"}, **fields)

    gated = made("gated", 1, coefficient=24.0)
    gate = Gate(energy(torch.from_numpy(gated.direction), gated.hook_point), 0.06, 0.03, 2, "own", small.fingerprint)
    vectors = [
        made("plus", 0), made("out", 1, operation="ablate", coefficient=1.0),
        made("turned", 1, operation="rotate", coefficient=24.0),
        replace(gated, gate=gate), *(made(f"tone@resid_post.{layer}", layer) for layer in (0, 2)),
    ]  # fmt: skip
    save_library(path, vectors)
    init(InitConfig(library=path, name="rivers", version="1.0.0"))
    rng, d = np.random.default_rng(7), small.d_model
    enc, dec = (rng.standard_normal(shape).astype(np.float32) / 4 for shape in ((d, 16), (16, d)))
    metadata = {"hook_point": "resid_post.1", "model": small.ref.model_dump(), "metrics": {"fvu": 0.2}}
    zeros = [np.zeros(n, np.float32) for n in (16, d)]
    SaeArtefact("standard", enc, zeros[0], dec, zeros[1], metadata=metadata).save(path.parent / "sae")
    add(AddConfig(library=path, sae=path.parent / "sae", embed=True))
    add(AddConfig(library=path, kit="both", of={"plus": 0.5, "tone": -1.0}))
    return path


@pytest.fixture(scope="module")
def folder(small: LoadedModel, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the config of both servers."""
    config = {
        "model": small.spec, "name": "small", "libraries": [str(library)], "port": 0, "dtype": "float32",
        "max_tokens": 1500, "max_running": 32, "max_choices": 8, "cache_tokens": 16384, "batch_tokens": BATCH_TOKENS,
        "presets": {"small-up": {"steer": [{"vector": "plus", "dose": 0.6}], "budget": 1.5}},
    }  # fmt: skip
    found = tmp_path_factory.mktemp("servers")
    (found / "serve.yaml").write_text(yaml.safe_dump(config))
    return found


@pytest.fixture(scope="module")
def servers(make_peer: Any, folder: Path) -> Iterator[list[Served]]:
    """On vLLM, and on transformers."""
    python = make_peer("vllm", PACKAGES, IMPORTS).python()
    with ExitStack() as stack:
        started = [
            stack.enter_context(running(python, folder, "vllm")),
            stack.enter_context(running(sys.executable, folder, "transformers")),
        ]
        yield [answering() for answering in started]


@pytest.fixture(scope="module")
def ours(servers: list[Served]) -> Served:
    return servers[0]


@pytest.fixture(scope="module")
def reference(servers: list[Served]) -> Served:
    return servers[1]


def check_same(one: Any, other: Any, where: str = "") -> None:
    """Equal, floats to TOLERANCE; what says when and which request it was left out."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"id", "created", "system_fingerprint"}:
            check_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (each, same) in enumerate(zip(one, other, strict=True)):
            check_same(each, same, f"{where}[{i}]")
    else:
        assert one == (pytest.approx(other, abs=TOLERANCE) if isinstance(one, float) else other), where


# --- what does not start ---------------------------------------------------------------------------------------------


def test_settings_that_vllm_does_not_have_are_refused_in_one_line(make_peer: Any, folder: Path) -> None:
    says = {
        "vllm.wishes=1": "vllm.wishes: expected an argument of vLLM's engine",
        "vllm.max_model_len=8": "that saekit leaves free",
        "device=cuda": "auto, or cpu",
    }
    words = [str(make_peer("vllm", PACKAGES, IMPORTS).python()), "-c", REFUSED, str(folder / "serve.yaml"), *says]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          check=True)  # fmt: skip
    for line, expected in zip(done.stdout.splitlines(), says.values(), strict=True):
        assert expected in line


# --- what is answered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_the_one_of_the_transformers_engine(ours: Served, reference: Served, name: str) -> None:
    check_same(ours.ask(CASES[name]), reference.ask(CASES[name]))


def test_all_that_steers_changed_something(ours: Served) -> None:
    untouched = ours.ask({})["choices"][0]["text"]
    alike = {name for name, change in CASES.items() if ours.ask(change)["choices"][0]["text"] == untouched}
    assert alike == {"unsteered"}
    assert END in ours.ask(CASES["role that ends"])["choices"][0]["logprobs"]["tokens"]
    for name in ("own gate", "n", "several", "preset and more"):
        (fired,) = ours.ask(CASES[name])["saekit"]["choices"][0]["fired"].values()
        assert 2 < len(fired) < len(RIVER) + 24, name


def test_a_conversation_is_answered_alike(ours: Served, reference: Served) -> None:
    turns = [{"role": "system", "content": "Be a river."}, {"role": "user", "content": "The mill?"}]
    body = {"model": "small-up", "messages": turns, "max_tokens": 20, "temperature": 0, "logprobs": True,
            "top_logprobs": 5, **steered({"vector": "gated"})}  # fmt: skip
    check_same(*(each.post(body, "chat/completions").json() for each in (ours, reference)))


def test_an_answer_ends_at_a_stop_string_and_its_account_with_it(ours: Served, reference: Served) -> None:
    steer = steered({"vector": "plus", "dose": 0.6, "gate": GATE})
    text = ours.ask(steer)["choices"][0]["text"]
    found = [each.ask({**steer, "stop": [text[12:15], "never in it"]}) for each in (ours, reference)]
    for each in found:
        del each["usage"]  # an engine that has gone on by a token has used it
    check_same(*found)
    assert found[0]["choices"][0]["text"] == text[: text.index(text[12:15])]
    assert found[0]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("name", ["unsteered", "n", "own gate", "ended", "tokens"])
def test_a_stream_is_the_same_answer_in_pieces(ours: Served, name: str) -> None:
    whole = ours.ask(CASES[name])
    response = ours.post(usual({**CASES[name], "stream": True, "stream_options": {"include_usage": True}}))
    *events, last = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert last == "[DONE]"
    texts, accounts, ends, usage = {}, {}, {}, None
    for chunk in map(json.loads, events):
        usage = chunk.get("usage", usage)
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            if choice["finish_reason"]:
                ends[choice["index"]], accounts[choice["index"]] = choice["finish_reason"], chunk["saekit"]["choices"]
    for choice in whole["choices"]:
        index = choice["index"]
        assert (texts[index], ends[index]) == (choice["text"], choice["finish_reason"])
        assert accounts[index] == [whole["saekit"]["choices"][index]]
    assert usage == whole["usage"]


def test_a_seed_gives_the_same_answer_again_and_none_another(ours: Served) -> None:
    def texts(**how: Any) -> list[str]:
        return [choice["text"] for choice in ours.ask({"temperature": 1.2, "n": 2, **how})["choices"]]

    for seed in (5, -1, -(2**63) + 1, 2**63 - 1):
        assert texts(seed=seed) == texts(seed=seed)
    first, second = texts(seed=5)
    assert first != second
    assert texts(seed=6)[0] == second, "answers have the seeds behind each other"
    assert len({text for _ in range(3) for text in texts()}) > 1
    assert texts(seed=5, top_k=1) == [ours.ask({})["choices"][0]["text"]] * 2
    long = {"prompt": f"{RIVER} " * 20, "seed": 5}
    assert ours.ask({**long, "max_tokens": 1})["usage"]["prompt_tokens"] > 2 * BATCH_TOKENS
    long["prompt"] = f"Now {long['prompt']}"
    assert texts(**long) == texts(**long), "in parts, as at once with what the cache has"


def test_requests_at_once_do_not_touch_each_other(ours: Served) -> None:
    bodies = [
        {**change, "prompt": f"{'The river ' * (i % 5 + 1)}{i}", "n": 1}
        for i, change in enumerate([each for each in CASES.values() if each.get("logprobs", 3)])
    ]
    bodies += [{**steered({"vector": "gated", "dose": 1.2}), "temperature": 1.0, "seed": i} for i in range(4)]
    alone = [ours.ask(body) for body in bodies]
    assert len(bodies) > 16
    with ThreadPoolExecutor(len(bodies)) as pool:
        for found, expected in zip(pool.map(ours.ask, bodies), alone, strict=True):
            check_same(found, expected)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_alike(ours: Served, reference: Served, name: str) -> None:
    change, status, says = WRONG[name]
    one, other = (each.post(usual(change)) for each in (ours, reference))
    assert (one.status_code, one.json()) == (status, other.json())
    assert says in one.json()["error"]["message"]


@pytest.mark.parametrize("name", ONLY_OF_VLLM)
@pytest.mark.parametrize("streams", [False, True])
def test_what_vllm_cannot_do_is_refused_before_an_answer_begins(ours: Served, name: str, streams: bool) -> None:
    change, says = ONLY_OF_VLLM[name]
    found = ours.post(usual({**change, "stream": streams}))
    assert found.status_code == 400
    error = found.json()["error"]
    assert says in error["message"]
    assert error["detail"].keys() >= {"where", "expected", "got", "fix"}


# --- endings ---------------------------------------------------------------------------------------------------------


def eventually(what: Any, timeout_s: float = 60) -> None:
    """Wait until it holds."""
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def processes(server: Served) -> dict[int, int]:
    """Of a server, those that run, each with its parent; without the tracker of shared memory, which ends last."""
    command = ["ps", "-ww", "-o", "pid=,ppid=,stat=,args=", "-s", str(server.process.pid)]
    lines = [
        line.split(None, 3) for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    ]
    found = [line for line in lines if not line[2].startswith("Z") and "resource_tracker" not in line[3]]
    return {int(pid): int(parent) for pid, parent, _, _ in found}


@pytest.mark.parametrize("streams", [False, True])
def test_whoever_is_gone_is_written_for_no_longer(ours: Served, streams: bool) -> None:
    before = len(ours.lines())
    host, port = ours.address.removeprefix("http://").removesuffix("/v1").split(":")
    change = {**LONG, "n": 8, "stream": streams, **steered({"vector": "gated"})}
    body = json.dumps(usual(change)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if streams:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        eventually(lambda: ours.get("/health").json()["answers"] == 8)
    eventually(lambda: len(ours.lines()) > before)
    (line,) = ours.lines()[before:]
    assert (line["why"], line["status"]) == ("gone", 499)
    assert line["n_written"] < 8 * 1500
    assert ours.ask({})["choices"][0]["text"]


def test_numbers_are_told_as_ever(ours: Served) -> None:
    numbers = ours.get("/metrics").text
    assert 'saekit_requests_total{route="/v1/completions",status="200"}' in numbers
    assert "saekit_answers 0.0" in numbers


def test_an_engine_that_dies_is_told_to_whoever_waits_and_to_health(make_peer: Any, folder: Path) -> None:
    python = make_peer("vllm", PACKAGES, IMPORTS).python()
    with running(python, folder, "vllm", "--set", "vllm.enforce_eager=true") as answering:
        server = answering()
        (core,) = (pid for pid, parent in processes(server).items() if parent == server.process.pid)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.post, usual(LONG))
            eventually(lambda: server.get("/health").json()["answers"] == 1)
            os.kill(core, signal.SIGKILL)
            assert waiting.result().status_code == 500
        eventually(lambda: server.get("/health").status_code == 503)
        assert server.post(usual({})).status_code == 500
    eventually(lambda: not processes(server))


def test_ctrl_c_lets_answers_end_and_leaves_no_process(ours: Served) -> None:
    """The last one: behind it, the server on vLLM is gone."""
    body = usual({**LONG, "max_tokens": 300, "stream": True})
    with ours.client.stream("POST", f"{ours.address}/completions", json=body) as response:
        lines = response.iter_lines()
        first = next(lines)
        os.killpg(ours.process.pid, signal.SIGINT)  # as a terminal sends it: to all of them
        rest = [line for line in lines if line]
    assert first.startswith("data: {")
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert ours.process.wait(120) == 0
    eventually(lambda: not processes(ours))

"""An OpenAI-compatible endpoint on this machine that can be told to fail, and a clock that waits for nothing."""

import asyncio
import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """A response that is given in place of an answer."""

    status: int = 200
    content: bytes = b""
    headers: Mapping[str, str] = {}
    cut: int | None = None
    """bytes of the content after which the connection is closed"""
    hangs: bool = False
    """nothing comes until the server is closed"""


class StandIn(ThreadingHTTPServer):
    """Answers every request with `answer(body)`, unless a fault is due."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any]], str]):
        self.answer = answer
        self.faults: deque[Fault] = deque()
        """given one by one to the requests that come"""
        self.always: Fault | None = None
        """given to all of them"""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: Counter[str] = Counter()
        """how often each body was answered in full"""
        self.in_flight = self.most_in_flight = 0
        self.gate: Callable[[], None] = lambda: None
        """called while a request is in flight"""
        self.lock, self.closing = threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body together: two packets would wait for each other
    server: StandIn

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            fault = server.always or (server.faults.popleft() if server.faults else None)
        try:
            server.gate()
            self._respond(body, fault)
        finally:
            with server.lock:
                server.in_flight -= 1

    def _respond(self, body: dict[str, Any], fault: Fault | None) -> None:
        if fault is not None and fault.hangs:
            self.server.closing.wait()
            self.close_connection = True
            return
        content = completion(self.server.answer(body)) if fault is None else fault.content
        self.send_response(200 if fault is None else fault.status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (fault.headers if fault else {}).items():
            self.send_header(name, value)
        self.end_headers()
        if fault is not None and fault.cut is not None:
            self.wfile.write(content[: fault.cut])
            self.close_connection = True
            return
        self.wfile.write(content)
        self.wfile.flush()  # what is counted below has left
        if fault is None:
            with self.server.lock:
                self.server.answered[json.dumps(body, sort_keys=True)] += 1

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def completion(text: Any, **message: Any) -> bytes:
    """What an endpoint answers."""
    whole = {
        "id": "x",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7},
    }
    return json.dumps(whole).encode()


@contextmanager
def stand_in(answer: Callable[[dict[str, Any]], str] = lambda body: "Explanation: rivers") -> Iterator[StandIn]:
    """A running endpoint."""
    server = StandIn(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class FakeClock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)

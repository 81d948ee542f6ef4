"""A web server of this machine that serves what a test says, and remembers what it was asked for."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Answer(BaseHTTPRequestHandler):
    """One request; subclasses have `handled`."""

    handled: Callable[["Answer", str], None]
    asked: list[tuple[str, str, dict[str, str]]]

    def _any(self) -> None:
        type(self).asked.append((self.command, self.path, dict(self.headers)))
        type(self).handled(self, self.path)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        """Answer with a content; `headers` have underscores for dashes, and may say another length."""
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(content))} | headers).items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Server(ThreadingHTTPServer):
    """A server whose handler class remembers requests."""

    daemon_threads = True
    answer: type[Answer]

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away early are what tests are about."""


@contextmanager
def serving(handled: Callable[[Answer, str], None]) -> Iterator[Server]:
    """A server whose requests `handled` answers; `answer.asked` is what it was asked for."""
    answer = type("Answer", (Answer,), {"handled": handled, "asked": []})
    server = Server(("127.0.0.1", 0), answer)
    server.answer = answer
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

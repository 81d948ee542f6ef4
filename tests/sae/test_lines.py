"""Process 0 takes the calls of its own processes, and strangers keep nobody waiting: real sockets, on loopback."""

import multiprocessing
import pickle
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Client, wait
from pathlib import Path

import pytest

from sae.lines import call, calls

KEY = b"0123456789abcdef"
LONG_S = 60.0


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_strangers_are_hung_up_on_and_keep_nobody_waiting(
    server: socket.socket, ends: ExitStack, tmp_path: Path
) -> None:
    address = server.getsockname()
    strangers = [ends.enter_context(socket.create_connection(address)) for _ in range(4)]
    _, other, half, late = strangers
    other.sendall(b"GET / HTTP/1.1\r\n\r\n")
    half.sendall(b"\x00\x00\x00")
    late.sendall(b"\x00\x00\x00\x14#CHALLENGE#")
    with ThreadPoolExecutor(8) as threads:
        taking = threads.submit(calls, server, KEY, 3, LONG_S)
        with pytest.raises(multiprocessing.AuthenticationError):
            Client(address, authkey=b"another")
        unfit = [Client(address, authkey=KEY) for _ in range(4)]
        for line, said in zip(unfit, (b"0", b"3", b"x", pickle.dumps(Mark(tmp_path / "read"))), strict=True):
            line.send_bytes(said)
        lines = list(threads.map(lambda number: call(address, KEY, number), (2, 1)))
        taken = taking.result(LONG_S)
    assert sorted(taken) == [1, 2]
    for number, line in zip((2, 1), lines, strict=True):
        taken[number].send_bytes(b"hello")
        assert line.recv_bytes() == b"hello"
    for stranger in strangers:
        stranger.settimeout(LONG_S)
        assert has_ended(stranger)
    for line in unfit:
        with pytest.raises((EOFError, ConnectionError)):
            line.recv_bytes()
    assert not (tmp_path / "read").exists()


class Mark:
    """Writes a file if somebody unpickles it."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self._path, "")


def has_ended(stranger: socket.socket) -> bool:
    """Read to the end; what was sent before is the challenge."""
    try:
        while stranger.recv(1000):
            pass
    except ConnectionError:
        pass
    return True


def test_a_number_is_taken_once(server: socket.socket) -> None:
    address = server.getsockname()
    with ThreadPoolExecutor(2) as threads:
        taking = threads.submit(calls, server, KEY, 3, LONG_S)
        both = [call(address, KEY, 1) for _ in range(2)]
        (dropped,) = wait(both, LONG_S)  # whichever came second
        with pytest.raises((EOFError, ConnectionError)):
            dropped.recv_bytes()
        call(address, KEY, 2).close()
        taken = taking.result(LONG_S)
    taken[1].send_bytes(b"hello")
    (kept,) = (line for line in both if line is not dropped)
    assert kept.recv_bytes() == b"hello"


def test_whoever_has_not_called_in_time_is_named(server: socket.socket) -> None:
    with socket.create_connection(server.getsockname()) as silent:
        with pytest.raises(TimeoutError, match="1, 2"):
            calls(server, KEY, 3, 0.3)
        assert has_ended(silent)

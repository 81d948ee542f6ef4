"""Lines between the processes of a run: process 0 takes the calls of the others, and nobody else's.

1. Who calls has to know the key that JAX handed to all processes (the challenge of `multiprocessing.connection`), and
then says its number. 2. Each caller is greeted in a thread of its own, so one that says nothing, as a scanner of ports
does, keeps nobody waiting; it is hung up on when all have called. 3. A line ends a while after its other host is gone.

What comes over a line are bytes, never pickles. Left out: what is said over it (`sae.hosts`).
"""

import os
import socket
import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

IDLE_S, PROBE_S, PROBES = 10, 5, 3
"""a host that is gone without a word is missed after IDLE_S + PROBE_S * PROBES seconds"""
LOOK_S = 0.1
"""seconds between looks at whether all have called"""
LONGEST = 20
"""bytes of a caller's number"""


def call(address: tuple[str, int], key: bytes, number: int) -> Any:
    """A line to process 0. Raises: OSError, EOFError or AuthenticationError if it does not take the call."""
    line = _kept_alive(Client(address, authkey=key))
    line.send_bytes(str(number).encode())
    return line


def calls(server: socket.socket, key: bytes, n_processes: int, wait_s: float) -> dict[int, Any]:
    """A line to each process but the first, by its number.

    Raises: TimeoutError, with the numbers of those that have not called within `wait_s` seconds.
    """
    lines: dict[int, Any] = {}
    strangers: set[socket.socket] = set()
    server.settimeout(LOOK_S)
    deadline = time.monotonic() + wait_s
    try:
        while missing := [str(number) for number in range(1, n_processes) if number not in lines]:
            if time.monotonic() > deadline:
                raise TimeoutError(", ".join(missing))
            with suppress(OSError):  # nobody called for a while, or a caller was gone again
                caller, _ = server.accept()
                strangers.add(caller)
                greeting = (caller, key, n_processes, lines, strangers)
                threading.Thread(target=_greet, args=greeting, daemon=True).start()
        return lines
    finally:
        for caller in list(strangers):
            _hang_up(caller)


def _greet(
    caller: socket.socket, key: bytes, n_processes: int, lines: dict[int, Any], strangers: set[socket.socket]
) -> None:
    """Let a caller in that knows the key; the end of `calls` ends this, too."""
    with suppress(OSError, EOFError, AuthenticationError, ValueError):
        # A descriptor of its own, since `calls` may hang up at any time.
        with Connection(os.dup(caller.fileno())) as greeted:
            deliver_challenge(greeted, key)
            answer_challenge(greeted, key)
            number, line = int(greeted.recv_bytes(LONGEST)), _kept_alive(Connection(os.dup(caller.fileno())))
        if 0 < number < n_processes and number not in lines:
            strangers.discard(caller)  # first, or it would be hung up on once it is the last that is let in
            caller.close()
            lines[number] = line
            return
        line.close()
    _hang_up(caller)


def _hang_up(caller: socket.socket) -> None:
    with suppress(OSError):
        caller.shutdown(socket.SHUT_RDWR)
    caller.close()


def _kept_alive(line: Any) -> Any:
    with socket.socket(fileno=os.dup(line.fileno())) as there:
        there.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in {"TCP_KEEPIDLE": IDLE_S, "TCP_KEEPINTVL": PROBE_S, "TCP_KEEPCNT": PROBES}.items():
            there.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return line

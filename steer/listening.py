"""A socket that a server of ours listens on, and whether others than this machine reach it."""

import ipaddress
import socket

from activations.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""names of this machine that no other reaches"""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket on that port, or on any free one for 0. Raises: ConfigError if the address is not to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        fix = "Set port=0 for any free one, or stop what uses it."
        raise ConfigError(f"{host}:{port}", expected="an address to listen on", got=error.strerror, fix=fix) from error


def address_of(host: str, listener: socket.socket) -> str:
    """What a browser calls it."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"

"""A socket that a server of ours listens on, whether others than this machine reach it, and saying where it is."""

import ipaddress
import json
import socket
import sys

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


def say(what: str, address: str, secrets: str, *, host: str, as_json: bool) -> None:
    """Say where it answers: on standard output as one JSON object, for programs, or else in words on standard error.

    Args:
      what: answers there.
      secrets: what goes over the network unprotected, if `host` is not this machine alone.
    """
    if as_json:
        sys.stdout.write(json.dumps({"address": address}) + "\n")
        sys.stdout.flush()
    else:
        sys.stderr.write(f"{what} on {address}\nCtrl-C stops it.\n")
    if not is_loopback(host):
        sys.stderr.write(f"{secrets} cross the network as they are: put a proxy with TLS in front.\n")

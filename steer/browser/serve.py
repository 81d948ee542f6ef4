"""`saekit browse`: open what is asked for, and answer on a port until stopped.

Flow: 1. open indexes and libraries; 2. listen; 3. say where, and open the page. The address carries a token behind the
`#`, which a browser sends to nobody; the page trades it for a cookie.
"""

import ipaddress
import json
import socket
import sys
import webbrowser
from contextlib import closing

from activations.errors import ConfigError
from steer.browser.config import BrowseConfig
from steer.browser.model import SharedModel
from steer.browser.people import own_name, own_token, single
from steer.browser.sources import Opened, open_paths

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def browse(config: BrowseConfig, *, as_json: bool = False) -> None:
    """Serve until interrupted.

    Args:
      as_json: say where on standard output, as one JSON object, for programs.
    Raises: as `open_paths` does; ConfigError for an address that is not to be had, or open to others without accounts.
    """
    import uvicorn

    from steer.browser.app import create_app

    if not config.team and not _is_loopback(config.host):
        fix = "Leave host as it is and use a tunnel (ssh -L), or set team=true, which gives everybody a token."
        raise ConfigError("host", expected="a loopback address without team", got=config.host, fix=fix)
    opened = open_paths(config.paths)
    token = own_token()
    with closing(opened), closing(_listen(config.host, config.port)) as listener:
        names = {*LOOPBACK, config.host, *config.hosts}
        model = SharedModel(config.model or _model_of(opened), config.device)
        app = create_app(opened, single(config.author or own_name(), token), names, model)
        port = listener.getsockname()[1]
        shown = f"[{config.host}]" if ":" in config.host else config.host
        address = f"http://{shown}:{port}/#token={token}"
        if as_json:
            sys.stdout.write(json.dumps({"address": address}) + "\n")
            sys.stdout.flush()
        else:
            sys.stderr.write(f"saekit browser on {address}\nCtrl-C stops it.\n")
        if config.open:
            webbrowser.open(address)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        server.run(sockets=[listener])


def _model_of(opened: Opened) -> str | None:
    """The model that the first index was made with."""
    first = next(iter(opened.sources.values()), None)
    return None if first is None else first.index.info["model"]["id"]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        fix = "Set port=0 for any free one, or stop what uses it."
        raise ConfigError(f"{host}:{port}", expected="an address to listen on", got=error.strerror, fix=fix) from error

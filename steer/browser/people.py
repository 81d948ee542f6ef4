"""Accounts of a browser on one's own machine: one person, and a token that survives a restart.

Other users of the machine can reach a port on loopback, so a token is asked for here too. It lies in a file that only
its owner may read, so that pages that are open when the browser is started anew go on.
"""

import getpass
import html
import os
import secrets
from pathlib import Path

from activations.errors import ConfigError
from steer.browser.roles import Account, AccountOf

STATE_HOME = "XDG_STATE_HOME"


def own_token() -> str:
    """This user's token, made on first use."""
    file = state_folder() / "browser-token"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if file.is_file() and len(token := file.read_text().strip()) >= 32:
            file.chmod(0o600)
            return token
        token = secrets.token_urlsafe(32)
        _write_privately(file, token)
    except OSError as error:
        fix = f"Set {STATE_HOME} to a folder that can be written."
        raise ConfigError(file, expected="a file to keep a token in", got=error.strerror, fix=fix) from error
    return token


def state_folder() -> Path:
    """Where a browser keeps what belongs to a person and to no run."""
    return Path(os.environ.get(STATE_HOME) or Path.home() / ".local" / "state") / "saekit"


def opening_page(address: str) -> str:
    """A file that leads to an address: a command line that named the address would show its token to all users."""
    file = state_folder() / "open-browser.html"
    quoted = html.escape(address, quote=True)
    _write_privately(
        file, f'<!doctype html><meta http-equiv="refresh" content="0; url={quoted}"><a href="{quoted}">open</a>'
    )
    return file.as_uri()


def _write_privately(file: Path, text: str) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(text)


def own_name() -> str:
    """The name of whoever started this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "me"


def single(account: Account, token: str) -> AccountOf:
    """One account, which holds the only token."""
    return lambda given: account if secrets.compare_digest(given.encode(), token.encode()) else None

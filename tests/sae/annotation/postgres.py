"""A PostgreSQL server of our own, in a temporary folder, reached through a socket in it."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MISSING = (
    "no PostgreSQL on this machine: install Debian's package postgresql (or another whose initdb is on the PATH), "
    "or leave these tests out with: pytest -m 'not postgres'"
)


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database, as long as the server runs."""
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # not under pytest's, whose name is too long for a socket
    user = _user()
    try:
        if user is not None:
            shutil.chown(folder, user, user)
        data = folder / "data"
        _run([programs / "initdb", "-D", data, "-A", "trust", "-U", "saekit", "--no-sync", "-E", "UTF8"], user)
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=50"
        control = [programs / "pg_ctl", "-D", data, "-l", folder / "log"]
        _run([*control, "-w", "-o", options, "start"], user)
        try:
            yield f"postgresql://saekit@/postgres?host={folder}"
        finally:
            _run([*control, "-m", "immediate", "stop"], user)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    there = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not there:
        pytest.fail(MISSING)
    return there[-1].parent


def _user() -> str | None:
    """Whom the server runs as: it refuses to be root."""
    if os.getuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _run(command: list[str | Path], user: str | None) -> None:
    done = subprocess.run([str(part) for part in command], user=user, stdin=subprocess.DEVNULL, cwd="/",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout

"""A chat on a terminal: what is printed, Ctrl-C, Ctrl-D, and the same over a pipe."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from steer.library import save_library
from steer.vectors import SteeringVector

ROOT = Path(__file__).resolve().parents[3]
PIPED = "from steer.cli import main; main()"
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
SLOW = """
import sys, time
from activations.models import load_model
from steer.chat.session import Chat
from steer.chat.terminal import converse
from steer.config import ChatConfig
loaded = load_model(sys.argv[1], dtype="float32")
loaded.model.model.register_forward_hook(lambda *_: time.sleep(0.05))
loaded.model.generation_config.eos_token_id = None
converse(Chat(ChatConfig(library=sys.argv[2], vectors=("up",), max_new_tokens=400), loaded))
"""


@pytest.fixture
def library(vector: SteeringVector, tmp_path: Path) -> Path:
    save_library(tmp_path / "library", [replace(vector, coefficient=1.6)])
    return tmp_path / "library"


def test_a_conversation_over_a_pipe(tiny_llama: Path, library: Path, tmp_path: Path) -> None:
    lines = [
        "/vectors", "/add sideways", "/add up 0.5", "/gate up 0 0", "Hello", "/show", "/compare on", "And then?",
        "/nonsense", f"/save {tmp_path / 't.jsonl'}", "/help",
    ]  # fmt: skip
    settings = ["model=" + str(tiny_llama), f"library={library}", "vectors=[]", "max_new_tokens=6", "temperature=0"]
    command = [sys.executable, "-c", PIPED, "chat", *(part for each in settings for part in ("--set", each))]
    environment = os.environ | {"COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input="\n".join(lines), capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    out = done.stdout
    assert re.search(r"^up +resid_post\.1 +add +0\.40 ", out, re.MULTILINE)
    assert "! vector 'sideways': expected one of up, got 'sideways'." in out
    assert "Steered by up (add +0.50, gated)." in out
    assert re.search(r"joint dose at resid_post\.1: 0\.50\n", out)
    assert re.search(r"gate of up: open on \d of the last answer's \d+ tokens", out)
    assert re.search(r"^steered +unsteered *$", out, re.MULTILINE)
    assert "! /nonsense: expected one of /help" in out
    assert "2 answers in" in out
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 2


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, command: list[str]):
        self._file, child = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "COLUMNS": "100"}
        # Not a preexec_fn, which forks this process, and JAX warns of that where another test has loaded it.
        command = [sys.executable, "-c", TAKE_TERMINAL, *command]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=child, stdout=child, stderr=child, start_new_session=True
        )
        os.close(child)
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 240) -> str:
        """Read until it is there; what was read up to it is gone then."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"no {pattern} in {self.seen!r}"
            if select.select([self._file], [], [], 1.0)[0]:
                self.seen += os.read(self._file, 4096).decode(errors="replace")
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def type_until(self, pattern: str, text: str) -> None:
        """Type it again while nothing happens: Python waits on after a signal just in front of its wait for a line.

        What was typed is given two seconds to act, since its echo comes first, and a second one would act on what
        follows.
        """
        for _ in range(60):
            self.type(text)
            deadline = time.monotonic() + 2.0
            while (left := deadline - time.monotonic()) > 0:
                if select.select([self._file], [], [], left)[0]:
                    self.seen += os.read(self._file, 4096).decode(errors="replace")
                if re.search(pattern, self.seen):
                    self.wait_for(pattern)
                    return
        raise AssertionError(f"no {pattern} in {self.seen!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._file)


@pytest.fixture
def terminal(tiny_llama: Path, library: Path) -> Iterator[Terminal]:
    made = Terminal([sys.executable, "-c", SLOW, str(tiny_llama), str(library)])
    yield made
    made.close()


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(terminal: Terminal) -> None:
    terminal.wait_for(r"Steered by up \(add \+0\.40\)\.[^>]*> ")
    terminal.type_until(r"Ctrl-D ends the chat[^>]*> ", "\x03")
    terminal.type("Hello\n")
    terminal.wait_for(r"Hello\r?\n[^\r\n]")
    terminal.type("\x03")
    terminal.wait_for(r"\(stopped\)[^>]*> ")
    terminal.type("/dose up 0.1\n")
    terminal.wait_for(r"add \+0\.10\)[^>]*> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=60) == 0

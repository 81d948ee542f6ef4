"""Several processes, on one host or on many, that take one training run together.

1. `join` finds out from the environment whether there are others, and connects JAX to them before anything uses JAX.
2. `agree` compares what the processes were told, and stops all of them where it differs. 3. `together` holds a line to
the others open while they train: a process that fails says why, one that dies is missed, one that hangs is found
(`sae.stalls`), and each time the others end with one line and exit code 1. 4. A signal to stop, given to one, stops all
after the same step (`stop_after`).

Process 0 alone writes logs and the SAE; all write checkpoints (orbax), to a folder that they share. With one process
all of this does nothing. The network is trusted, as JAX itself trusts it. Left out: which device keeps what
(`sae.kernels.devices`), who is let in (`sae.lines`), starting the processes (`saekit train --ray` does).
"""

import atexit
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from multiprocessing import AuthenticationError
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import jax

# JAX has nothing public that brings processes together without their devices: `multihost_utils` runs a program on all
# of them, which waits forever for one that is dead, and that is what the line to the others is there to find out.
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from activations.errors import ConfigError, HostLostError, InterruptedRunError, MismatchError, SaekitError
from sae.lines import call, calls
from sae.stalls import Report, Stalls

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
JOIN_S, END_S = 300, 60
"""seconds to wait for the others: at the start, and for word of the one that died"""
BEAT_S = 1.0
"""seconds between looks at what changed, at most"""
NEVER_S = 7 * 24 * 3600
"""seconds for which JAX waits, where it is the watch that finds out who is missing"""
SOUNDS = ("Gloo", "NCCL", "oordination")
"""in messages of JAX when another process has gone"""
BYE, AT, END = "bye", "at ", "the end of one: "
"""what goes over a line: a goodbye, a report behind AT, and anything else is why all have to end"""


class Place(NamedTuple):
    """What a process is told of the run."""

    coordinator: str
    n_processes: int
    process: int


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def place(environment: Mapping[str, str]) -> Place | None:
    """What the plain variables say; None where they say nothing, or that there is one process.

    >>> place({"JAX_COORDINATOR_ADDRESS": "n0:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    Place(coordinator='n0:1234', n_processes=2, process=1)

    Raises: ConfigError if some are missing or are no such numbers.
    """
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not given.keys() & set(VARIABLES[1:]):
        return None
    expected = f"{', '.join(VARIABLES)}: all or none"
    if missing := set(VARIABLES) - given.keys():
        fix = "Set all three, or unset them to train in one process."
        raise ConfigError("environment", expected=expected, got=f"no {', '.join(sorted(missing))}", fix=fix)
    address, n, process = given.values()
    host, _, port = address.rpartition(":")
    is_address = host and port.isdecimal() and 0 < int(port) < 2**16  # at another port JAX waits for good
    if not (n.isdecimal() and process.isdecimal() and int(process) < int(n) and is_address):
        expected = "HOST:PORT, the number of processes, and this one's number, from 0"
        fix = "Number the processes 0 to JAX_NUM_PROCESSES - 1."
        raise ConfigError(", ".join(VARIABLES), expected=expected, got=f"{address}, {n}, {process}", fix=fix)
    return Place(address, int(n), int(process)) if int(n) > 1 else None


def join() -> None:
    """Connect to the other processes, if the environment says that there are some; once in the life of a process.

    Raises: ConfigError if the environment is wrong, or JAX was used already; HostLostError if not all come in time.
    """
    if jax.distributed.is_initialized():
        return
    mine, environment = place(os.environ), os.environ
    is_slurm = all(name in environment for name in SLURM) and int(environment["SLURM_NTASKS"]) > 1
    if mine is None and not is_slurm:
        return
    # Otherwise JAX aborts a process that has failed, as it leaves; who is missing is ours to find out (`together`).
    jax.config.update("jax_enable_recoverability", True)
    address, n, number = mine or (None, None, None)
    method = "slurm" if mine is None else "deactivate"
    try:
        jax.distributed.initialize(
            address,
            n,
            number,
            cluster_detection_method=method,
            initialization_timeout=JOIN_S,
            heartbeat_timeout_seconds=NEVER_S,
        )
    except RuntimeError as error:
        if "must be called before" in str(error):
            fix = "Call train before other work with JAX, or unset the variables."
            expected, got = "a process that is new to JAX", "one that used it"
            raise ConfigError("environment", expected=expected, got=got, fix=fix) from error
        fix = "Start all of them, with one address that they reach; the port must be free."
        got = " ".join(str(error).split())[:200]
        raise HostLostError("joining", expected="all processes within 5 minutes", got=got, fix=fix) from error


@contextmanager
def together(patience_s: float) -> Iterator[None]:
    """Train with the other processes, if there are any, and end when one of them does.

    While it lasts, a process whose partner fails, dies or hangs writes one line to stderr and exits with 1 at once,
    since its main thread may be waiting for that partner, where no exception reaches it.

    Args:
      patience_s: seconds without a point that any process reached (`at`), or a sign of work (`busy`), that mean that
        the one behind hangs.
    Raises: HostLostError if JAX misses a process of whose end nothing is known.
    """
    join()
    if not several():
        yield
        return
    watch = _watch()
    watch.begin(patience_s)
    try:
        yield
        meet("the end")
    except InterruptedRunError:
        meet("the stop")  # all of them stop
        raise
    except SaekitError as error:
        watch.tell(f"{END}{error}")
        raise
    except Exception as error:
        reason = f"{END}{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not any(word in str(error) for word in SOUNDS):
            watch.tell(reason)
            raise
        watch.wait()  # only the sound of another process dying, of which the watch knows more
        watch.tell(reason)
        raise _lost(reason) from error
    except BaseException as error:  # Ctrl-C, whose goodbye as it leaves would let the others wait for good
        watch.tell(f"{END}{type(error).__name__}")
        raise
    finally:
        watch.active = False


class _Watch:
    """A thread that learns of the end of other processes: each has a line to process 0, which passes on what it hears.

    A line that ends without a goodbye is a process that died. Each says where it is; process 0 finds out who is behind,
    and the others whether process 0 says anything. Raises: HostLostError if one of them does not call.
    """

    def __init__(self) -> None:
        self.active = False
        """whether to end when another process does"""
        self._lost, self._report = "", Report(0, 0, "its start")
        self._sending = threading.Lock()
        self._lines = self._listen() if is_first() else {0: self._call()}
        self._stalls = self._be_patient(NEVER_S)
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def begin(self, patience_s: float) -> None:
        """From now on, end when another process does, or has, or when one hangs for so long."""
        self._stalls = self._be_patient(patience_s)
        self.active = True
        if self._lost:
            self._stop(self._lost)

    def _be_patient(self, seconds: float) -> Stalls:
        return Stalls([0, *self._lines] if is_first() else [0], seconds)

    def at(self, doing: str) -> None:
        """This process has reached a point that all pass."""
        self._report = Report(self._report.passed + 1, 0, doing)

    def busy(self) -> None:
        """This process gets on, between two points."""
        self._report = self._report._replace(signs=self._report.signs + 1)

    def _listen(self) -> dict[int, Any]:
        key = secrets.token_hex(16)
        # On all addresses: which of them the others reach is theirs to know.
        with socket.create_server(("0.0.0.0", 0), backlog=jax.process_count()) as server:
            _client().key_value_set("saekit/watch", json.dumps([server.getsockname()[1], key]))
            try:
                return calls(server, key.encode(), jax.process_count(), JOIN_S)
            except TimeoutError as error:
                raise _lost(f"no call of {error} in {JOIN_S} s") from error

    def _call(self) -> Any:
        assert global_state.coordinator_address is not None
        host = global_state.coordinator_address.rpartition(":")[0].strip("[]")
        try:
            port, key = json.loads(_client().blocking_key_value_get("saekit/watch", JOIN_S * 1000))
            return call((host, port), key.encode(), jax.process_index())
        except (OSError, EOFError, AuthenticationError, RuntimeError) as error:
            raise _lost(f"no line to process 0 on {host}: {' '.join(str(error).split())[:200]}") from error

    def _hear(self) -> None:
        numbers = {line: number for number, line in self._lines.items()}
        silent, lines, n_beats, heard = set(numbers), list(numbers), 0, time.monotonic()
        while lines:
            stalls = self._stalls
            ready: Any = wait(lines, max(0.0, min(heard + stalls.beat_s - time.monotonic(), BEAT_S)))
            for line in ready:
                try:
                    said = line.recv_bytes().decode("utf-8", errors="replace")
                except (OSError, EOFError):
                    said = f"{END}it died, or its host did" if line in silent else BYE
                    lines.remove(line)
                if said == BYE:
                    silent.discard(line)
                    stalls.gone(numbers[line])
                elif said.startswith(AT):
                    stalls.heard(numbers[line], Report(*json.loads(said.removeprefix(AT))))
                elif self.active:
                    self._stop(said)
                else:
                    self._lost = self._lost or said
            if (now := time.monotonic()) >= heard + stalls.beat_s:
                n_beats += 1
                self._beat(stalls, n_beats)
                stuck, heard = stalls.wait(now - heard), now
                if self.active and stuck:
                    self._stop(stuck)

    def _beat(self, stalls: Stalls, n_beats: int) -> None:
        """Say where this process is; that process 0 says anything at all is what the others listen for."""
        report = self._report
        if is_first():
            stalls.heard(0, report)
            report = report._replace(signs=n_beats)
        self.tell(AT + json.dumps(report))

    def _stop(self, reason: str) -> None:
        self.tell(reason)
        sys.stderr.write(f"{_lost(reason)}\n")
        sys.stderr.flush()
        os._exit(1)

    def tell(self, said: str) -> None:
        """Say something to the others, such as why this process ends."""
        with self._sending:
            for line in self._lines.values():
                with suppress(OSError):
                    line.send_bytes(said.encode())

    def wait(self) -> None:
        """Wait a while for the others to end, which may end this process."""
        self._thread.join(END_S)

    def _leave(self) -> None:
        """Say goodbye; process 0 ends last, since JAX aborts a process that leaves when process 0 is gone."""
        self.tell(BYE)
        if is_first():
            self.wait()


def _lost(reason: str) -> HostLostError:
    return HostLostError(
        f"process {jax.process_index()} of {jax.process_count()}",
        expected="all processes to go on",
        got=reason.rstrip("."),
        fix="Start all of them again, as many as you like: the run resumes from its last checkpoint.",
    )


@cache
def _watch() -> _Watch:
    """That of this process."""
    return _Watch()


_numbers = count()
"""of what all processes do in the same order, so that names in JAX's key-value store are used once"""


def _client() -> Any:
    return global_state.client


def at(doing: str) -> None:
    """Tell the others what this process does next: at points that all pass, in the same order."""
    if several():
        _watch().at(doing)


def busy() -> None:
    """Tell the others that this process gets on, where it takes long from one point to the next."""
    if several():
        _watch().busy()


def meet(where: str) -> None:
    """Wait until all processes are here; inside `together`, which ends the wait if one never comes."""
    if several():
        at(f"the meeting, {where}")
        _client().wait_at_barrier(f"saekit/{next(_numbers)}/{where}", NEVER_S * 1000)


def agree(told: Mapping[str, Any]) -> None:
    """Compare what each process was told.

    Raises: MismatchError, in all of them, that names what differs from process 0.
    """
    if not several():
        return
    folder = f"saekit/told/{next(_numbers)}"
    _client().key_value_set(f"{folder}/{jax.process_index()}", json.dumps(told))
    meet("told")
    first, *others = (json.loads(_client().key_value_try_get(f"{folder}/{i}")) for i in range(jax.process_count()))
    for i, other in enumerate(others, start=1):
        differing = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differing:
            raise MismatchError(
                f"process {i} of {jax.process_count()}",
                expected="what process 0 has: " + ", ".join(f"{key}={first.get(key)}" for key in differing),
                got=", ".join(f"{key}={other.get(key)}" for key in differing),
                fix="Start all processes with one config, on one store or copies of it, with the same versions.",
            )


def of_first_text(text: str) -> str:
    """The text of process 0, for which all have to ask; with one process, as it is."""
    if not several():
        return text
    key = f"saekit/text/{next(_numbers)}"
    if is_first():
        _client().key_value_set(key, text)
    meet("text")
    return _client().key_value_try_get(key)


def stop_after(step: int, is_asked: bool) -> bool:
    """Whether to stop after this step, which all processes ask after each step, and of which all get one answer."""
    return multihost_utils.reached_preemption_sync_point(step) if several() else is_asked


def of_first(tree: Any) -> Any:
    """The arrays of process 0, for which all have to ask; with one process, as they are.

    Processes that compute the same need not get the same bits: each GPU times for itself which program is fastest.
    """
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


def whole(tree: Any) -> Any:
    """The arrays of a tree in main memory, for which all processes have to ask; with one process, as they are."""
    return multihost_utils.process_allgather(tree, tiled=True) if several() else tree

"""`saekit train --ray`: one run in several processes on the nodes of a Ray cluster, which train together.

1. Ray finds a node for each process, with its GPUs. 2. The node of process 0 names its address and a port, which it
keeps from others.
3. Each runs `saekit train` in the folder where this was started, with the variables that `sae.hosts` reads; what they
say comes here through Ray, and what process 0 returns is the result. 4. Ctrl-C here stops all of them after the same
step, with a checkpoint. Once one has failed, those that do not end by themselves are ended; run it again, and the run
resumes.

Ray comes with the extra `ray`, and is needed on every node. Left out: trying again by itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from activations.errors import ConfigError, InterruptedRunError, StorageError, WorkerError
from activations.ray_pool import connected, here

Status = Callable[[str], None]
SAEKIT = "from steer.cli import main; main()"
END_S = 60.0
"""seconds for the others to end once one has failed"""
ROOM_S = 5.0
"""seconds for a cluster with room to give it, before somebody is told that it is busy"""


class Process:
    """Runs on a node, as an actor of Ray."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None
        self.port = socket.socket()

    def address(self) -> str:
        """Where other nodes reach this one, with a port that stays free for the process that this one starts."""
        import ray

        # JAX, too, binds with this option, and so can while this is bound; nobody else gets the port meanwhile.
        self.port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.port.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{self.port.getsockname()[1]}"

    def train(self, words: list[str], folder: str, variables: dict[str, str]) -> tuple[int, str]:
        """Exit code of `saekit train`, and what it returned."""
        if not os.path.isdir(folder):
            fix = "Start it in a folder that all nodes share."
            error = StorageError(folder, expected=f"a folder that {here()} has, too", got="nothing", fix=fix)
            sys.stderr.write(f"saekit: {error}\n")
            return 1, ""
        command = [sys.executable, "-c", SAEKIT, "train", *words, "--json"]
        self._running = subprocess.Popen(command, cwd=folder, env=os.environ | variables, stdout=subprocess.PIPE)
        returned, _ = self._running.communicate()
        return self._running.returncode, returned.decode(errors="replace")

    def stop(self) -> None:
        """Ask it to stop, and so all of them."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it, which may hang."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self._running is not None:
            self._running.send_signal(number)


def launch(
    words: list[str],
    address: str,
    n_processes: int | None = None,
    n_gpus: int | None = None,
    n_cpus: float = 1.0,
    on_status: Status = lambda line: None,
) -> dict[str, Any]:
    """What `saekit train WORDS` returns in several processes, on nodes apart as far as there are enough.

    Args:
      address: of the Ray cluster, or `local`: one made of this machine.
      n_processes: none: as many as there are nodes, of those with GPUs if some have any.
      n_gpus: that each process takes; none: as many as each node has.
      n_cpus: that each process reserves.
      on_status: told what is waited for, if the cluster is busy.

    Raises: ConfigError without Ray, or if the cluster is too small; WorkerError if it does not answer, or if a process
    does not end well; InterruptedRunError after Ctrl-C, with a checkpoint kept.
    """
    with connected(address, is_heard=True):
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        n_processes, n_gpus = share(
            [node["Resources"] for node in ray.nodes() if node["Alive"]], n_processes, n_gpus, n_cpus
        )
        needs = {"CPU": n_cpus} | ({"GPU": float(n_gpus)} if n_gpus else {})
        group = placement_group([needs] * n_processes, strategy="SPREAD")
        if not group.wait(ROOM_S):
            each = f"{n_cpus:g} CPUs" + (f" and {n_gpus} GPUs" if n_gpus else "")
            on_status(f"waiting for the Ray cluster, which is busy, to have room for {n_processes} processes of {each}")
        actor: Any = ray.remote(Process)
        processes = [
            actor.options(
                num_cpus=n_cpus,
                num_gpus=n_gpus,
                max_concurrency=2,  # `stop` while `train` runs
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
            ).remote()
            for i in range(n_processes)
        ]
        first = ray.get(processes[0].address.remote())
        common = {"JAX_COORDINATOR_ADDRESS": first, "JAX_NUM_PROCESSES": str(n_processes)}
        ends = [
            process.train.remote(words, os.getcwd(), {**common, "JAX_PROCESS_ID": str(i)})
            for i, process in enumerate(processes)
        ]
        return _result(processes, ends)


def _result(processes: list[Any], ends: list[Any]) -> dict[str, Any]:
    is_stopped = False
    try:
        codes = _codes(processes, ends)
    except KeyboardInterrupt:
        import ray
        from ray.exceptions import RayActorError

        with suppress(RayActorError):  # its node is gone, of which the others learn by themselves
            ray.get(processes[0].stop.remote())
            is_stopped = True
        codes = _codes(processes, ends)
    if not any(codes):
        return json.loads(_end(ends[0])[1].splitlines()[-1])
    fix = "Run it again to resume."
    if is_stopped:
        raise InterruptedRunError("training on Ray", expected="the whole run", got="Ctrl-C", fix=fix)
    got = f"exit codes {', '.join(map(str, codes))}"
    fix = f"See above what they said, then do as it says. {fix}"
    raise WorkerError("training on Ray", expected="processes that end well", got=got, fix=fix)


def _codes(processes: list[Any], ends: list[Any]) -> list[int]:
    """Exit codes of all, once they have ended; if one fails, those that go on all the same are killed after a while."""
    import ray

    left = list(ends)
    while left:
        (end,), left = ray.wait(left)
        if _end(end)[0]:
            _, hang = ray.wait(left, num_returns=len(left), timeout=END_S) if left else ([], [])
            ray.get([processes[ends.index(end)].kill.remote() for end in hang])
            break
    return [_end(end)[0] for end in ends]


def _end(end: Any) -> tuple[int, str]:
    """Exit code of a process that has ended, and what it returned; one whose node is gone was killed."""
    import ray
    from ray.exceptions import RayActorError

    try:
        return ray.get(end)
    except RayActorError:
        return -signal.SIGKILL, ""


def share(
    nodes: Sequence[Mapping[str, float]], n_processes: int | None, n_gpus: int | None, n_cpus: float
) -> tuple[int, int]:
    """Processes, and GPUs of each.

    Args:
      nodes: the resources of each, by Ray's names.

    Raises: ConfigError if there are not as many.

    >>> share([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}, {"CPU": 4.0}], None, None, 1.0)
    (2, 8)
    """
    with_gpus = [int(node["GPU"]) for node in nodes if node.get("GPU")]
    if n_gpus is None:
        n_gpus = min(with_gpus, default=0)
        if n_processes is not None and n_processes > len(with_gpus):  # several on a node
            n_gpus = sum(with_gpus) // n_processes
    n_processes = n_processes or len(with_gpus if n_gpus else nodes)
    for name, each in {"CPU": n_cpus, "GPU": float(n_gpus)}.items():
        there = sum(int(node.get(name, 0) // each) for node in nodes) if each else n_processes
        if there < n_processes:
            expected = f"room for {n_processes} processes of {each:g} {name}s"
            fix = "Start fewer processes, or add nodes."
            raise ConfigError("the Ray cluster", expected=expected, got=f"room for {there}", fix=fix)
    return n_processes, n_gpus

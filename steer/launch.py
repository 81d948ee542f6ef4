"""Start `saekit train` on the nodes of a Ray cluster, one process a node, as processes that train together.

    python -m steer.launch --processes 4 --gpus 8 -- configs/gpu_train.yaml --set compute.data_parallel=32

1. Ray finds a node for each process, with so many GPUs. 2. The node of process 0 names its address and a free port.
3. Each runs what follows `--` as the command line would, in the folder where this was started, with the variables that
`sae.hosts` reads; what they say comes here through Ray. 4. Ctrl-C here stops all of them after the same step, with a
checkpoint. Exits with 1 if a process does not end well; run it again, and the run resumes.

Ray comes with the extra `ray`, and is needed on every node. Left out: trying again by itself.
"""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from activations.errors import ConfigError, SaekitError

SAEKIT = "from steer.cli import main; main()"


class Process:
    """Runs on a node, as an actor of Ray."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None

    def address(self) -> str:
        """Where other nodes reach this one, with a port that is free now."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def train(self, words: list[str], folder: str, variables: dict[str, str]) -> int:
        """Exit code of `saekit train`."""
        command = [sys.executable, "-c", SAEKIT, "train", *words]
        self._running = subprocess.Popen(command, cwd=folder, env=os.environ | variables)
        return self._running.wait()

    def stop(self) -> None:
        """Ask it to stop, and so all of them."""
        if self._running is not None:
            self._running.send_signal(signal.SIGTERM)


def launch(words: list[str], n_processes: int, n_gpus: int, address: str | None, n_cpus: float = 1.0) -> list[int]:
    """Exit codes of `saekit train WORDS` in so many processes, on nodes apart as far as there are enough.

    Args:
      n_gpus: that each process takes.
      address: of the Ray cluster; none: that of the environment, or one made of this machine.
      n_cpus: that each process reserves.

    Raises: ConfigError without Ray, or if the cluster is too small.
    """
    try:
        import ray
    except ImportError as error:
        fix = "pip install ray, on every node, or set the variables yourself (docs/scaling-train.md)."
        raise ConfigError("ray", expected="the package", got="none", fix=fix) from error
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init(address=address, logging_level=logging.ERROR)
    needs = {"CPU": n_cpus} | ({"GPU": float(n_gpus)} if n_gpus else {})
    _check_room(ray.cluster_resources(), needs, n_processes)
    group = placement_group([needs] * n_processes, strategy="SPREAD")
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
    common = {"JAX_COORDINATOR_ADDRESS": ray.get(processes[0].address.remote()), "JAX_NUM_PROCESSES": str(n_processes)}
    codes = [
        process.train.remote(words, os.getcwd(), {**common, "JAX_PROCESS_ID": str(i)})
        for i, process in enumerate(processes)
    ]
    try:
        return ray.get(codes)
    except KeyboardInterrupt:
        ray.get(processes[0].stop.remote())
        return ray.get(codes)
    finally:
        ray.shutdown()


def _check_room(there: Mapping[str, float], needs: dict[str, float], n_processes: int) -> None:
    for name, each in needs.items():
        if there.get(name, 0) < each * n_processes:
            expected = f"{each * n_processes:g} {name}s for {n_processes} processes"
            fix = "Start fewer processes, or add nodes."
            raise ConfigError("the Ray cluster", expected=expected, got=f"{there.get(name, 0):g}", fix=fix)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="steer.launch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, required=True, help="one a node")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each process takes")
    parser.add_argument("--cpus", type=float, default=1.0, help="CPUs that each process reserves")
    parser.add_argument("--address", default=None, help="of the Ray cluster; auto: the one on this machine")
    parser.add_argument("words", nargs="*", help="after --: what saekit train takes")
    args = parser.parse_args()
    try:
        codes = launch(args.words, args.processes, args.gpus, args.address, args.cpus)
    except SaekitError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    sys.exit(1 if any(codes) else 0)


if __name__ == "__main__":
    main()

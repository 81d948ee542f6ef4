"""Work on the processes of Ray, in order, and done again where a worker is lost.

Flow:
1. `connected` starts Ray on this machine, or joins a cluster by its address;
2. `share` divides the machines: how many workers, and what each of them gets;
3. a `Pool` gives items to workers that are ready, DEPTH at a time to each, so that one is computed while the one before
   is written; it hands results out in the order of the items. What a lost worker had goes to others, and a new worker
   takes its place; only if workers are lost again and again, with no result in between, does the run end.

A worker is an object with the methods `prepare`, which is called at once; `begin`, with what `Pool.begin` is given,
which returns where the worker is (`here`); and `run`, with an item. Its errors are raised here. Left out: what the work
is. Nothing of Ray is imported before it is asked for.
"""

import heapq
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, Literal

from activations.errors import ConfigError, SaekitError, WorkerError
from activations.quiet import first_line

LOCAL = "local"
DEPTH = 2
"""items that a worker has at a time"""
MAX_LOSSES = 3
"""times as many workers as there are may be lost without a result in between"""
CONNECT_S = 10.0
"""seconds to wait for a cluster's address to answer, before Ray is asked, which would try for minutes"""


@contextmanager
def connected(address: str, is_heard: bool = False) -> Iterator[None]:
    """Inside it Ray runs: `local` starts it on this machine, HOST:PORT joins a cluster; one that runs already stays.

    Args:
      is_heard: whether what its processes say comes here.
    Raises: ConfigError if Ray is not installed; WorkerError if the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        fix = "Run pip install 'saekit[ray]', or leave ray out."
        raise ConfigError(f"ray '{address}'", expected="the library ray", got="it is not installed", fix=fix) from error
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        if address != LOCAL:
            _knock(address)
        ray.init(address=address, log_to_driver=is_heard, logging_level=logging.ERROR, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise WorkerError(
            f"ray '{address}'",
            expected="local, or HOST:PORT of a Ray cluster that answers",
            got=first_line(error),
            fix="Start one with: ray start --head --port 6379; set RAY_AUTH_MODE=token here if it asks for a token.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ValueError(f"'{address}'")
    socket.create_connection((host, int(port)), CONNECT_S).close()


def here() -> str:
    """This process, for messages."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def share(
    machines: Sequence[Mapping[str, float]], workers: int | Literal["auto"], device: str
) -> tuple[int, dict[str, int]]:
    """How many workers there are, and what each asks Ray for.

    Args:
      machines: the resources of each, by Ray's names.
      workers: as many, or auto: one for each GPU, or where none is used as many as there are machines.
      device: the torch device of the config.
    Raises: ConfigError if the machines have not as much.

    >>> share([{"CPU": 8.0}, {"CPU": 4.0}], 3, "auto")
    (3, {'num_cpus': 4})
    >>> share([{"CPU": 8.0, "GPU": 2.0}], "auto", "auto")
    (2, {'num_cpus': 1, 'num_gpus': 1})
    """
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    if ":" in device or (device == "cuda" and not gpus):
        got = f"{device} and {gpus} GPUs in the cluster"
        raise ConfigError("device with ray", expected="auto, cpu or cuda", got=got, fix="Set device=auto.")
    on_gpu = bool(gpus) and device != "cpu"
    kept = [machine for machine in machines if machine.get("GPU" if on_gpu else "CPU", 0) >= 1]
    n = workers if workers != "auto" else gpus if on_gpu else len(kept)
    cpus = [int(machine.get("CPU", 0)) for machine in kept]
    fits = [each for each in range(1, max(cpus, default=0) + 1) if sum(of // each for of in cpus) >= n]
    if not fits or (on_gpu and n > gpus):
        has = f"{gpus} GPUs" if on_gpu else f"{sum(cpus)} CPUs"
        raise ConfigError(
            "ray_workers", expected=f"at most the {has} of the cluster", got=n, fix="Lower it, or add machines."
        )
    return n, {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": fits[-1]}


class Pool:
    """Workers of one class; use it as a context manager inside `connected`."""

    def __init__(self, kind: type, arguments: tuple[Any, ...], workers: int | Literal["auto"], device: str):
        """Start workers, `kind(*arguments)` each. Raises: ConfigError if the machines have not as many."""
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.size, asked = share(machines, workers, device)
        options: dict[str, Any] = {"max_restarts": 0, "max_concurrency": DEPTH, **asked}
        self._make: Callable[[], Any] = lambda: ray.remote(**options)(kind).remote(*arguments)
        self._begin: tuple[Any, ...] | None = None
        self._numbers, self._items, self._n_taken, self._losses = count(), {}, 0, 0
        self._actors: dict[int, Any] = {}
        self._load: dict[int, int] = {}
        """items under way, by worker that is ready"""
        self._tasks: dict[Any, tuple[int, int | None]] = {}
        """worker and item of what is under way; no item: it begins"""
        self._queue: list[int] = []
        self._done: dict[int, Any] = {}
        for _ in range(self.size):
            self._start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for actor in self._actors.values():
            with suppress(Exception):  # there may be no cluster any more
                ray.kill(actor)

    def ask(self, method: str) -> Any:
        """What a method of some worker gives."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        while True:
            number, actor = next(iter(self._actors.items()))
            try:
                return ray.get(getattr(actor, method).remote())
            except RayTaskError as error:
                raise _own(error) from error
            except RayActorError as error:
                self._lose(number, error)

    def begin(self, *arguments: Any, ready: Callable[[str], None] = lambda where: None) -> None:
        """Let every worker begin, now and later ones too; returns when the first has.

        Args:
          ready: told where a worker is, once it has begun.
        """
        self._begin, self._ready = arguments, ready
        for number in self._actors:
            self._let_begin(number)
        while not self._load:
            self.wait()

    def map(self, items: Sequence[Any]) -> Iterator[Any]:
        """The result of each item, in order; no more than `size` results wait for one that comes before them."""
        left = deque(items)
        while left or self.pending:
            while left and self.has_room and self.pending < (1 + DEPTH) * self.size:
                self.submit(left.popleft())
            yield from self.results()
            if self.pending:  # or all that was under way came at once, behind the first of it
                self.wait()

    @property
    def pending(self) -> int:
        """Items whose results were not handed out."""
        return len(self._items)

    @property
    def has_room(self) -> bool:
        """Whether an item would not wait for long behind others that wait."""
        return len(self._queue) < self.size

    def submit(self, *item: Any) -> None:
        """Have one more item run."""
        number = self._n_taken + len(self._items)
        self._items[number] = item
        heapq.heappush(self._queue, number)
        self._hand_out()

    def results(self) -> Iterator[Any]:
        """The results that are next in order and there."""
        while self._n_taken in self._done:
            number = self._n_taken
            del self._items[number]
            self._n_taken += 1
            yield self._done.pop(number)

    def wait(self) -> None:
        """Return when a worker has done something. Raises what it raised; WorkerError if too many are lost."""
        import ray
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

        (ref,), _ = ray.wait(list(self._tasks), num_returns=1)
        worker, item = self._tasks.pop(ref)
        try:
            value = ray.get(ref)
        except RayTaskError as error:
            raise _own(error) from error
        except RayActorError as error:
            if item is not None:
                heapq.heappush(self._queue, item)
            self._lose(worker, error)
        except ObjectLostError as error:
            # The machine on which it lay is gone; of a worker that died with it what else it had tells.
            assert item is not None, "what `begin` returns is small, and comes with the message that it is there"
            heapq.heappush(self._queue, item)
            if worker in self._load:
                self._load[worker] -= 1
            self._count_loss(error)
        else:
            if item is None:
                self._ready(value)
                self._load[worker] = 0
            else:
                self._done[item], self._losses = value, 0
                self._load[worker] -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._queue and self._load:
            worker = min(self._load, key=self._load.__getitem__)
            if self._load[worker] == DEPTH:
                return
            item = heapq.heappop(self._queue)
            self._load[worker] += 1
            self._tasks[self._actors[worker].run.remote(*self._items[item])] = worker, item

    def _lose(self, worker: int, error: Exception) -> None:
        """Replace a worker; each of its items tells of the same loss."""
        if worker not in self._actors:
            return
        del self._actors[worker]
        self._load.pop(worker, None)
        self._count_loss(error)
        self._start()

    def _count_loss(self, error: Exception) -> None:
        """One more without a result in between. Raises: WorkerError if they are too many."""
        self._losses += 1
        if self._losses > MAX_LOSSES * self.size:
            raise WorkerError(
                f"{self.size} workers of Ray",
                expected="workers that live long enough to finish something",
                got=f"{self._losses} lost in a row: {first_line(error)}",
                fix="See Ray's logs for why, often memory; then run the same command again, it goes on from there.",
            ) from error

    def _start(self) -> None:
        number = next(self._numbers)
        self._actors[number] = self._make()
        self._actors[number].prepare.remote()
        if self._begin is not None:
            self._let_begin(number)

    def _let_begin(self, number: int) -> None:
        assert self._begin is not None
        self._tasks[self._actors[number].begin.remote(*self._begin)] = number, None


def _own(error: Any) -> Exception:
    """What a worker raised: an error of the project's own as it is, any other with the worker's traceback."""
    return error.cause if isinstance(error.cause, SaekitError) else error

"""Workers of Ray: results in order whoever is killed, errors as they are, and no Ray where none is asked for."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from activations import errors
from activations.errors import ConfigError, NumericsError, SaekitError, WorkerError
from activations.ray_pool import Pool, connected, share


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with connected("local"):
        yield


def worker_class(run: Any) -> type:
    """A class that is sent to workers by its value, since they cannot import this module."""

    class Worker:
        def prepare(self) -> None:
            pass

        def begin(self) -> int:
            return os.getpid()

        def run(self, item: int) -> Any:
            return run(item)

    return Worker


def wait_for_ever(pool: Pool) -> None:
    while True:
        pool.wait()


def test_results_come_in_order_whoever_is_killed(ray_here: None) -> None:
    rng, pids, results = random.Random(0), [], []
    with Pool(worker_class(lambda item: item * item), (), 2, "auto") as pool:
        pool.begin(ready=pids.append)
        items, kills = iter(range(200)), 0
        while True:
            while pool.has_room and (item := next(items, None)) is not None:
                pool.submit(item)
            results += pool.results()
            if not pool.pending:
                break
            if kills < 3 and len(results) > 50 * kills and pids:
                os.kill(pids.pop(rng.randrange(len(pids))), signal.SIGKILL)
                kills += 1
            pool.wait()
    assert kills == 3
    assert results == [item * item for item in range(200)]


def test_items_go_on_behind_a_slow_one_for_which_all_others_waited(ray_here: None, tmp_path: Path) -> None:
    go = tmp_path / "go"

    def run(item: int) -> int:
        while item == 0 and not go.exists():
            time.sleep(0.01)
        return item

    class Waited(Pool):
        def wait(self) -> None:
            super().wait()
            if len(self._done) == self.pending - 1:
                go.touch()

    with Waited(worker_class(run), (), 1, "auto") as pool:
        pool.begin()
        assert list(pool.map(range(10))) == list(range(10))


def test_an_item_that_kills_its_workers_ends_the_run(ray_here: None) -> None:
    with Pool(worker_class(lambda item: os.kill(os.getpid(), signal.SIGKILL)), (), 1, "auto") as pool:
        pool.begin()
        pool.submit(0)
        with pytest.raises(WorkerError, match=r"expected workers that live long enough .* 4 lost in a row"):
            wait_for_ever(pool)


def test_errors_of_a_worker_are_raised_here(ray_here: None) -> None:
    def fail(item: int) -> None:
        if item:
            raise NumericsError("place", expected="numbers", got="none", fix="Try.")
        raise ZeroDivisionError

    for item, kind in ((1, NumericsError), (0, ZeroDivisionError)):
        with Pool(worker_class(fail), (), 1, "auto") as pool:
            pool.begin()
            pool.submit(item)
            with pytest.raises(kind):
                pool.wait()


def test_more_workers_than_there_is_room_for(ray_here: None) -> None:
    with pytest.raises(ConfigError, match=r"ray_workers: expected at most the \d+ CPUs of the cluster, got 1000"):
        Pool(worker_class(abs), (), 1000, "auto")


def test_shares() -> None:
    big, small, gpu = {"CPU": 6.0}, {"CPU": 2.0}, {"CPU": 8.0, "GPU": 4.0}
    assert share([big, small], "auto", "cpu") == (2, {"num_cpus": 3})
    assert share([big, small], 4, "cpu") == (4, {"num_cpus": 2})
    assert share([big, small], 1, "cpu") == (1, {"num_cpus": 6})
    assert share([big, gpu], "auto", "auto") == (4, {"num_cpus": 1, "num_gpus": 1})
    assert share([big, gpu], "auto", "cpu") == (2, {"num_cpus": 6})
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="device with ray: expected auto, cpu or cuda"):
            share([big], "auto", device)
    with pytest.raises(ConfigError, match="4 GPUs"):
        share([gpu], 5, "auto")


def test_every_error_gets_from_process_to_process() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SaekitError)]
    assert len(kinds) > 10
    for kind in kinds:
        error = kind("place", expected="this", got=7, fix="Do that.")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.got, again.fix) == (kind, str(error), "7", "Do that.")


def test_nothing_of_ray_is_imported_unless_it_is_asked_for() -> None:
    code = "import activations.ray_harvest, steer.cli, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

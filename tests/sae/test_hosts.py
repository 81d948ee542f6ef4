"""Several processes take one run together: real ones, on loopback, each with CPU devices of its own."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import sae.hosts
import sae.train
from activations.errors import ConfigError, SaekitError
from activations.store import ActivationStore
from sae import step
from sae.architectures import ARCHITECTURES
from sae.artefact import SaeArtefact
from sae.config import ComputeConfig, SaeConfig, TrainConfig
from sae.hosts import Place, place
from sae.lines import call
from sae.log import read_log
from sae.run import _check_alone
from sae.train import train
from tests.sae.conftest import write_store
from tests.sae.runs import HOOK, OTHERS, WIRINGS, short_run

MakeStore = Callable[..., ActivationStore]
STEPS, LONG = 10, 40
SPLIT = ("batchtopk", "jumprelu")
"""The other tests train topk. All ARCHITECTURES pass, in three minutes; tests/sae/kernels/test_devices.py has them."""
PATIENCE_S = 15.0
"""more than compiling takes on a busy machine"""
GRID = ComputeConfig(data_parallel=2, latent_parallel=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return write_store(tmp_path_factory.mktemp("hosts"), hook_points=(HOOK, *OTHERS))


@pytest.fixture(scope="module")
def whole(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A long run of one process, which broken ones have to come to."""
    config = config_of(store, tmp_path_factory.mktemp("whole") / "run", LONG)
    train(config)
    return config


def config_of(
    store: ActivationStore, out: Path, n_steps: int = STEPS, name: str = "topk", **changes: Any
) -> TrainConfig:
    sae = SaeConfig(architecture=name, d_sae=48, k=4, aux_k=8, groups=(0.25, 0.75))
    hook_points = (WIRINGS[ARCHITECTURES[name].reads],)
    settings = {"lr": 0.01, "eval_every": 20, "checkpoint_every": 10, "hook_points": hook_points, **changes}
    return short_run(store, out, n_steps, sae=sae, **settings)


def run(configs: list[TrainConfig], environment: dict[str, str], said: Path) -> None:
    """One process: train after another config; it exits as the command line does."""
    os.environ.update(environment)
    file = os.open(said, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 2)
    try:
        for config in configs:
            train(config)
    except SaekitError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        sys.exit(1)


def run_unlike(configs: list[TrainConfig], environment: dict[str, str], said: Path) -> None:
    """As `run`; all processes but the first start from weights that are rounded another way."""

    def create(config: TrainConfig, plan: Any) -> Any:
        made = step.create(config, plan)
        made.b_enc[...] += 1e-6 * jax.process_index()
        return made

    sae.train.create = create
    run(configs, environment, said)


def plain(address: str, n: int, i: int) -> dict[str, str]:
    return {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n), "JAX_PROCESS_ID": str(i)}


def slurm(address: str, n: int, i: int) -> dict[str, str]:
    """What srun sets for a task, as far as JAX reads it; a real job's number gives the port."""
    port = address.rpartition(":")[2]
    task = {"SLURM_NTASKS": str(n), "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
    return {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "JAX_COORDINATOR_PORT": port, **task}


class Processes:
    """Processes that train together."""

    def __init__(
        self,
        start: Callable[..., Any],
        configs: list[list[TrainConfig]],
        n_devices: int,
        folder: Path,
        variables: Callable[[str, int, int], dict[str, str]] = plain,
        run: Callable[..., None] = run,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        folder.mkdir(parents=True, exist_ok=True)
        self._said = [folder / f"said_{i}" for i in range(len(configs))]
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={n_devices}")
        self.all = [
            start(run, configs[i], {"XLA_FLAGS": flags, **variables(address, len(configs), i)}, said)
            for i, said in enumerate(self._said)
        ]

    def end(self) -> list[int]:
        """Exit codes, once all have ended."""
        for process in self.all:
            process.join(120)
        return [process.exitcode for process in self.all]

    def said(self, i: int) -> str:
        return self._said[i].read_text(errors="replace")


def logged(out: Path) -> int:
    rows = read_log(out / "train.jsonl")
    return rows[-1]["step"] if rows else 0


def wait_for(out: Path, step: int, processes: Processes) -> None:
    """Until a step is logged, and the first checkpoint is whole."""
    while logged(out) < step or not (out / "checkpoints" / "10").exists():
        assert all(process.is_alive() for process in processes.all), [processes.said(i) for i in range(2)]
        time.sleep(0.01)


def saved(out: Path) -> SaeArtefact:
    return SaeArtefact.load(out / "sae")


def same(mine: TrainConfig, wanted: TrainConfig) -> None:
    """The same weights and the same log, but for rounding: sums over devices have another order."""
    for name, tensor in saved(wanted.out).tensors().items():
        np.testing.assert_allclose(saved(mine.out).tensors()[name], tensor, rtol=2e-3, atol=2e-5, err_msg=name)
    rows, expected = read_log(mine.out / "train.jsonl"), read_log(wanted.out / "train.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in expected], "once each: one process logs"
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert rows[-1]["holdout_fvu"] == pytest.approx(expected[-1]["holdout_fvu"], rel=1e-3)


def test_two_processes_take_the_steps_of_one(
    store: ActivationStore, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    """One run after the other in the same two processes of two devices each, on three grids."""
    whole = [config_of(store, tmp_path / name, name=name) for name in SPLIT]
    split = [config.model_copy(update={"out": tmp_path / f"{config.out}_split"}) for config in whole]
    grids = [GRID, ComputeConfig(data_parallel=4), ComputeConfig(latent_parallel=4)]
    split = [config.model_copy(update={"compute": grids[i % 3]}) for i, config in enumerate(split)]
    processes = Processes(start_process, [split, split], 2, tmp_path / "said", run=run_unlike)
    for config in whole:
        train(config)
    assert processes.end() == [0, 0], processes.said(0) + processes.said(1)
    for mine, wanted in zip(split, whole, strict=True):
        same(mine, wanted)


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes_on_another_number(
    dies: int, whole: TrainConfig, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    broken = whole.model_copy(update={"out": tmp_path / "broken"})
    two = broken.model_copy(update={"compute": GRID})
    processes = Processes(start_process, [[two], [two]], 2, tmp_path / "first")
    wait_for(broken.out, 15, processes)
    processes.all[dies].kill()
    codes = processes.end()
    assert codes[dies] == -signal.SIGKILL
    assert codes[1 - dies] in ((1,) if dies == 1 else (1, -signal.SIGABRT)), "with process 0, JAX may be first to abort"
    said = processes.said(1 - dies)
    assert f"process {1 - dies} of 2: expected all processes to go on, got the end of one: it died" in said
    assert "the run resumes from its last checkpoint" in said
    if dies == 0:
        assert train(broken).resumed_from in (10, 20, 30)
    else:
        three = broken.model_copy(update={"compute": ComputeConfig(latent_parallel=3)})
        processes = Processes(start_process, [[three]] * 3, 1, tmp_path / "second")
        assert processes.end() == [0, 0, 0], processes.said(0)
    same(broken, whole)


def test_a_process_that_hangs_is_named_and_the_run_resumes(
    whole: TrainConfig, store: ActivationStore, make_store: MakeStore, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    """Stopped by a signal, it is there, and says nothing; or its disk never answers. All at once: each has to wait."""
    compute = GRID.model_copy(update={"patience_s": PATIENCE_S})
    runs = [whole.model_copy(update={"out": tmp_path / f"{i}_hangs", "compute": compute}) for i in range(2)]
    both = [Processes(start_process, [[run], [run]], 2, tmp_path / f"said_{i}") for i, run in enumerate(runs)]
    for hangs, processes in enumerate(both):
        wait_for(runs[hangs].out, 15, processes)
        os.kill(processes.all[hangs].pid, signal.SIGSTOP)
    copy = make_store("copy", hook_points=(HOOK, *OTHERS))
    shard = Path(copy.path) / HOOK / "c.5.0.0"  # of the part that process 1 reads
    shard.unlink()
    os.mkfifo(shard)
    halves = ComputeConfig(data_parallel=2, patience_s=PATIENCE_S)
    mine = config_of(store, tmp_path / "dead", compute=halves)
    dead = Processes(start_process, [[mine], [mine.model_copy(update={"store": copy.path})]], 1, tmp_path / "said_dead")
    for hangs, processes in enumerate(both):
        processes.all[1 - hangs].join(120)
        assert processes.all[1 - hangs].exitcode == 1
        said = processes.said(1 - hangs)
        assert f"process {1 - hangs} of 2: expected all processes to go on, got process {hangs} hangs: no word" in said
        assert "the run resumes from its last checkpoint" in said
        assert processes.all[hangs].is_alive()
        os.kill(processes.all[hangs].pid, signal.SIGCONT)
    for hangs, processes in enumerate(both):
        assert processes.end()[hangs] != 0, "it finds the others gone"
        assert train(runs[hangs]).resumed_from in (10, 20, 30)
        same(runs[hangs], whole)
    assert dead.end() == [1, 1]
    for i in range(2):
        assert f"process {i} of 2: expected all processes to go on, got process 1 hangs: no" in dead.said(i)
        assert "at batch 1." in dead.said(i)


def test_a_run_moves_from_one_process_to_two_that_a_signal_to_one_stops(
    store: ActivationStore, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    whole = config_of(store, tmp_path / "whole", LONG, eval_every=1)  # JAX may take a second to hear of the signal
    moved = whole.model_copy(update={"out": tmp_path / "moved"})
    alone = start_process(run, [moved], {}, tmp_path / "said_alone")
    while logged(moved.out) < 5:
        time.sleep(0.01)
    alone.kill()
    alone.join()
    train(whole)
    two = moved.model_copy(update={"compute": GRID})
    processes = Processes(start_process, [[two], [two]], 2, tmp_path / "first")
    wait_for(moved.out, 10, processes)
    os.kill(processes.all[1].pid, signal.SIGINT)  # which becomes the SIGTERM that JAX hears
    assert processes.end() == [1, 1]
    stops = [next(line for line in processes.said(i).splitlines() if "a stop after" in line) for i in range(2)]
    assert stops[0] == stops[1]
    stopped = int(stops[0].partition("a stop after ")[2].partition(".")[0])
    assert train(moved).resumed_from == stopped, "all kept the same step"
    same(moved, whole)


def test_processes_that_were_told_different_things_say_so(
    store: ActivationStore, make_store: MakeStore, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    mine = config_of(store, tmp_path / "out", compute=ComputeConfig(data_parallel=2))
    other = make_store("other", hook_points=(HOOK, *OTHERS), seed=1)
    for changes, named in (({"lr": 0.02}, "lr=0.01"), ({"store": other.path}, "store=")):
        theirs = mine.model_copy(update=changes)
        processes = Processes(start_process, [[mine], [theirs]], 1, tmp_path / named)
        assert processes.end() == [1, 1]
        for i in range(2):
            said = processes.said(i)
            assert f"process 1 of 2: expected what process 0 has: {named}" in said
    assert not mine.out.exists()


def test_slurm_starts_processes_that_have_copies_of_the_store(
    store: ActivationStore, make_store: MakeStore, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    """And a process that fails alone says why; the others repeat it."""
    copy = make_store("copy", hook_points=(HOOK, *OTHERS))
    mine = config_of(store, tmp_path / "out", compute=ComputeConfig(data_parallel=2))
    theirs = mine.model_copy(update={"store": copy.path})
    processes = Processes(start_process, [[mine], [theirs]], 1, tmp_path, slurm)
    assert processes.end() == [0, 0], processes.said(0) + processes.said(1)
    assert saved(mine.out).d_sae == 48
    lost = mine.model_copy(update={"store": tmp_path / "nowhere"})
    processes = Processes(start_process, [[mine], [lost]], 1, tmp_path / "lost")
    assert processes.end() == [1, 1]
    assert "got the end of one:" in processes.said(0)
    assert "nowhere" in processes.said(0)


def run_interrupted(configs: list[TrainConfig], environment: dict[str, str], said: Path) -> None:
    """As `run`; Ctrl-C reaches process 1 before its first step, where nothing waits for one that it could end after."""

    def interrupted(*arguments: Any) -> Any:
        if jax.process_index() == 1:
            raise KeyboardInterrupt
        return step.create(*arguments)

    sae.train.create = interrupted
    run(configs, environment, said)


def test_ctrl_c_at_the_start_of_one_ends_the_others(
    store: ActivationStore, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    config = config_of(store, tmp_path / "out", compute=ComputeConfig(data_parallel=2))
    processes = Processes(start_process, [[config], [config]], 1, tmp_path / "said", run=run_interrupted)
    assert processes.end() == [1, 1]
    assert "process 0 of 2: expected all processes to go on, got the end of one: KeyboardInterrupt" in processes.said(0)


def run_cut_off(configs: list[TrainConfig], environment: dict[str, str], said: Path) -> None:
    """As `run`; the port on which process 0 waits for the others is closed to them."""
    sae.hosts.call = lambda address, key, number: call((address[0], 1), key, number)
    run(configs, environment, said)


def test_a_port_that_is_closed_between_hosts_is_one_line(
    store: ActivationStore, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    config = config_of(store, tmp_path / "out", compute=ComputeConfig(data_parallel=2))
    processes = Processes(start_process, [[config], [config]], 1, tmp_path / "said", run=run_cut_off)
    processes.all[1].join(120)
    processes.all[0].kill()  # it would wait for five minutes
    assert processes.all[1].exitcode == 1
    assert "got no line to process 0 on 127.0.0.1: [Errno 111] Connection refused" in processes.said(1)


def run_apart(configs: list[TrainConfig], environment: dict[str, str], said: Path) -> None:
    """As `run`; each process is in a folder of its own, as hosts have that share none."""
    os.chdir(said.with_name(f"host_{environment['JAX_PROCESS_ID']}"))
    run(configs, environment, said)


def test_hosts_that_do_not_share_out_say_so_whatever_an_earlier_run_left_there(
    store: ActivationStore, tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    config = config_of(store, Path("out"), compute=ComputeConfig(data_parallel=2))
    for i in range(2):
        checkpoints = tmp_path / f"host_{i}" / "out" / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / "shared").write_text("an earlier run's")
    (tmp_path / "host_1" / "out" / "checkpoints" / "run.json").write_text("{}")
    processes = Processes(start_process, [[config], [config]], 1, tmp_path, run=run_apart)
    assert processes.end() == [1, 1]
    for i in range(2):
        assert "got an earlier run's. Put out on a file system that all processes share" in processes.said(i)
    assert not (tmp_path / "host_1" / "out" / "sae").exists()


def test_a_long_evaluation_gives_signs_of_work(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: list[str] = []
    monkeypatch.setattr(sae.train.hosts, "at", points.append)
    monkeypatch.setattr(sae.train.hosts, "busy", lambda: points.append("busy"))
    monkeypatch.setattr(sae.train, "EVAL_CELLS", 48 * 20)
    train(config_of(store, tmp_path, 2, eval_tokens=100))
    assert points[: points.index("step 1")] == ["reading the store", "its first weights", "batch 1"]
    last = ["step 2", "the numbers of step 2", *["busy"] * 5, "the checkpoint of step 2"]
    assert points[points.index("step 2") :] == [*last, f"saving {tmp_path / 'sae'}", *["busy"] * 5]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "no JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"}, "no JAX_NUM_PROCESSES"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "got a:1, 2, 2"),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "a:65536", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "12345", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "1"}, "HOST:PORT"),
    ],
)
def test_variables_that_are_wrong(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(environment)


def test_variables_that_say_there_is_one_process() -> None:
    one = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    assert place(one) is None
    assert place({}) is None
    assert place(one | {"JAX_NUM_PROCESSES": "3"}) == Place("a:1", 3, 0)


def test_a_ring_has_one_trainer(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(store, tmp_path)
    _check_alone(config)
    monkeypatch.setattr("sae.hosts.several", lambda: True)
    with pytest.raises(ConfigError, match="expected a whole store, got a ring, with several processes"):
        _check_alone(config)

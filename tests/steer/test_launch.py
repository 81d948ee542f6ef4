"""`saekit train --ray`: what it says without Ray, and real processes through a real Ray of two nodes."""

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from activations.errors import ConfigError, WorkerError
from activations.ray_pool import connected
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from steer import launch as launch_module
from steer.cli import app
from steer.launch import launch, share
from tests.sae.conftest import make_store

__all__ = ["make_store"]
NODE = {"CPU": 64.0, "GPU": 8.0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
        made.add_node(num_cpus=1, num_gpus=0)
        yield f"127.0.0.1:{str(made.address).rpartition(':')[2]}"
        made.shutdown()


@pytest.fixture
def words(make_store: Callable[..., ActivationStore], tmp_path: Path) -> list[str]:
    settings = {
        "store": make_store().path,
        "out": tmp_path / "run",
        "hook_points": "[resid_post.1]",
        "train_tokens": 640,
        "batch_size": 64,
        "holdout_fraction": 0.2,
        "sae.d_sae": 48,
        "sae.k": 4,
        "compute.data_parallel": 4,
    }
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Run pip install 'saekit\[ray\]'"):
        launch([], "local")


def test_a_process_a_node_with_all_its_gpus_unless_told_otherwise() -> None:
    assert share([NODE, NODE, {"CPU": 4.0}], None, None, 1.0) == (2, 8)
    assert share([{"CPU": 4.0}, {"CPU": 4.0}], None, None, 1.0) == (2, 0)
    assert share([NODE, NODE], 16, None, 1.0) == (16, 1)
    assert share([NODE], None, 0, 1.0) == (1, 0)
    with pytest.raises(ConfigError, match="expected room for 3 processes of 8 GPUs, got room for 2"):
        share([NODE, NODE], 3, 8, 1.0)
    with pytest.raises(ConfigError, match="expected room for 3 processes of 2 CPUs, got room for 2"):
        share([{"CPU": 3.0}, {"CPU": 2.0}], 3, 0, 2.0)


def test_numbers_of_processes_need_ray() -> None:
    result = CliRunner().invoke(app, ["train", "--ray-gpus", "0"])
    assert result.exit_code == 2
    assert "need --ray or" in result.output


def test_processes_that_ray_starts_train_together(cluster: str, words: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", *words, "--ray-address", cluster, "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout[result.stdout.index("{") :])
    assert shown["steps"] == 10
    saved = SaeArtefact.load(tmp_path / "run" / "sae")
    assert saved.d_sae == 48
    assert shown["saes"]["resid_post.1"]["fvu"] == saved.metadata["metrics"]["fvu"]


def test_a_process_that_hangs_is_ended(
    cluster: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_module, "END_S", 1.0)
    long = ["--set", "train_tokens=64000000", "--set", "compute.patience_s=60"]
    stopper = threading.Thread(target=stop_at_first_row, args=(tmp_path / "run",))
    stopper.start()
    with pytest.raises(WorkerError, match=f"got exit codes 1, {-signal.SIGKILL}"):
        launch([*words, *long], cluster)
    stopper.join()


def test_a_process_whose_node_is_gone_is_one_that_was_killed(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Ctrl-C comes, which cannot reach it."""
    codes, presses = launch_module._codes, [False, True]

    def codes_or_ctrl_c(*arguments: Any) -> list[int]:
        if presses.pop(0):
            raise KeyboardInterrupt
        return codes(*arguments)

    with connected(cluster):
        import ray

        lost: Any = ray.remote(num_cpus=1)(launch_module.Process).remote()
        end = lost.train.remote(["--help"], ".", {})
        ray.kill(lost)
        monkeypatch.setattr(launch_module, "_codes", codes_or_ctrl_c)
        for _ in range(2):
            presses.append(False)
            with pytest.raises(WorkerError, match=f"got exit codes {-signal.SIGKILL}"):
                launch_module._result([lost], [end])
        assert presses == [False]


def test_the_port_stays_free_for_the_process_and_nobody_else(cluster: str) -> None:
    with connected(cluster):
        first = launch_module.Process()
        with first.port, socket.socket() as other:
            port = int(first.address().rpartition(":")[2])
            with pytest.raises(OSError, match="in use"):
                other.bind(("", port))
            socket.create_server(("", port), reuse_port=True).close()


def test_a_folder_that_a_node_has_not_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = launch_module.Process()
    with first.port:
        assert first.train([], str(tmp_path / "nowhere"), {}) == (1, "")
    assert "nowhere: expected a folder that process" in capfd.readouterr().err


def test_a_busy_cluster_is_waited_for_in_one_line(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "ROOM_S", 0.1)
    said: list[str] = []
    with connected(cluster):
        import ray

        other: Any = ray.remote(num_cpus=1)(launch_module.Process).remote()
        ray.get(other.address.remote())

        def then_make_room(line: str) -> None:
            said.append(line)
            ray.kill(other)

        with pytest.raises(WorkerError, match="got exit codes 2, 2"):
            launch(["--no-such-option"], cluster, on_status=then_make_room)
    assert said == ["waiting for the Ray cluster, which is busy, to have room for 2 processes of 1 CPUs"]


def stop_at_first_row(out: Path) -> None:
    """Stop process 1 of a run, once there is a row of its log."""
    log = out / "train.jsonl"
    while not (log.exists() and log.stat().st_size):
        threading.Event().wait(0.05)
    os.kill(process_of(out), signal.SIGSTOP)


def process_of(out: Path) -> int:
    def has(folder: Path, file: str, part: str) -> bool:
        try:
            return part.encode() in (folder / file).read_bytes().split(b"\0")
        except OSError:
            return False

    (found,) = (
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdecimal()
        and has(folder, "cmdline", f"out={out}")
        and has(folder, "environ", "JAX_PROCESS_ID=1")
    )
    return found

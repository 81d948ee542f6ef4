"""A harvest on Ray is that of one process, byte for byte, whoever is killed meanwhile.

Most run on a cluster of two nodes, which are two raylets with one CPU each; processes and nodes are killed for real.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from activations.config import HarvestConfig
from activations.errors import ConfigError, MismatchError, NumericsError, StorageError, WorkerError
from activations.harvest import CONFIG_KEY, harvest
from activations.models import load_model
from activations.ray_harvest import HarvestWorker
from activations.ray_pool import Pool, connected
from activations.storage import ATTEMPTS, FolderStorage
from activations.store import ActivationStore
from activations.store_schema import AHEAD
from activations.store_writer import StoreWriter, write_group

N_KILLS = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    # Ray asks every 3 seconds whether a machine answers, and believes the fifth time that it does not.
    asks = {"health_check_initial_delay_ms": 100, "health_check_period_ms": 200}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": asks}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def address(cluster: Any) -> str:
    """By its loopback interface; by the machine's own address tests may not connect."""
    return f"127.0.0.1:{cluster.address.rpartition(':')[2]}"


def contents(stores: Any, where: str) -> dict[str, bytes]:
    """All but the config, which names the place and Ray."""
    return {key: data for key, data in stores.contents(where).items() if key != CONFIG_KEY}


def whole(stores: Any, settings: HarvestConfig) -> dict[str, bytes]:
    """What one process makes."""
    harvest(settings)
    made = contents(stores, settings.out)
    shutil.rmtree(settings.out)
    return made


def on(settings: HarvestConfig, cluster: Any, **changes: object) -> HarvestConfig:
    return HarvestConfig.model_validate(settings.model_dump() | {"ray": address(cluster)} | changes)


def test_a_token_budget_ends_at_the_same_group(stores: Any, settings: HarvestConfig, cluster: Any) -> None:
    changes = {"store_dtype": "bfloat16", "cross_documents": True, "outlier_norm": 1.3, "max_tokens": 700}
    settings = HarvestConfig.model_validate(settings.model_dump() | changes)
    expected = whole(stores, settings)
    result = harvest(on(settings, cluster))
    assert contents(stores, settings.out) == expected
    assert result.n_tokens == ActivationStore.open(settings.out).state.tokens >= 700
    assert ActivationStore.open(settings.out).state.masked["norm_outlier"] > 0


def test_workers_killed_at_random_change_nothing(
    stores: Any, settings: HarvestConfig, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings.model_copy(update={"store_dtype": "int8"})
    expected, rng = whole(stores, settings), random.Random(0)
    alive, killed = [], []
    begin, commit = Pool.begin, StoreWriter.commit

    def remember(self: Pool, *arguments: Any) -> None:
        begin(self, *arguments, ready=lambda where: alive.append(int(where.split()[1])))

    def kill_sometimes(self: StoreWriter, *arguments: Any) -> None:
        commit(self, *arguments)
        if alive and len(killed) < N_KILLS and rng.random() < 0.5:
            killed.append(alive.pop(rng.randrange(len(alive))))
            os.kill(killed[-1], signal.SIGKILL)

    monkeypatch.setattr(Pool, "begin", remember)
    monkeypatch.setattr(StoreWriter, "commit", kill_sometimes)
    harvest(on(settings, cluster))
    assert len(set(killed)) == N_KILLS
    assert contents(stores, settings.out) == expected
    assert stores.committed(settings.out) > 80


def test_a_driver_that_is_killed_goes_on_from_its_last_commit(
    stores: Any, settings: HarvestConfig, cluster: Any, start_process: Callable[..., Any]
) -> None:
    expected = whole(stores, settings)
    process = start_process(harvest, on(settings, cluster))
    while committed(settings.out) < 20:
        process.join(0.001)
        assert process.exitcode is None
    process.kill()
    process.join()
    left = stores.committed(settings.out)
    assert 20 <= left < 80
    assert harvest(on(settings, cluster, ray_workers=1)).n_sequences > left
    assert contents(stores, settings.out) == expected


def committed(where: str) -> int:
    try:
        found = json.loads((Path(where) / "zarr.json").read_bytes())
    except FileNotFoundError:
        return -1
    return found["attributes"]["saekit_store"]["state"]["committed"]


def test_a_machine_that_is_lost_leaves_its_work_to_the_others(
    stores: Any, settings: HarvestConfig, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, commit = whole(stores, settings), StoreWriter.commit
    (node,) = cluster.worker_nodes

    def lose_it_at_tenth(self: StoreWriter, *arguments: Any) -> None:
        commit(self, *arguments)
        if self.state.committed == 20:
            cluster.remove_node(node, allow_graceful=False)

    monkeypatch.setattr(StoreWriter, "commit", lose_it_at_tenth)
    harvest(on(settings, cluster))
    cluster.add_node(num_cpus=1)
    assert contents(stores, settings.out) == expected


def test_results_that_are_lost_with_their_machine_are_made_again(cluster: Any) -> None:
    """They were there, and had not come over the network yet."""
    import ray

    class Worker:
        def prepare(self) -> None:
            pass

        def begin(self) -> str:
            return ""

        def run(self, item: int) -> bytes:
            return bytes([item]) * 1_000_000

    (node,), begun = cluster.worker_nodes, []
    with connected(address(cluster)), Pool(Worker, (), 2, "auto") as pool:
        pool.begin(ready=begun.append)
        while len(begun) < 2:
            pool.wait()
        for item in range(2):
            pool.submit(item)
        ray.wait(list(pool._tasks), num_returns=2, fetch_local=False)
        cluster.remove_node(node, allow_graceful=False)
        found = list(pool.map([2, 3]))
        cluster.add_node(num_cpus=1)
    assert [(len(each), each[0]) for each in found] == [(1_000_000, item) for item in range(4)]


def test_a_bucket_on_a_ray_of_its_own(stores: Any, settings: HarvestConfig, bucket: Callable[[], str]) -> None:
    one, many = (settings.model_copy(update={"out": f"{bucket()}/store", "max_tokens": 500}) for _ in range(2))
    harvest(one)
    harvest(many.model_copy(update={"ray": "local", "ray_workers": 2}))
    objects = [{k: v for k, v in contents(stores, c.out).items() if k != "zarr.json"} for c in (one, many)]
    assert objects[0] == objects[1]  # the group's metadata name their writer
    assert ActivationStore.open(one.out).fingerprint == ActivationStore.open(many.out).fingerprint


def test_errors_of_workers_and_settings(
    settings: HarvestConfig, cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    broken = load_model(str(tiny_llama), dtype="float32")
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[broken.tokenizer("and")["input_ids"][-1]] = float("nan")
    shutil.copytree(tiny_llama, tmp_path / "broken")
    broken.model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NumericsError, match=r"resid_pre.1 in document 0, position \d+.*NaN"):
        harvest(on(settings, cluster, model=str(tmp_path / "broken"), ray_workers=1))
    with pytest.raises(ConfigError, match="ray with keep_tokens: expected one of the two"):
        harvest(on(settings, cluster, keep_tokens=100_000))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense", "ray://127.0.0.1:9"])
def test_a_cluster_that_is_not_there(address: str) -> None:
    with pytest.raises(WorkerError, match="Start one with: ray start --head"), connected(address):
        pass


def test_a_worker_that_is_not_like_the_others(settings: HarvestConfig, tmp_path: Path) -> None:
    worker, mark = HarvestWorker(settings, str(tmp_path / "nowhere")), f"{ATTEMPTS}/mark"
    meta, _ = worker.describe()
    with pytest.raises(StorageError, match="one place that all machines share, got another folder for process"):
        worker.begin(meta, mark)
    FolderStorage(settings.out).write(mark, b"")
    with pytest.raises(MismatchError, match=r"worker, process \d+ on .*: expected bfloat16, got float32"):
        worker.begin(meta.model_copy(update={"compute_dtype": "bfloat16"}), mark)
    assert worker.begin(meta, mark).startswith(f"process {os.getpid()} on ")


def test_what_a_worker_writes_late_or_leaves(stores: Any, tmp_path: Path) -> None:
    where, meta = tmp_path / "s", stores.make(tmp_path / "s", groups=2)
    expected = stores.contents(where)
    group, _ = stores.group(meta, 5, ActivationStore.open(where).state)
    storage = FolderStorage(str(where))
    with pytest.raises(MismatchError, match="another writer has taken over"):
        write_group(storage, meta, group, stores.rows)  # which is committed
    assert stores.contents(where) == expected
    write_group(storage, meta, group, (2 + AHEAD - 1) * stores.rows)
    (where / ATTEMPTS / "killed").mkdir()
    (where / ATTEMPTS / "killed" / "0").write_bytes(b"half")
    with StoreWriter.open(where, meta) as writer:
        writer.finish(complete=True)
    assert stores.contents(where) == expected
    assert not (where / ATTEMPTS).exists()

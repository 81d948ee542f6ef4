"""What a crash, a full disk, a damaged file or another writer leaves of an activation store.

Processes are killed for real.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from activations import storage as storage_module
from activations.config import HarvestConfig
from activations.errors import MismatchError, StorageError
from activations.harvest import harvest
from activations.models import LoadedModel
from activations.storage import LOCK_KEY, FolderStorage, open_storage
from activations.store import ActivationStore
from activations.store_schema import layout, object_keys
from activations.store_writer import StoreWriter

HOOKS = ("resid_pre.1", "resid_post.2")
N_KILLS = 20


@pytest.fixture(scope="module")
def start(start_process: Callable[..., Any]) -> Callable[..., Any]:
    """Start a process that harvests."""
    return partial(start_process, harvest)


def uninterrupted(stores: Any, settings: HarvestConfig, start: Callable[..., Any]) -> tuple[dict[str, bytes], str]:
    """What a run that is left alone makes: its files, which name their place, and its fingerprint."""
    process = start(settings)
    process.join()
    assert process.exitcode == 0
    made = stores.contents(settings.out), ActivationStore.open(settings.out).fingerprint
    shutil.rmtree(settings.out)
    return made


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def test_a_process_killed_at_any_instant_loses_nothing(
    stores: Any, settings: HarvestConfig, start: Callable[..., Any]
) -> None:
    whole, fingerprint = uninterrupted(stores, settings, start)
    folder, rng, found, kills = Path(settings.out), random.Random(0), [-1], []
    while len(kills) < N_KILLS:
        process, before = start(settings), touched(folder / LOCK_KEY)
        if len(kills) % 3 == 0:  # while the store is made, or taken up again, which begins with the lock
            while not has_ended(process) and touched(folder / LOCK_KEY) == before:
                time.sleep(0.0005)
        else:
            goal = max(found[-1], 0) + rng.randrange(2, 12)
            while not has_ended(process) and committed(folder) < goal:
                time.sleep(0.0005)
        process.join(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        found.append(stores.committed(folder))
        assert found == sorted(found)
        kills.append(found[-1])
        if process.exitcode == 0:
            shutil.rmtree(folder)
            found = [-1]
    assert len(set(kills)) > N_KILLS // 2, kills
    process = start(settings)
    process.join()
    assert process.exitcode == 0
    assert stores.contents(folder) == whole
    assert ActivationStore.open(folder).fingerprint == fingerprint


def committed(folder: Path) -> int:
    """What a commit says that is there; looks at it often, so nothing is checked."""
    try:
        return json.loads((folder / "zarr.json").read_bytes())["attributes"]["saekit_store"]["state"]["committed"]
    except FileNotFoundError:
        return -1


def has_ended(process: Any) -> bool:
    assert process.exitcode in (None, 0)
    return process.exitcode == 0


def touched(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


class Crash(BaseException):
    """Stands for the end of the process."""


STEPS = ((os, "fsync"), (storage_module, "_write_file"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"))


@contextmanager
def crashing_at(step: int) -> Iterator[list[int]]:
    """The `step`-th change of the disk from here, and each after it, fails; a write of data that fails writes half."""
    steps = [0]

    def counted(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            steps[0] += 1
            if steps[0] > step:
                if steps[0] == step + 1 and name == "_write_file":
                    call(args[0], args[1][: len(args[1]) // 2])
                raise Crash
            return call(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STEPS:
            patch.setattr(owner, name, counted(getattr(owner, name), name))
        yield steps


def test_a_crash_at_every_single_step(stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, step by step instead of at random, with half-written files."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # takes most of the time, and another test looks at it
    few = {"hook_points": stores.hooks[:1], "store_dtype": "float32"}
    stores.make(tmp_path / "whole", groups=2, **few)
    whole = stores.contents(tmp_path / "whole")
    with crashing_at(10**9) as steps:
        stores.make(tmp_path / "counted", groups=2, **few)
    assert steps[0] > 50
    committed = []
    for step in range(steps[0]):
        where = tmp_path / str(step)
        with pytest.raises(Crash), crashing_at(step):
            stores.make(where, groups=2, **few)
        committed.append(stores.committed(where))
        stores.make(where, groups=2, **few)
        assert stores.contents(where) == whole, step
        shutil.rmtree(where)
    assert set(committed) == {-1, 0, stores.rows, 2 * stores.rows}
    assert committed == sorted(committed)


def test_shards_are_on_disk_before_the_one_replacement_that_commits(
    stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = stores.make(tmp_path / "s", groups=1)
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def named(path: str | Path) -> str:
        return os.path.relpath(path, tmp_path / "s")

    def record_fsync(handle: int) -> None:
        events.append(("fsync", named(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def record_replace(self: Path, target: Path) -> Path:
        events.append(("replace", named(target)))
        return replace(self, target)

    with StoreWriter.open(tmp_path / "s", meta) as writer:
        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(Path, "replace", record_replace)
        writer.append(*stores.group(meta, 1, writer.state))
        monkeypatch.undo()
    at = events.index(("replace", "zarr.json"))
    before, after = events[:at], events[at + 1 :]
    assert [event for event in events if event[0] == "replace"] == [("replace", "zarr.json")]
    assert before[-1] == ("fsync", ".zarr.json.new")
    assert after == [("fsync", ".")]
    flushed = [path for _, path in before]
    for name, array in layout(meta).items():
        (key,) = object_keys(name, array, stores.rows, 2 * stores.rows)
        # A file survives a power cut if it, and the folders that name it, are on disk.
        chain = [key, *(str(folder) for folder in Path(key).parents)]
        assert [flushed.index(part) for part in chain] == sorted(flushed.index(part) for part in chain)


def test_a_group_that_fails_takes_the_next_one_with_it(
    stores: Any, settings: HarvestConfig, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a group is written, the next is computed; it must not end up in the place of the one that failed."""
    harvest(settings, tiny)
    whole = stores.contents(Path(settings.out))
    shutil.rmtree(settings.out)
    write, calls = FolderStorage.write_all, []

    def fail_once(self: FolderStorage, objects: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            time.sleep(0.3)  # until the next group waits for its turn
            raise StorageError(self.where, expected="a disk", got="a hiccup", fix="Try again.")
        write(self, objects)

    monkeypatch.setattr(FolderStorage, "write_all", fail_once)
    with pytest.raises(StorageError, match="hiccup"):
        harvest(settings, tiny)
    assert stores.committed(settings.out) == 4
    harvest(settings, tiny)
    assert stores.contents(Path(settings.out)) == whole


FULL_DISK = """
import resource, subprocess, sys, json, shutil
from pathlib import Path
from activations.store import ActivationStore
from activations.store_writer import StoreWriter
from steer import cli

mechanism, disk, config, result = sys.argv[1:]
filler, append, calls = Path(disk) / "filler", StoreWriter.append, []
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
if mechanism == "tmpfs":
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)

def fill():
    if mechanism != "tmpfs":
        return resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        with filler.open("wb", buffering=0) as file:
            while file.write(bytes(1000)):
                pass
    except OSError:
        pass

def room():
    if mechanism != "tmpfs":
        return resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    filler.unlink()

def fill_at_sixth(*arguments):
    calls.append(1)
    if len(calls) == 6:
        fill()
    return append(*arguments)

def run():
    sys.argv = ["saekit", "harvest", config]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0

StoreWriter.append = fill_at_sixth
codes = [run()]
StoreWriter.append = append
room()
store = ActivationStore.open(Path(disk) / "store")
damage = [str(damage) for _, damage in store.verify() if damage]
print(json.dumps({"committed": store.n_sequences, "damage": damage}), flush=True)
codes.append(run())
shutil.copytree(Path(disk) / "store", result)
print(json.dumps(codes))
"""


def full_disk() -> tuple[str, list[str]]:
    """How to fill a disk here: a small one of our own where the kernel lets us mount it, else a limit on file sizes."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    mounts = [*inside, "mount", "-t", "tmpfs", "none", "/mnt"]
    if shutil.which("unshare") and subprocess.run(mounts, capture_output=True).returncode == 0:
        return "tmpfs", inside
    return "rlimit", []


def test_a_full_disk_is_one_line_and_room_makes_it_go_on(
    stores: Any,
    settings: HarvestConfig,
    start: Callable[..., Any],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = settings.model_copy(update={"out": str(disk / "store")})
    whole, _ = uninterrupted(stores, settings, start)
    settings.save(tmp_path / "harvest.yaml")
    mechanism, inside = full_disk()
    record_property("full disk", mechanism)
    print(f"the disk is filled by {mechanism}")  # noqa: T201
    arguments = [mechanism, str(disk), str(tmp_path / "harvest.yaml"), str(tmp_path / "result")]
    command = [*inside, sys.executable, "-c", FULL_DISK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert json.loads(lines[-1]) == [1, 0], done.stderr
    assert {"committed": 10, "damage": []} in [json.loads(line) for line in lines if line.startswith('{"committed"')]
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("saekit:")]
    assert f"{disk / 'store'}: expected room to write, got " in said
    assert "Make room, then run the same command again" in said
    assert "Traceback" not in done.stderr
    assert stores.contents(tmp_path / "result") == whole


def test_a_second_process_gets_in_once_the_first_was_killed(
    stores: Any, settings: HarvestConfig, start: Callable[..., Any], tiny: LoadedModel
) -> None:
    first = start(settings)
    wait_until(lambda: is_there(settings.out) or not first.is_alive())
    os.kill(first.pid, signal.SIGSTOP)  # so that it holds the lock for as long as this test looks
    try:
        with pytest.raises(MismatchError, match="no other writer, got a harvest that is writing it"):
            harvest(settings, tiny)
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    left = stores.committed(settings.out)
    assert harvest(settings, tiny).n_sequences > left


def is_there(where: str) -> bool:
    return open_storage(where).read("zarr.json") is not None

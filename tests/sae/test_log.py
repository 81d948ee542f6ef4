"""The log of a run: what a crash leaves of it, and that Weights & Biases gets the same and can do no harm."""

import json
import os
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.config import LogConfig, TrainConfig
from sae.log import read_log, run_log
from sae.metrics import density_histogram

ONE, TWO = ("resid_post.1",), ("resid_post.1", "resid_mid.2->mlp_out.2")
HISTOGRAM = density_histogram(np.array([0, 0, 1e-6, 0.5, 1]))


def config_for(out: Path, wandb: str = "disabled", hook_points: tuple[str, ...] = ONE) -> TrainConfig:
    return TrainConfig(out=out, hook_points=hook_points, log=LogConfig.model_validate({"wandb": wandb}))


def row(step: int, hook_point: str = ONE[0], **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 64 * step, "hook_point": hook_point, "fvu": 1 / step, "tok_s": 5.0, **more}


def write(config: TrainConfig, *steps: int, resumed_from: int = 0) -> None:
    with run_log(config, resumed_from) as log:
        for step in steps:
            for hook_point in config.hook_points:
                log(row(step, hook_point))


def test_a_row_is_on_disk_once_it_is_written(tmp_path: Path) -> None:
    with run_log(config_for(tmp_path), 0) as log:
        for step in (1, 2):
            log(row(step, holdout_density_histogram=HISTOGRAM))
            assert read_log(tmp_path / "train.jsonl")[-1] == row(step, holdout_density_histogram=HISTOGRAM)


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    stopped, whole = (config_for(tmp_path / name, hook_points=TWO) for name in ("stopped", "whole"))
    for config in (stopped, whole):
        config.out.mkdir()
    write(whole, 10, 20, 30, 40)
    write(stopped, 10, 20, 30)
    with open(stopped.out / "train.jsonl", "a") as file:
        file.write('{"step": 4')
    write(stopped, 30, 40, resumed_from=20)
    assert (stopped.out / "train.jsonl").read_bytes() == (whole.out / "train.jsonl").read_bytes()


def test_a_crash_while_rows_are_dropped_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(config_for(tmp_path), 10, 20, 30)
    before = (tmp_path / "train.jsonl").read_bytes()

    def crash(_: int) -> None:
        raise OSError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(OSError, match="the power is gone"):
            write(config_for(tmp_path), 20, resumed_from=10)
    assert (tmp_path / "train.jsonl").read_bytes() == before
    write(config_for(tmp_path), 20, resumed_from=10)
    assert [kept["step"] for kept in read_log(tmp_path / "train.jsonl")] == [10, 20]


def test_damaged_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\xff\xfe\n[1]\n{"loss": 2}\n{"step": 2}\n{"step": 3, "lo')
    assert read_log(path) == [{"step": 1}, {"step": 2}]
    assert read_log(tmp_path / "absent.jsonl") == []


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with run_log(config_for(tmp_path), 0) as log:
        log(row(1, loss=float("nan"), eta_s=float("inf"), grad_norm=np.float64("-inf")))

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    written = json.loads((tmp_path / "train.jsonl").read_text(), parse_constant=refuse)
    assert written == row(1, loss=None, eta_s=None, grad_norm=None)


def test_wandb_is_imported_only_when_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    write(config_for(tmp_path), 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl"]


class FakeRun:
    """A tracker's run that remembers what it was given, and whose service goes away behind step `until`."""

    def __init__(self, has: int = 0, until: float = np.inf):
        self.url, self.step, self.until = "https://tracker.example/run", has, until
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.exit_code: int | None = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.append((step, metrics))
        if step > self.until:
            raise ConnectionError("the service is away.\nTry later.")

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code
        if np.isfinite(self.until):
            raise ConnectionError("the service is still away")


class FakeWandb(types.ModuleType):
    """Stands for the package."""

    Settings = dict

    def __init__(self) -> None:
        super().__init__("wandb")
        self.run: FakeRun | Exception = FakeRun()
        self.started: list[dict[str, Any]] = []

    def init(self, **arguments: Any) -> FakeRun:
        self.started.append(arguments)
        if isinstance(self.run, Exception):
            raise self.run
        return self.run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_metrics_have_plain_names_with_one_hook_point(tmp_path: Path, fake: FakeWandb) -> None:
    write(config_for(tmp_path, "online"), 10)
    assert isinstance(fake.run, FakeRun)
    assert fake.run.logged == [(10, {"tokens": 640, "fvu": 0.1, "tok_s": 5.0})]


def test_metrics_name_their_hook_point_if_there_are_several(tmp_path: Path, fake: FakeWandb) -> None:
    write(config_for(tmp_path, "online", TWO), 10)
    assert isinstance(fake.run, FakeRun)
    assert fake.run.logged == [(10, {"tokens": 640, f"{name}/fvu": 0.1, "tok_s": 5.0}) for name in TWO]


def test_a_number_that_is_not_finite_is_left_out(tmp_path: Path, fake: FakeWandb) -> None:
    with run_log(config_for(tmp_path, "online"), 0) as log:
        log(row(10, eta_s=float("inf")))
    assert isinstance(fake.run, FakeRun)
    assert "eta_s" not in fake.run.logged[0][1]


def test_where_to_look_is_said(tmp_path: Path, fake: FakeWandb, capsys: pytest.CaptureFixture[str]) -> None:
    write(config_for(tmp_path, "online"), 10)
    assert capsys.readouterr().err == "  wandb: https://tracker.example/run\n"


def test_a_service_that_cannot_start_is_said_once(
    tmp_path: Path, fake: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.run = ConnectionError("no route\nto host.")
    write(config_for(tmp_path, "online"), 10, 20)
    expected = "  wandb is off for this run: no route to host. train.jsonl has everything.\n"
    assert capsys.readouterr().err == expected
    assert len(read_log(tmp_path / "train.jsonl")) == 2


def test_a_package_that_is_absent_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    write(config_for(tmp_path, "offline"), 10, 20)
    assert capsys.readouterr().err.count("wandb is off for this run") == 1


def test_a_service_that_dies_midway_is_said_once(
    tmp_path: Path, fake: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.run = FakeRun(until=10)
    write(config_for(tmp_path, "online"), 10, 20, 30)
    assert [step for step, _ in fake.run.logged] == [10, 20]
    assert capsys.readouterr().err.count("wandb is off for this run: the service is away. Try later. train.jsonl") == 1
    assert len(read_log(tmp_path / "train.jsonl")) == 3


def test_a_run_that_fails_is_marked_so(tmp_path: Path, fake: FakeWandb) -> None:
    assert isinstance(fake.run, FakeRun)
    write(config_for(tmp_path, "online"), 10)
    assert fake.run.exit_code == 0
    with pytest.raises(FloatingPointError), run_log(config_for(tmp_path, "online"), 10):
        raise FloatingPointError
    assert fake.run.exit_code == 1


def test_a_resumed_run_goes_on_in_the_same_one(tmp_path: Path, fake: FakeWandb) -> None:
    config = config_for(tmp_path, "online")
    write(config, 10, 20)
    write(config, 30, resumed_from=20)
    write(config, 10)
    first, second, anew = (arguments["id"] for arguments in fake.started)
    assert first == second != anew
    assert [arguments["resume"] for arguments in fake.started] == ["allow"] * 3


def test_a_resumed_run_is_given_the_rows_that_it_lacks(tmp_path: Path, fake: FakeWandb) -> None:
    config = config_for(tmp_path, "online", TWO)
    write(config, 10, 20, 30, 40)
    fake.run = FakeRun(has=11)
    write(config, 40, resumed_from=30)
    assert [step for step, _ in fake.run.logged] == [20, 20, 30, 30, 40, 40]


def records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: protobufs in the log format of LevelDB, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        left = 2**15 - at % 2**15
        if left < 7:  # too short for a header: filled up
            at += left
            continue
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def history(path: Path) -> dict[int, dict[str, Any]]:
    items = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    rows = [{(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in row} for row in items]
    return {row["_step"]: row for row in rows}


def test_offline_files_hold_the_metrics_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "5ec2e7" * 8)
    config = config_for(tmp_path, "offline", TWO)
    for resumed_from in (0, 10):
        with run_log(config, resumed_from) as log:
            for step in (resumed_from + 10, resumed_from + 20):
                log(row(step, holdout_density_histogram=HISTOGRAM))
                log(row(step, TWO[1]))
    wandb.teardown()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    assert len({path.name for path in files}) == 1, "one run"
    # The second file has the rows of the first one up to the checkpoint, so that it is the whole run.
    for path, steps in zip(files, ([10, 20], [10, 20, 30]), strict=True):
        logged = history(path)
        assert list(logged) == steps
        assert logged[10][f"{TWO[0]}/fvu"] == logged[10][f"{TWO[1]}/fvu"] == 0.1
        assert logged[20]["tokens"] == 1280
        name = f"{TWO[0]}/holdout_density_histogram"
        assert logged[20][f"{name}._type"] == "histogram"
        assert logged[20][f"{name}.values"] == HISTOGRAM["counts"]
        assert logged[20][f"{name}.bins"] == [-6.25, *HISTOGRAM["log10_edges"]]
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"5ec2e7" not in path.read_bytes(), path
        assert path.suffix != ".patch"

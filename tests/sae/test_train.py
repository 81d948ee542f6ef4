"""A whole run: it learns, it resumes to the same bits, and it says what went wrong."""

import json
import signal
import sys
import types
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import CheckpointManager

from activations.errors import (
    DeviceMemoryError,
    DiskSpaceError,
    InterruptedRunError,
    MismatchError,
    NumericsError,
)
from activations.store import ActivationStore
from sae.architectures import ARCHITECTURES
from sae.artefact import SaeArtefact
from sae.config import ComputeConfig, LogConfig, SaeConfig, TrainConfig
from sae.data import held_out, holdout
from sae.jax_view import JaxSae
from sae.log import read_log
from sae.metrics import Evaluation
from sae.orthogonality import closest
from sae.run import prepare
from sae.step import create
from sae.train import TrainedSae, TrainResult, train
from sae.wiring import Wiring, side_by_side
from tests.sae.runs import BATCH, HOOK, OTHERS, WIRINGS, before_batch, short_run

STEPS = 40
MakeStore = Callable[..., ActivationStore]


@pytest.fixture
def store(make_store: MakeStore) -> ActivationStore:
    return make_store(hook_points=(HOOK, *OTHERS))


@pytest.fixture
def config(store: ActivationStore, tmp_path: Path) -> TrainConfig:
    sae = SaeConfig(architecture="topk", d_sae=48, k=4, aux_k=8)
    return short_run(store, tmp_path / "run", STEPS, sae=sae, lr=0.01, eval_every=20, checkpoint_every=15)


def with_architecture(config: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    wiring = WIRINGS[ARCHITECTURES[name].reads]
    sae = config.sae.model_copy(update={"architecture": name, "groups": (0.25, 0.75)})
    return config.model_copy(update={"sae": sae, "hook_points": (wiring,), **changes})


def only(result: TrainResult) -> TrainedSae:
    (sae,) = result.saes.values()
    return sae


def weights(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted((path / "sae").rglob("sae_weights.safetensors")))


def rows(path: Path) -> list[dict[str, Any]]:
    """Of the log, without what depends on the clock."""
    clock = ("tok_s", "eta_s")
    return [{key: row[key] for key in row if key not in clock} for row in read_log(path / "train.jsonl")]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_learns_and_saves_what_it_measured(name: str, store: ActivationStore, config: TrainConfig) -> None:
    config = with_architecture(config, name)
    result = train(config)
    log, trained = read_log(config.out / "train.jsonl"), only(result)
    assert log[-1]["holdout_fvu"] < 0.75 * log[0]["fvu"] or log[-1]["holdout_fvu"] < 0.3
    assert [row["step"] for row in log] == list(range(5, STEPS + 1, 5))
    assert result.n_steps == STEPS

    wiring = Wiring.parse(config.hook_points[0])
    kept = holdout(store, wiring.hook_points, *held_out(store, 0.2), config.eval_tokens)
    x, y = side_by_side(kept, wiring.reads), side_by_side(kept, wiring.writes)
    artefact = SaeArtefact.load(trained.path)
    sae, mean = JaxSae(artefact), np.concatenate([store.stats(name).mean for name in wiring.writes])
    evaluation, latents = Evaluation(mean, artefact.d_sae), sae.encode(jnp.asarray(x))
    evaluation.add(y, np.asarray(sae.reconstruct(jnp.asarray(x), latents)), np.asarray(latents))
    for measure, value in evaluation.summary().items():
        assert trained.metrics[measure] == pytest.approx(value, rel=1e-3), measure
        assert log[-1][f"holdout_{measure}"] == trained.metrics[measure]
    assert sum(log[-1]["holdout_density_histogram"]["counts"]) == artefact.d_sae
    np.testing.assert_allclose(np.linalg.norm(trained.artefact.W_dec, axis=1), 1, atol=1e-5)


def test_provenance_says_where_it_came_from(store: ActivationStore, config: TrainConfig) -> None:
    result = only(train(config))
    saved = json.loads((result.path / "saekit.json").read_text())
    assert saved["store"]["fingerprint"] == store.fingerprint
    assert saved["store"]["mean_norms"] == {HOOK: store.stats(HOOK).mean_norm}
    assert saved["model"] == {"id": "tiny", "fingerprint": "f00d"}
    assert TrainConfig.model_validate(saved["config"]) == config
    assert saved["metrics"]["fvu"] == result.metrics["fvu"]
    assert saved["versions"].keys() >= {"saekit", "jax"}
    assert (result.artefact.hook_point, result.artefact.sha256) == (HOOK, saved["weights_sha256"])
    assert TrainConfig.load(config.out / "config.yaml") == config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_interrupted_run_resumes_to_the_same_bits(
    name: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (with_architecture(config, name, out=tmp_path / out) for out in ("whole", "broken"))
    train(whole)

    with monkeypatch.context() as patch:
        before_batch(patch, 6, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedRunError, match="40 steps, got a stop after 7"):
            train(broken)

    def crash() -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        before_batch(patch, 27, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(broken)
    assert rows(broken.out)[-1]["step"] == 25, "rows after the checkpoint are there, and will be dropped"

    assert train(broken).resumed_from == 15
    assert weights(broken.out) == weights(whole.out)
    assert rows(broken.out) == rows(whole.out)


def test_running_again_after_the_end_changes_nothing(config: TrainConfig) -> None:
    first = train(config)
    before = weights(config.out), rows(config.out)
    again = train(config)
    assert again.resumed_from == STEPS
    assert (weights(config.out), rows(config.out)) == before
    assert only(again).metrics == only(first).metrics


def test_checkpoints_of_another_config_are_refused_with_the_difference(config: TrainConfig) -> None:
    train(config)
    changed = {"lr": 0.02, "sae": config.sae.model_copy(update={"k": 5})}
    with pytest.raises(MismatchError, match=r"lr=0\.02, sae\.k=5, got lr=0\.01, sae\.k=4"):
        train(config.model_copy(update=changed))
    train(config.model_copy(update={"log_every": 7, "checkpoint_every": 3}))


def test_checkpoints_of_another_store_are_refused(config: TrainConfig, make_store: MakeStore) -> None:
    train(config)
    with pytest.raises(MismatchError, match="store="):
        train(config.model_copy(update={"store": make_store("other", seed=1).path}))


def test_nan_stops_the_run_and_names_the_last_good_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_batch(monkeypatch, 17, lambda: {HOOK: jnp.full((BATCH, 16), jnp.nan)})
    with pytest.raises(NumericsError, match=r"resid_post.1, step 20: .*loss nan.*checkpoints/15 is good"):
        train(config)
    assert not (config.out / "sae").exists()


def test_divergence_stops_the_run(config: TrainConfig) -> None:
    with pytest.raises(NumericsError, match=r"below 1000.*there is none"):
        train(config.model_copy(update={"lr": 1e6, "warmup_fraction": 0.0}))


def test_a_full_disk_is_found_out_before_writing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(100, 100, 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskSpaceError, match="MiB free, got 0 MiB"):
        train(config)


class FailingRun:
    """Stands for a tracker whose service goes away."""

    url = "https://tracker.invalid/run"

    def __init__(self) -> None:
        self.calls = 0

    def log(self, row: dict[str, float], step: int) -> None:
        self.calls += 1
        if step > 10:
            raise ConnectionError("the service is away")

    def finish(self) -> None:
        raise ConnectionError("the service is still away")


def train_with_tracker(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, init: Callable[..., Any]) -> TrainResult:
    module: Any = types.ModuleType("wandb")
    module.init, module.Settings = init, dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    return train(config.model_copy(update={"log": LogConfig(wandb="online")}))


def test_a_tracker_that_cannot_start_is_said_once_and_not_fatal(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: Any) -> None:
        raise ConnectionError("no route to host")

    assert train_with_tracker(config, monkeypatch, init).n_steps == STEPS
    assert capsys.readouterr().err.count("wandb is off for this run: no route to host") == 1


def test_a_tracker_that_dies_midway_is_said_once_and_not_fatal(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FailingRun()
    assert train_with_tracker(config, monkeypatch, lambda **_: run).n_steps == STEPS
    assert run.calls == 3
    assert capsys.readouterr().err.count("wandb is off") == 1
    assert len(rows(config.out)) == 8


def test_several_saes_in_one_run_equal_single_runs(config: TrainConfig, tmp_path: Path) -> None:
    names = (HOOK, "resid_post.0")
    result = train(config.model_copy(update={"hook_points": names}))
    assert tuple(result.saes) == names
    for name in names:
        alone = only(train(config.model_copy(update={"hook_points": (name,), "out": tmp_path / name})))
        together = result.saes[name]
        assert together.path == config.out / "sae" / name
        assert together.artefact.sha256 == alone.artefact.sha256, "the same tokens in the same order"
        assert together.artefact.hook_point == name
    log = read_log(config.out / "train.jsonl")
    assert [(row["step"], row["hook_point"]) for row in log[:4]] == [(step, name) for step in (5, 10) for name in names]


def test_a_resumed_run_of_several_saes_ends_with_the_same_bits(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = config.model_copy(update={"hook_points": (HOOK, "resid_post.0")})
    whole, broken = (several.model_copy(update={"out": tmp_path / name}) for name in ("whole", "broken"))
    train(whole)
    with monkeypatch.context() as patch:
        before_batch(patch, 20, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedRunError):
            train(broken)
    assert train(broken).resumed_from == 21
    assert weights(broken.out) == weights(whole.out)
    assert rows(broken.out) == rows(whole.out)


def test_a_run_on_several_devices_equals_that_on_one(config: TrainConfig, tmp_path: Path) -> None:
    many = config.model_copy(
        update={"out": tmp_path / "many", "compute": ComputeConfig(data_parallel=2, latent_parallel=4)}
    )
    alone, together = only(train(config)), only(train(many))
    for name, tensor in alone.artefact.tensors().items():
        np.testing.assert_allclose(together.artefact.tensors()[name], tensor, rtol=1e-3, atol=1e-5)
    assert together.metrics["fvu"] == pytest.approx(alone.metrics["fvu"], rel=1e-4)


def test_a_run_resumes_on_other_devices(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = only(train(config))
    moved = config.model_copy(update={"out": tmp_path / "moved", "compute": ComputeConfig(latent_parallel=4)})
    with monkeypatch.context() as patch:
        before_batch(patch, 20, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(InterruptedRunError):
            train(moved)
    result = train(moved.model_copy(update={"compute": ComputeConfig(data_parallel=2)}))
    assert result.resumed_from > 15
    for name, tensor in whole.artefact.tensors().items():
        np.testing.assert_allclose(only(result).artefact.tensors()[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
def test_frozen_weights_keep_their_start(config: TrainConfig, frozen: str) -> None:
    trained = only(train(config.model_copy(update={"sae": config.sae.model_copy(update={"frozen": frozen})})))
    run = prepare(config)
    (job,) = run.jobs.values()
    start = create(config, job.plan).to_artefact(job.plan.scaling, {})
    tensors = {"encoder": "W_enc", "decoder": "W_dec"}
    for side, tensor in tensors.items():
        is_equal = np.array_equal(getattr(trained.artefact, tensor), getattr(start, tensor))
        assert is_equal == (side == frozen), tensor


def test_orthogonality_parts_decoder_rows(config: TrainConfig, tmp_path: Path) -> None:
    def alike(weight: float) -> float:
        sae = config.sae.model_copy(update={"orthogonality": weight, "orthogonality_every": 1})
        trained = only(train(config.model_copy(update={"sae": sae, "out": tmp_path / f"{weight}"})))
        return float(closest(jnp.asarray(trained.artefact.W_dec)))

    assert alike(0.25) < 0.9 * alike(0.0)


def test_finetuning_starts_where_the_other_run_ended(config: TrainConfig, tmp_path: Path) -> None:
    first = only(train(config))
    again = config.model_copy(update={"finetune": first.path, "out": tmp_path / "again", "lr": 1e-9})
    second = only(train(again))
    np.testing.assert_allclose(second.artefact.W_enc, first.artefact.W_enc, atol=1e-5)
    np.testing.assert_allclose(second.artefact.b_dec, first.artefact.b_dec, rtol=1e-4, atol=1e-5)
    assert second.metrics["fvu"] == pytest.approx(first.metrics["fvu"], rel=1e-3)
    assert read_log(again.out / "train.jsonl")[0]["fvu"] < 0.8 * read_log(config.out / "train.jsonl")[0]["fvu"]


def test_a_device_without_memory_says_what_to_lower(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted() -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 80 GiB.")

    before_batch(monkeypatch, 17, exhausted)
    with pytest.raises(DeviceMemoryError, match=r"Lower batch_size, sae\.d_sae"):
        train(config)
    assert (config.out / "checkpoints" / "15").exists()


def test_checkpoints_are_kept_as_many_as_asked_for(config: TrainConfig) -> None:
    train(config.model_copy(update={"checkpoint_every": 5, "keep_checkpoints": 3}))
    kept = sorted(int(path.name) for path in (config.out / "checkpoints").iterdir() if path.is_dir())
    assert kept == [30, 35, 40]


def test_a_disk_that_fills_up_meanwhile_is_said_and_the_run_resumes(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check beforehand is not enough: the disk fills while a checkpoint is being written."""
    whole = config.model_copy(update={"out": tmp_path / "whole"})
    train(whole)
    save = CheckpointManager.save

    def full(self: CheckpointManager, step: int, *args: Any, **kwargs: Any) -> bool:
        if step == 30:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing file: No space left on device")
        return save(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "save", full)
        with pytest.raises(DiskSpaceError, match=r"a checkpoint to be written, got .*No space left.*resumes"):
            train(config)
    assert train(config).resumed_from == 15
    assert weights(config.out) == weights(whole.out)

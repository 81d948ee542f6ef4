"""A whole run: it learns, it resumes to the same bits, and it refuses what cannot work before writing."""

import json
import signal
import subprocess
import sys
import types
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from activations.errors import (
    ConfigError,
    DiskSpaceError,
    HookPointError,
    InterruptedRunError,
    MismatchError,
    MissingArtefactError,
    NumericsError,
    SaekitError,
    ShapeError,
    UnknownNameError,
)
from activations.store import ActivationStore
from sae.architectures import ARCHITECTURES
from sae.artefact import SaeArtefact
from sae.config import LogConfig, SaeConfig, TrainConfig
from sae.data import TokenOrder, held_out, holdout
from sae.log import read_log
from sae.metrics import Evaluation
from sae.train import TrainResult, train

HOOK = "resid_post.1"
STEPS, BATCH = 40, 64
MakeStore = Callable[..., ActivationStore]


@pytest.fixture
def store(make_store: MakeStore) -> ActivationStore:
    return make_store()


@pytest.fixture
def config(store: ActivationStore, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        store=store.path,
        hook_point=HOOK,
        out=tmp_path / "run",
        sae=SaeConfig(d_sae=48, k=4, aux_k=8),
        train_tokens=STEPS * BATCH,
        batch_size=BATCH,
        lr=0.01,
        holdout_fraction=0.2,
        eval_every=20,
        log_every=5,
        checkpoint_every=15,
    )


def weights(path: Path) -> bytes:
    return (path / "sae" / "sae_weights.safetensors").read_bytes()


def rows(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "tok_s"} for row in read_log(path / "train.jsonl")]


def before_batch(monkeypatch: pytest.MonkeyPatch, at: int, do: Callable[[], Any]) -> None:
    """Do something just before batch `at` is read."""
    read = TokenOrder.batch

    def batch(self: TokenOrder, i: int) -> np.ndarray:
        replaced = do() if i == at else None
        return read(self, i) if replaced is None else replaced

    monkeypatch.setattr(TokenOrder, "batch", batch)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_learns_and_saves_what_it_measured(name: str, store: ActivationStore, config: TrainConfig) -> None:
    config = config.model_copy(update={"sae": config.sae.model_copy(update={"architecture": name})})
    result = train(config)
    log = read_log(config.out / "train.jsonl")
    assert log[-1]["holdout_fvu"] < 0.75 * log[0]["fvu"]
    assert [row["step"] for row in log] == list(range(5, STEPS + 1, 5))
    assert result.n_steps == STEPS

    x = holdout(store, HOOK, *held_out(store, 0.2), config.eval_tokens)
    sae = ARCHITECTURES[name].from_artefact(SaeArtefact.load(result.path))
    evaluation = Evaluation(store.stats(HOOK).mean, 48)
    latents = sae.encode(jnp.asarray(x))
    evaluation.add(x, np.asarray(sae.decode(latents)), np.asarray(latents))
    for measure, value in evaluation.summary().items():
        assert result.metrics[measure] == pytest.approx(value, rel=1e-3), measure
        assert log[-1][f"holdout_{measure}"] == result.metrics[measure]
    np.testing.assert_allclose(np.linalg.norm(result.artefact.W_dec, axis=1), 1, atol=1e-6)


def test_provenance_says_where_it_came_from(store: ActivationStore, config: TrainConfig) -> None:
    result = train(config)
    saved = json.loads((result.path / "saekit.json").read_text())
    assert saved["store"]["fingerprint"] == store.fingerprint
    assert saved["store"]["mean_norm"] == store.stats(HOOK).mean_norm
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
    sae = config.sae.model_copy(update={"architecture": name})
    whole, broken = (config.model_copy(update={"sae": sae, "out": tmp_path / out}) for out in ("whole", "broken"))
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
    assert again.metrics == first.metrics


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
    before_batch(monkeypatch, 17, lambda: np.full((BATCH, 16), np.nan, np.float32))
    with pytest.raises(NumericsError, match=r"step 20: .*loss nan.*checkpoints/15 is good"):
        train(config)
    assert not (config.out / "sae").exists()


def test_divergence_stops_the_run(config: TrainConfig) -> None:
    with pytest.raises(NumericsError, match=r"below 1000.*there is none"):
        train(config.model_copy(update={"lr": 1e6, "warmup_fraction": 0.0}))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"store": Path("nowhere")}, MissingArtefactError, "saekit harvest"),
        ({"hook_point": "resid_post.9"}, HookPointError, "one of resid_post.1"),
        ({"batch_size": 4096, "train_tokens": 4096}, ShapeError, "at least one batch of 4096"),
        ({"sae": SaeConfig(d_sae=8, k=8)}, ConfigError, "less than d_sae=8, got 8"),
        ({"sae": SaeConfig(architecture="gated")}, UnknownNameError, "one of topk, batchtopk"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    config: TrainConfig, change: dict[str, Any], error: type[SaekitError], match: str
) -> None:
    with pytest.raises(error, match=match):
        train(config.model_copy(update=change))
    assert not config.out.exists()


def test_an_unfinished_harvest_is_refused(config: TrainConfig, make_store: MakeStore) -> None:
    store = make_store("half", complete=False)
    with pytest.raises(MismatchError, match="a finished harvest, got one that stopped after 64 sequences"):
        train(config.model_copy(update={"store": store.path}))


def test_constant_activations_are_refused(config: TrainConfig, make_store: MakeStore) -> None:
    store = make_store("flat", fill=lambda n, d, seed: np.ones((n, d), np.float32))
    with pytest.raises(NumericsError, match="variance"):
        train(config.model_copy(update={"store": store.path}))


def test_a_full_disk_is_found_out_before_writing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(100, 100, 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskSpaceError, match="MiB free, got 0 MiB"):
        train(config)


class FailingRun:
    """Stands for a tracker whose service goes away."""

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


def test_training_does_not_import_torch() -> None:
    code = "import sys, sae.train; assert 'jax' in sys.modules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""A run that cannot work is refused before anything is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.errors import (
    ConfigError,
    HookPointError,
    MismatchError,
    MissingArtefactError,
    NumericsError,
    SaekitError,
    ShapeError,
    UnknownNameError,
)
from activations.store import ActivationStore
from sae.config import ComputeConfig, SaeConfig, TrainConfig
from sae.train import train
from tests.sae.runs import HOOK, OTHERS, short_run

MakeStore = Callable[..., ActivationStore]


@pytest.fixture
def config(make_store: MakeStore, tmp_path: Path) -> TrainConfig:
    sae = SaeConfig(architecture="topk", d_sae=48, k=4, aux_k=8)
    return short_run(make_store(hook_points=(HOOK, *OTHERS)), tmp_path / "run", 10, sae=sae)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"store": Path("nowhere")}, MissingArtefactError, "saekit harvest"),
        ({"hook_points": ("resid_post.9",)}, HookPointError, "one of resid_post.1"),
        ({"hook_points": (HOOK, HOOK)}, ConfigError, "each one once"),
        ({"hook_points": (f"{HOOK}->mlp_out.1",)}, ConfigError, "one hook point, such as resid_post.12, for topk"),
        ({"finetune": Path("nowhere")}, MissingArtefactError, "nowhere"),
        ({"sae": SaeConfig(architecture="matryoshka", d_sae=48, groups=(0.5, 0.6))}, ConfigError, "add up to 1"),
        ({"batch_size": 4096, "train_tokens": 4096}, ShapeError, "at least one batch of 4096"),
        ({"sae": SaeConfig(d_sae=8, k=8)}, ConfigError, "less than d_sae=8, got 8"),
        ({"compute": ComputeConfig(latent_parallel=9)}, ConfigError, "at most the 8 cpu devices that JAX sees, got 9"),
        ({"compute": ComputeConfig(latent_parallel=5)}, ConfigError, "sae.d_sae: expected a multiple of the 5 devices"),
        ({"compute": ComputeConfig(data_parallel=6)}, ConfigError, "batch_size: expected a multiple of compute.data"),
        ({"sae": SaeConfig(architecture="relu")}, UnknownNameError, "one of standard, gated, topk, batchtopk"),
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


def test_finetuning_an_sae_of_other_widths_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    ((_, path, _),) = train(config).saes.values()
    wider = config.sae.model_copy(update={"d_sae": 50})
    changed = {"finetune": path, "sae": wider, "out": tmp_path / "wider"}
    with pytest.raises(MismatchError, match=r"= \(16, 50, 16\), got an SAE of \(16, 48, 16\)"):
        train(config.model_copy(update=changed))
    assert not (tmp_path / "wider").exists()

"""The launcher: what it says without Ray, and real processes through a real Ray of this machine."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from activations.errors import ConfigError
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from steer.launch import _check_room, launch
from tests.sae.conftest import make_store

__all__ = ["make_store"]


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install ray, on every node"):
        launch([], 2, 0, None)


def test_a_cluster_that_is_too_small() -> None:
    _check_room({"CPU": 4.0, "GPU": 16.0}, {"CPU": 2.0, "GPU": 8.0}, 2)
    with pytest.raises(ConfigError, match="expected 24 GPUs for 3 processes, got 16"):
        _check_room({"CPU": 8.0, "GPU": 16.0}, {"CPU": 2.0, "GPU": 8.0}, 3)


def test_processes_that_ray_starts_train_together(
    make_store: Callable[..., ActivationStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
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
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert launch(words, 2, 0, "local", n_cpus=0.5) == [0, 0]
    assert SaeArtefact.load(tmp_path / "run" / "sae").d_sae == 48

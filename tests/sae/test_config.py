"""The training config: documented, frozen, refusing what makes no sense."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from activations.config import Config
from activations.errors import ConfigError
from sae.config import LogConfig, SaeConfig, SweepConfig, TrainConfig


@pytest.mark.parametrize("config", [SaeConfig, SweepConfig, TrainConfig, LogConfig])
def test_every_field_is_described(config: type[Config]) -> None:
    assert all(field.description for field in config.model_fields.values())
    assert len(config.model_fields) <= 26


def test_overrides_reach_nested_keys() -> None:
    config = TrainConfig.load(None, ["sae.k=8", "sae.architecture=batchtopk", "lr=0.001", "log.wandb=offline"])
    assert (config.sae.k, config.sae.architecture, config.lr, config.log.wandb) == (8, "batchtopk", 0.001, "offline")


def test_a_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = TrainConfig(out=tmp_path, sae=SaeConfig(d_sae=64, k=4), lr=3e-4)
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sae.k=0", "sae.k"),
        ("lr=-1", "lr"),
        ("holdout_fraction=1", "holdout_fraction"),
        ("log.wandb=maybe", "log.wandb"),
        ("sae.kk=3", "sae.kk"),
    ],
)
def test_nonsense_is_refused_by_name(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        TrainConfig.load(None, [override])


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        TrainConfig().seed = 1  # type: ignore[misc]


def test_width_is_d_sae_or_the_expansion() -> None:
    assert SaeConfig(d_sae=100, expansion=7).width(10) == 100
    assert SaeConfig(expansion=2.5).width(10) == 25

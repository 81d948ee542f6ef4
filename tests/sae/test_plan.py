"""What a dry run of training says is what the run then does, and nothing is written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from activations.errors import ConfigError, HookPointError
from activations.store import ActivationStore
from sae.config import SaeConfig, TrainConfig
from sae.plan import plan
from sae.train import train

HOOK, OTHER = "resid_post.1", "mlp_out.1"


@pytest.fixture
def config(make_store: Callable[..., ActivationStore], tmp_path: Path) -> TrainConfig:
    store = make_store(hook_points=(HOOK, OTHER))
    return TrainConfig(
        store=store.path, hook_points=(f"{HOOK}->{OTHER}",), out=tmp_path / "run", train_tokens=1000, batch_size=64,
        sae=SaeConfig(architecture="skip_transcoder", d_sae=48, k=4), holdout_fraction=0.2,
    )  # fmt: skip


def test_it_is_what_the_run_then_does(config: TrainConfig) -> None:
    planned = plan(config)
    assert planned is not None
    (sae,) = planned.saes.values()
    assert (planned.n_steps, planned.tokens) == (15, 960)
    assert (sae.d_in, sae.d_sae, sae.d_out) == (16, 48, 16)
    numbers = 16 * 48 + 48 + 48 * 16 + 16 + 16 * 16
    assert 3 * 4 * numbers < sae.state_mb * 2**20 < 3 * 4 * numbers + 1000, "three of each weight, and a few more"
    assert planned.memory_mb * 2**20 == pytest.approx(4 / 3 * sae.state_mb * 2**20 + 64 * 48 * 4)
    assert not config.out.exists()
    result = train(config)
    assert result.n_steps == planned.n_steps
    used = ActivationStore.open(config.store).state.tokens
    assert 960 / used < planned.epochs < 960 / (0.6 * used)


def test_each_sae_counts(config: TrainConfig) -> None:
    sae = SaeConfig(architecture="topk", d_sae=48, k=4)
    one = plan(config.model_copy(update={"hook_points": (HOOK,), "sae": sae}))
    two = plan(config.model_copy(update={"hook_points": (HOOK, OTHER), "sae": sae}))
    assert one is not None
    assert two is not None
    assert list(two.figures()["saes"]) == [HOOK, OTHER]
    assert two.memory_mb - one.memory_mb == pytest.approx(one.saes[HOOK].state_mb)


def test_it_refuses_what_training_refuses(config: TrainConfig) -> None:
    with pytest.raises(HookPointError, match=HOOK):
        plan(config.model_copy(update={"hook_points": (f"{HOOK}->resid_post.0",)}))
    with pytest.raises(ConfigError, match="less than d_sae=48"):
        plan(config.model_copy(update={"sae": config.sae.model_copy(update={"k": 48})}))

"""The recipes in configs/ train: each of them as it is, but for the store, the widths and the length of the run."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from activations.config import HarvestConfig
from activations.store import ActivationStore
from sae.architectures import ARCHITECTURES
from sae.artefact import SaeArtefact
from sae.config import TrainConfig
from sae.log import name_of, read_log
from sae.sweep import is_sweep, points
from sae.train import train
from sae.wiring import Wiring

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("*train*.yaml"))
STEPS, BATCH, D_SAE = 12, 64, 64


def needed(config: TrainConfig) -> tuple[str, ...]:
    """Hook points that the store must have."""
    return tuple(dict.fromkeys(name for text in config.hook_points for name in Wiring.parse(text).hook_points))


def harvest_of(recipe: str) -> HarvestConfig:
    """What the comment of a recipe says to harvest first."""
    comment = re.sub(r"\\\n# *", "", (CONFIGS / recipe).read_text())
    command = re.search(r"saekit harvest configs/(.*)", comment)
    file, *arguments = shlex.split(command[1]) if command else ["gpu_harvest.yaml"]
    assert arguments[::2] == ["--set"] * (len(arguments) // 2)
    return HarvestConfig.load(CONFIGS / file, arguments[1::2])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains(make_store: Callable[..., ActivationStore], tmp_path: Path, recipe: str) -> None:
    config = TrainConfig.load(CONFIGS / recipe)
    small = {"store": make_store(hook_points=needed(config)).path, "out": tmp_path / "run", "batch_size": BATCH}
    small |= {"train_tokens": STEPS * BATCH, "log_every": 1, "eval_every": 6, "checkpoint_every": 6}
    small["sae"] = config.sae.model_copy(update={"d_sae": D_SAE, "k": 4})
    if config.sweep.k:
        small["sweep"] = config.sweep.model_copy(update={"k": tuple(range(4, 4 + len(config.sweep.k)))})
    config = config.model_copy(update=small)
    result = train(config)
    hook_points = dict(zip(result.saes, config.hook_points, strict=True)) if not is_sweep(config) else {}
    assert list(result.saes) == list(hook_points or points(config))
    for name, trained in result.saes.items():
        rows = [row for row in read_log(tmp_path / "run" / "train.jsonl") if name_of(row) == name]
        assert len(rows) == STEPS
        assert rows[-1]["fvu"] < rows[0]["fvu"], "it learns"
        saved = SaeArtefact.load(trained.path)
        assert (saved.hook_point, saved.d_sae) == (hook_points.get(name, config.hook_points[0]), D_SAE)
        assert np.isfinite(saved.W_dec).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_store_it_says_to_harvest_is_the_one_it_needs(recipe: str) -> None:
    config, harvest = TrainConfig.load(CONFIGS / recipe), harvest_of(recipe)
    assert str(config.store) == str(harvest.out)
    assert set(needed(config)) <= set(harvest.hook_points)
    assert config.batch_size < harvest.max_tokens
    assert f"saekit train configs/{recipe}\n" in (CONFIGS / recipe).read_text()


def test_every_architecture_has_a_recipe_and_a_place_of_its_own() -> None:
    recipes = {name: TrainConfig.load(CONFIGS / f"train_{name}.yaml") for name in ARCHITECTURES}
    assert {name: config.sae.architecture for name, config in recipes.items()} == {name: name for name in ARCHITECTURES}
    outs = [TrainConfig.load(CONFIGS / recipe).out for recipe in RECIPES]
    assert len(set(outs)) == len(outs)

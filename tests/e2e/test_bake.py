"""The real small model: what is baked is what steering does, from the files that others load."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer.baking.bake import bake
from steer.config import BakeConfig
from steer.library import save_library
from steer.vectors import SteeringVector


@pytest.mark.parametrize(
    ("form", "hook_point", "operation", "coefficient"),
    [("lora", "mlp_out.12", "ablate", 1.0), ("weights", "resid_post.12", "add", 15.0)],
)
def test_smollm2(form: str, hook_point: str, operation: str, coefficient: float, smollm2: Any, tmp_path: Path) -> None:
    row = np.random.default_rng(0).standard_normal(smollm2.d_model)
    direction = (row / np.linalg.norm(row)).astype(np.float32)
    vector = SteeringVector("v", direction, hook_point, smollm2.ref, 60.0, {}, coefficient, operation=operation)
    save_library(tmp_path / "library", [vector])
    config = {"library": tmp_path / "library", "out": tmp_path / "out", "form": form, "device": "cpu"}
    told = bake(BakeConfig(**config, prompts=2, texts=2))
    for texts in ("prompts", "unrelated"):
        assert told["every_token"][texts]["max_abs"] < 5e-4 < 0.1 < told["effect"][texts]["max_abs"]
        assert 0 <= told["runtime"][texts]["kl"] < 1e-3 < 0.01 < 100 * told["effect"][texts]["kl"]

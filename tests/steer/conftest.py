"""A tiny loaded model and vectors for it."""

from pathlib import Path

import numpy as np
import pytest

from activations.models import LoadedModel, load_model
from activations.store_schema import ModelRef
from steer.vectors import SteeringVector


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> LoadedModel:
    """The random Llama of 4 blocks and d_model 32. Do not change it."""
    return load_model(str(tiny_llama), dtype="float32")


@pytest.fixture
def vector(tiny: LoadedModel) -> SteeringVector:
    """A random unit direction at resid_post.1."""
    direction = np.random.default_rng(0).standard_normal(tiny.d_model).astype(np.float32)
    model = ModelRef(id=tiny.id, fingerprint=tiny.fingerprint, n_layers=tiny.n_layers, d_model=tiny.d_model)
    return SteeringVector(
        "up", direction / np.linalg.norm(direction), "resid_post.1", model, 4.0, {"kind": "contrast", "midpoint": 0.0}
    )

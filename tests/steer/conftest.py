"""A tiny loaded model and vectors for it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from activations.hook_points import HookPoint
from activations.models import LoadedModel, load_model
from activations.store_schema import ModelRef
from steer.measures.effect import Concept
from steer.vectors import SteeringVector


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> LoadedModel:
    """The random Llama of 4 blocks and d_model 32. Do not change it."""
    return load_model(str(tiny_llama), dtype="float32")


LETTER = "'"


@pytest.fixture(scope="session")
def pushing(tiny: LoadedModel) -> SteeringVector:
    """A vector with an effect: behind the last block, it makes LETTER the likeliest token. Its source is made up."""
    (token,) = tiny.tokenizer(LETTER, add_special_tokens=False)["input_ids"]
    direction = tiny.model.lm_head.weight[token].detach().numpy()
    model = ModelRef(id=tiny.id, fingerprint=tiny.fingerprint, n_layers=tiny.n_layers, d_model=tiny.d_model)
    source = {"kind": "contrast", "contrast": "own", "midpoint": 0.0}
    return SteeringVector("push", direction / np.linalg.norm(direction), "resid_post.3", model, 8.0, source)


@pytest.fixture(scope="session")
def letters() -> Concept:
    """What that vector stands for: the share of LETTER among a text's characters."""
    return Concept(
        HookPoint("resid_post", 3),
        lambda x: torch.zeros(len(x), dtype=torch.bool),
        lambda prompts, texts: np.array([text.count(LETTER) / max(len(text), 1) for text in texts]),
    )


@pytest.fixture
def vector(tiny: LoadedModel) -> SteeringVector:
    """A random unit direction at resid_post.1."""
    direction = np.random.default_rng(0).standard_normal(tiny.d_model).astype(np.float32)
    model = ModelRef(id=tiny.id, fingerprint=tiny.fingerprint, n_layers=tiny.n_layers, d_model=tiny.d_model)
    return SteeringVector(
        "up", direction / np.linalg.norm(direction), "resid_post.1", model, 4.0, {"kind": "contrast", "midpoint": 0.0}
    )

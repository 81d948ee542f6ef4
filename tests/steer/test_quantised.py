"""Steering a quantised model: exact at the hook, row by row, with vectors of the model that it was made from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from activations.hook_points import HookPoint
from activations.hooks import capture
from activations.models import LoadedModel, load_model
from activations.quantised import QUANTISATIONS
from steer.chat.session import Chat
from steer.config import ChatConfig
from steer.generate import generate
from steer.operations import Ablate, Add, Intervention
from steer.runtime import steering
from steer.vectors import SteeringVector

POINT = HookPoint("resid_post", 1)


@pytest.fixture(scope="module", params=QUANTISATIONS)
def small(request: pytest.FixtureRequest, wide_llama: Path) -> LoadedModel:
    return load_model(str(wide_llama), device="cpu", dtype="float32", quantization=request.param)


@pytest.fixture
def vector(small: LoadedModel) -> SteeringVector:
    """A random unit direction at resid_post.1."""
    direction = np.random.default_rng(0).standard_normal(small.d_model).astype(np.float32)
    return SteeringVector("up", direction / np.linalg.norm(direction), str(POINT), small.ref, 4.0, {})


@pytest.fixture
def x(small: LoadedModel) -> Tensor:
    return torch.tensor([small.tokenizer("The river ran past the mill")["input_ids"]])


def at_hook(loaded: LoadedModel, x: Tensor) -> Tensor:
    with torch.inference_mode(), capture(loaded.model, loaded.family, [POINT]) as captured:
        loaded.model(x)
    return captured[POINT]


def test_adding_is_linear_at_the_hook_and_0_changes_no_bit(
    small: LoadedModel, vector: SteeringVector, x: Tensor
) -> None:
    before, v = at_hook(small, x), torch.from_numpy(vector.direction)
    for coefficient in (-6.0, 1.0, 6.0):
        with steering(small, [Intervention.of(vector, coefficient)]):
            after = at_hook(small, x)
        torch.testing.assert_close(after[:, 1:] - before[:, 1:], (coefficient * v).expand_as(after[:, 1:]))
        assert torch.equal(after[:, 0], before[:, 0])
    with torch.inference_mode():
        plain = small.model(x).logits
        with steering(small, [Intervention.of(vector, 0.0)]):
            assert torch.equal(small.model(x).logits, plain)


def test_ablation_leaves_no_projection(small: LoadedModel, vector: SteeringVector, x: Tensor) -> None:
    v = torch.from_numpy(vector.direction)
    with steering(small, [Intervention(Ablate(v), POINT)]):
        assert float((at_hook(small, x)[:, 1:] @ v).abs().max()) < 1e-5


def test_each_row_is_steered_as_it_is_alone(small: LoadedModel, vector: SteeringVector, x: Tensor) -> None:
    steers = [[], [Intervention.of(vector, 6.0)], [Intervention(Add(torch.from_numpy(vector.direction), -6.0), POINT)]]
    with torch.inference_mode():
        with steering(small, rows=steers):
            together = small.model(x.repeat(3, 1)).logits
        for row, own in enumerate(steers):
            with steering(small, own):
                torch.testing.assert_close(small.model(x).logits[0], together[row], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_text_with_a_cache_is_text_without(small: LoadedModel, vector: SteeringVector, x: Tensor) -> None:
    steers = [Intervention.of(vector, 6.0)]
    text = "The river ran past the mill"
    (found,) = generate(small, [text], max_new_tokens=6, temperature=0.0, interventions=steers)
    ids = x
    for _ in range(6):
        with torch.inference_mode(), steering(small, steers):
            ids = torch.cat([ids, small.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert found == small.tokenizer.decode(ids[0, x.shape[1] :].tolist(), skip_special_tokens=True)


def test_a_chat_with_a_quantised_model_says_so_in_its_transcript(tiny_llama: Path, tmp_path: Path) -> None:
    from steer.chat.commands import parse

    chat = Chat(ChatConfig(model=str(tiny_llama), quantization="torchao-int8", max_new_tokens=3))
    chat.answer("Hello")
    chat.apply(parse(f"/save {tmp_path / 't.jsonl'}"))
    assert "tiny-llama+torchao-int8" in (tmp_path / "t.jsonl").read_text()

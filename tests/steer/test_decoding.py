"""Beam search and assisted decoding: right where steering does not depend on the past, refused where it does."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig

from activations.errors import ConfigError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.decoding import mode_of
from steer.gates import Gate, cosine
from steer.operations import Add, Intervention
from steer.runtime import steering
from steer.scopes import Scope
from steer.vectors import SteeringVector

LIMITS = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
WAYS: dict[str, dict[str, Any]] = {
    "beam search": {"num_beams": 3},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture
def prompt(tiny: LoadedModel) -> torch.Tensor:
    return torch.tensor(
        [tiny.tokenizer("<|im_start|>user\nhi hi hi hi hi<|im_end|>\n<|im_start|>assistant\n").input_ids]
    )


@pytest.fixture
def add(vector: SteeringVector) -> Intervention:
    return Intervention(Add(torch.from_numpy(vector.direction), 6.0), HookPoint("resid_post", 1))


@pytest.fixture
def by_hand(tiny: LoadedModel, add: Intervention) -> Iterator[RemovableHandle]:
    """A plain hook that adds the same to every token, but the first; what removes it, and no hook of transformers."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        cached = hook.seen  # type: ignore[attr-defined]
        hook.seen = cached + output.shape[1]  # type: ignore[attr-defined]
        changed = output + 6.0 * add.operation.direction  # type: ignore[attr-defined]
        return torch.cat([output[:, :1], changed[:, 1:]], 1) if cached == 0 else changed

    hook.seen = 0  # type: ignore[attr-defined]
    handle = tiny.model.model.layers[1].register_forward_hook(hook)
    yield handle
    handle.remove()


def test_beam_search_with_one_vector_everywhere_is_that_of_a_plain_hook(
    tiny: LoadedModel, add: Intervention, prompt: torch.Tensor, by_hand: RemovableHandle
) -> None:
    expected = tiny.model.generate(prompt, num_beams=4, **LIMITS)
    by_hand.remove()
    with steering(tiny, [add]):
        found = tiny.model.generate(prompt, num_beams=4, **LIMITS)
    assert torch.equal(found, expected)
    assert not torch.equal(found, tiny.model.generate(prompt, num_beams=4, **LIMITS))


def test_assisted_decoding_with_one_vector_everywhere_is_greedy_decoding(
    tiny: LoadedModel, add: Intervention, prompt: torch.Tensor
) -> None:
    draft = copy.deepcopy(tiny.model)
    with steering(tiny, [add]):
        expected = tiny.model.generate(prompt, **LIMITS)
        assert torch.equal(tiny.model.generate(prompt, prompt_lookup_num_tokens=3, **LIMITS), expected)
        assert torch.equal(tiny.model.generate(prompt, assistant_model=draft, **LIMITS), expected)
    with steering(tiny, rows=[[add]]):
        assert torch.equal(tiny.model.generate(prompt, prompt_lookup_num_tokens=3, **LIMITS), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["gate", "scope"])
def test_what_follows_tokens_is_refused_in_front_of_the_first(
    tiny: LoadedModel, vector: SteeringVector, prompt: torch.Tensor, way: str, what: str
) -> None:
    gate = Gate(cosine(torch.from_numpy(vector.direction), "resid_post.0"), 0.0)
    scope, gate = (Scope.parse("assistant"), None) if what == "scope" else (None, gate)
    steers = [Intervention.of(vector, 2.0, scope=scope, gate=gate)]
    passes = []
    handle = tiny.model.model.register_forward_hook(lambda *_: passes.append(1))
    with steering(tiny, steers), pytest.raises(ConfigError, match=r"gates, or scopes.*num_beams=1"):
        tiny.model.generate(prompt, **LIMITS | WAYS[way])
    handle.remove()
    assert passes == []
    with steering(tiny, steers):
        tiny.model.generate(prompt, **LIMITS)


def test_rows_are_refused_in_a_beam_search(tiny: LoadedModel, add: Intervention, prompt: torch.Tensor) -> None:
    with steering(tiny, rows=[[add], []]), pytest.raises(ConfigError, match="different steering for each row"):
        tiny.model.generate(prompt.repeat(2, 1), num_beams=2, **LIMITS)


def test_the_model_is_left_as_it_was(tiny: LoadedModel, vector: SteeringVector, add: Intervention) -> None:
    with steering(tiny, rows=[[add]]), steering(tiny, [add]):
        assert "generate" in vars(tiny.model)
    assert "generate" not in vars(tiny.model)


def test_a_mode_is_told_from_the_call_its_config_and_the_models(tiny: LoadedModel) -> None:
    model = tiny.model
    assert mode_of(model, do_sample=False) == "greedy_search"
    assert mode_of(model, do_sample=True) == "sample"
    assert mode_of(model, GenerationConfig(num_beams=2)) == "beam_search"
    assert mode_of(model, GenerationConfig(num_beams=2), num_beams=1) == "greedy_search"
    assert mode_of(model, assistant_model=model) == "assisted_generation"
    own = copy.deepcopy(model.generation_config)
    try:
        model.generation_config.num_beams = 2
        assert mode_of(model) == mode_of(model, GenerationConfig()) == "beam_search"
    finally:
        model.generation_config = own

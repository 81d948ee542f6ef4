"""Steering: what is added, where, and above all where not."""

from dataclasses import replace

import pytest
import torch

from activations.errors import MismatchError, ShapeError
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from steer.runtime import Steer, check_model, steering
from steer.vectors import SteeringVector

POINT = HookPoint("resid_post", 1)


def ids(loaded: LoadedModel, text: str = "The river ran past the mill and on to the sea.") -> torch.Tensor:
    return torch.tensor([loaded.tokenizer(text)["input_ids"]])


def resid(loaded: LoadedModel, steers: list[Steer], **inputs: torch.Tensor) -> torch.Tensor:
    with steering(loaded, steers), capture(loaded.model, loaded.family, [POINT]) as captured:
        run_until(loaded.model, inputs)
    return captured[POINT]


def logits(loaded: LoadedModel, steers: list[Steer], **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), steering(loaded, steers):
        return loaded.model(**inputs).logits


def test_adds_the_vector_to_every_token_but_the_first(tiny: LoadedModel, vector: SteeringVector) -> None:
    x = ids(tiny)
    moved = resid(tiny, [Steer.of(vector, 3.0)], input_ids=x) - resid(tiny, [], input_ids=x)
    expected = 3.0 * torch.from_numpy(vector.direction)
    assert not moved[0, 0].any()
    torch.testing.assert_close(moved[0, 1:], expected.expand_as(moved[0, 1:]), atol=2e-6, rtol=0)


def test_coefficient_zero_is_the_model_bit_for_bit(tiny: LoadedModel, vector: SteeringVector) -> None:
    x = ids(tiny)
    hooks = len(tiny.family.block(tiny.model, 1)._forward_hooks)
    with steering(tiny, [Steer.of(vector, 0.0)]):
        assert len(tiny.family.block(tiny.model, 1)._forward_hooks) == hooks
    assert torch.equal(logits(tiny, [Steer.of(vector, 0.0)], input_ids=x), logits(tiny, [], input_ids=x))
    assert not torch.equal(logits(tiny, [Steer.of(vector, 1.0)], input_ids=x), logits(tiny, [], input_ids=x))


def test_nothing_stays_behind(tiny: LoadedModel, vector: SteeringVector) -> None:
    x = ids(tiny)
    before = logits(tiny, [], input_ids=x)
    with pytest.raises(RuntimeError, match="inside"), steering(tiny, [Steer.of(vector, 5.0)]):
        raise RuntimeError("inside")
    assert torch.equal(logits(tiny, [], input_ids=x), before)


def test_cached_and_uncached_logits_agree(tiny: LoadedModel, vector: SteeringVector) -> None:
    x, steers = ids(tiny), [Steer.of(vector, 4.0)]
    whole = logits(tiny, steers, input_ids=x)
    for with_mask in (True, False):
        cache, parts, start = None, [], 0
        for stop in (4, 5, 6, x.shape[1]):
            mask = {"attention_mask": torch.ones(1, stop, dtype=torch.long)} if with_mask else {}
            with torch.no_grad(), steering(tiny, steers):
                out = tiny.model(x[:, start:stop], past_key_values=cache, use_cache=True, **mask)
            cache, start = out.past_key_values, stop
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-5)


def test_left_padding_changes_nothing(tiny: LoadedModel, vector: SteeringVector) -> None:
    x, steers = ids(tiny), [Steer.of(vector, 4.0)]
    mask = torch.ones_like(x)
    padded, padded_mask = (torch.nn.functional.pad(t, (3, 0)) for t in (x, mask))
    positions = (padded_mask.cumsum(1) - 1).clamp(min=0)
    whole = logits(tiny, steers, input_ids=x, attention_mask=mask)
    shifted = logits(tiny, steers, input_ids=padded, attention_mask=padded_mask, position_ids=positions)
    torch.testing.assert_close(shifted[:, 3:], whole, atol=2e-5, rtol=1e-5)


def test_each_sequence_may_have_its_own_vector(tiny: LoadedModel, vector: SteeringVector) -> None:
    x, v = ids(tiny), torch.from_numpy(vector.direction)
    deltas = torch.stack([0 * v, 2 * v, -5 * v])
    together = logits(tiny, [Steer(POINT, deltas)], input_ids=x.repeat(3, 1))
    for row, delta in enumerate(deltas):
        alone = logits(tiny, [Steer(POINT, delta)], input_ids=x)
        torch.testing.assert_close(together[row : row + 1], alone, atol=2e-5, rtol=1e-5)


def test_steers_add_up(tiny: LoadedModel, vector: SteeringVector) -> None:
    x = ids(tiny)
    two = resid(tiny, [Steer.of(vector, 1.0), Steer.of(vector, 2.0)], input_ids=x)
    torch.testing.assert_close(two, resid(tiny, [Steer.of(vector, 3.0)], input_ids=x), atol=2e-6, rtol=0)


def test_a_bfloat16_model_stays_in_bfloat16(tiny_llama, vector: SteeringVector) -> None:
    from activations.models import load_model

    half = load_model(str(tiny_llama), dtype="bfloat16")
    assert resid(half, [Steer.of(vector, 3.0)], input_ids=ids(half)).dtype == torch.bfloat16


def test_a_vector_of_another_width_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(ShapeError, match="32"), steering(tiny, [Steer(POINT, torch.ones(31))]):
        pass


def test_a_batch_of_another_size_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(ShapeError, match="one a sequence"):
        logits(tiny, [Steer(POINT, torch.ones(2, 32))], input_ids=ids(tiny))


def test_a_vector_of_another_model_is_refused(tiny: LoadedModel, vector: SteeringVector) -> None:
    check_model(vector, tiny)
    with pytest.raises(MismatchError, match="made from"):
        check_model(vector, replace(tiny, fingerprint="another"))

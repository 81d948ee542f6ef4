"""Steering: what is added, where, and above all where not."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from jaxtyping import config
from torch import Tensor

from activations.errors import ConfigError, HookPointError, MismatchError, NumericsError, ShapeError
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from steer.gates import Gate, probe
from steer.operations import Ablate, Add, Clamp, Intervention, Rotate, schedule
from steer.plan import MAX_DOSE
from steer.runtime import steering, token_index
from steer.scopes import Scope
from steer.vectors import SteeringVector

POINT = HookPoint("resid_post", 1)


def ids(loaded: LoadedModel, text: str = "The river ran past the mill and on to the sea.") -> Tensor:
    return torch.tensor([loaded.tokenizer(text)["input_ids"]])


def direction(vector: SteeringVector) -> Tensor:
    return torch.from_numpy(vector.direction)


def resid(loaded: LoadedModel, *interventions: Intervention, **inputs: Tensor) -> Tensor:
    with steering(loaded, interventions), capture(loaded.model, loaded.family, [POINT]) as captured:
        run_until(loaded.model, inputs)
    return captured[POINT]


def logits(loaded: LoadedModel, *interventions: Intervention, **inputs: Tensor) -> Tensor:
    with torch.no_grad(), steering(loaded, interventions):
        return loaded.model(**inputs).logits


def test_adds_the_vector_to_every_token_but_the_first(tiny: LoadedModel, vector: SteeringVector) -> None:
    x = ids(tiny)
    moved = resid(tiny, Intervention.of(vector, 3.0), input_ids=x) - resid(tiny, input_ids=x)
    assert not moved[0, 0].any()
    torch.testing.assert_close(moved[0, 1:], (3 * direction(vector)).expand_as(moved[0, 1:]), atol=2e-6, rtol=0)


def test_coefficient_zero_is_the_model_bit_for_bit(tiny: LoadedModel, vector: SteeringVector) -> None:
    x = ids(tiny)
    assert torch.equal(logits(tiny, Intervention.of(vector, 0.0), input_ids=x), logits(tiny, input_ids=x))
    assert not torch.equal(logits(tiny, Intervention.of(vector, 1.0), input_ids=x), logits(tiny, input_ids=x))


@pytest.mark.parametrize("coefficient", [0.5, -3.0])
def test_adding_behind_the_last_block_moves_the_logits_as_predicted(
    tiny: LoadedModel, vector: SteeringVector, coefficient: float
) -> None:
    x, last = ids(tiny), HookPoint("resid_post", tiny.n_layers - 1)
    with torch.no_grad(), capture(tiny.model, tiny.family, [last]) as captured:
        plain = tiny.model(input_ids=x).logits
    h = captured[last][0].double() + coefficient * direction(vector).double()
    base, head = cast(Any, tiny.model.base_model), cast(Any, tiny.model.get_output_embeddings())
    normed = h / (h.square().mean(-1, keepdim=True) + base.config.rms_norm_eps).sqrt() * base.norm.weight.double()
    predicted = normed @ head.weight.double().T
    moved = logits(tiny, Intervention(Add(direction(vector), coefficient), last), input_ids=x)[0]
    torch.testing.assert_close(moved[1:].double(), predicted[1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(moved[0], plain[0, 0])
    assert float((moved[1:] - plain[0, 1:]).abs().max()) > 0.1


def test_nothing_stays_behind(tiny: LoadedModel, vector: SteeringVector) -> None:
    x = ids(tiny)
    hooks = len(tiny.family.block(tiny.model, 1)._forward_hooks)
    before = logits(tiny, input_ids=x)
    with pytest.raises(RuntimeError, match="inside"), steering(tiny, [Intervention.of(vector, 5.0)]):
        raise RuntimeError("inside")
    assert torch.equal(logits(tiny, input_ids=x), before)
    assert len(tiny.family.block(tiny.model, 1)._forward_hooks) == hooks


def test_cached_and_uncached_logits_agree(tiny: LoadedModel, vector: SteeringVector) -> None:
    x, steer = ids(tiny), Intervention.of(vector, 4.0)
    whole = logits(tiny, steer, input_ids=x)
    for with_mask in (True, False):
        torch.testing.assert_close(in_chunks(tiny, [steer], x, with_mask=with_mask), whole, atol=2e-5, rtol=1e-5)


def in_chunks(
    loaded: LoadedModel, interventions: list[Intervention], x: Tensor, *, with_mask: bool = True, stops=(4, 5, 6)
) -> Tensor:
    cache, parts, start = None, [], 0
    with torch.no_grad(), steering(loaded, interventions):
        for stop in (*stops, x.shape[1]):
            mask = {"attention_mask": torch.ones(len(x), stop, dtype=torch.long)} if with_mask else {}
            out = loaded.model(x[:, start:stop], past_key_values=cache, use_cache=True, **mask)
            cache, start = out.past_key_values, stop
            parts.append(out.logits)
    return torch.cat(parts, dim=1)


def test_left_padding_changes_nothing(tiny: LoadedModel, vector: SteeringVector) -> None:
    x, steer = ids(tiny), Intervention.of(vector, 4.0)
    mask = torch.ones_like(x)
    padded, padded_mask = (torch.nn.functional.pad(t, (3, 0)) for t in (x, mask))
    positions = (padded_mask.cumsum(1) - 1).clamp(min=0)
    whole = logits(tiny, steer, input_ids=x, attention_mask=mask)
    shifted = logits(tiny, steer, input_ids=padded, attention_mask=padded_mask, position_ids=positions)
    torch.testing.assert_close(shifted[:, 3:], whole, atol=2e-5, rtol=1e-5)


def test_each_sequence_may_have_its_own(tiny: LoadedModel, vector: SteeringVector) -> None:
    x, v = ids(tiny), direction(vector)
    w = torch.linspace(-1, 1, len(v))
    rows = [
        [],
        [Intervention(Add(v, 2.0), POINT)],
        [Intervention(Add(v, -5.0), POINT), Intervention(Ablate(w), POINT), Intervention(Clamp(w, 3.0, 3.0), POINT)],
        [Intervention(Rotate(w, 4.0), HookPoint("resid_mid", 2), Scope.parse("after:5"))],
        [Intervention(Ablate(v), POINT, gate=Gate(probe(w, 0.0, "resid_post.0"), 0.0))],
    ]
    shared = Intervention(Add(w, 0.5), HookPoint("mlp_out", 0))
    with torch.no_grad(), steering(tiny, [shared], rows=rows):
        together = tiny.model(x.repeat(len(rows), 1)).logits
    for row, own in enumerate(rows):
        torch.testing.assert_close(
            together[row : row + 1], logits(tiny, shared, *own, input_ids=x), atol=2e-5, rtol=1e-5
        )
    assert len({round(float(row.sum()), 3) for row in together}) == len(rows)
    assert torch.equal(together[0], logits(tiny, shared, input_ids=x.repeat(len(rows), 1))[0])


def test_what_is_added_adds_up(tiny: LoadedModel, vector: SteeringVector) -> None:
    x = ids(tiny)
    two = resid(tiny, Intervention.of(vector, 1.0), Intervention.of(vector, 2.0), input_ids=x)
    torch.testing.assert_close(two, resid(tiny, Intervention.of(vector, 3.0), input_ids=x), atol=2e-6, rtol=0)


def test_a_schedule_is_one_intervention_a_layer(tiny: LoadedModel, vector: SteeringVector) -> None:
    x, one = ids(tiny), Intervention(Add(direction(vector), 2.0), POINT)
    found = schedule(one, {0: 0.5, 2: -1.0})
    points = [HookPoint("resid_post", 0), HookPoint("resid_post", 2)]
    assert [each.hook_point for each in found] == points
    by_hand = [Intervention(Add(direction(vector), c), p) for c, p in zip((1.0, -2.0), points, strict=True)]
    assert torch.equal(logits(tiny, *found, input_ids=x), logits(tiny, *by_hand, input_ids=x))


def test_a_bfloat16_model_is_rounded_once(tiny_llama, vector: SteeringVector) -> None:
    from activations.models import load_model

    half = load_model(str(tiny_llama), dtype="bfloat16")
    x = ids(half)
    before, after = resid(half, input_ids=x), resid(half, Intervention.of(vector, 3.0), input_ids=x)
    assert after.dtype == torch.bfloat16
    assert torch.equal(after[:, 1:], (before[:, 1:].float() + 3 * direction(vector)).bfloat16())
    assert torch.equal(after[:, 0], before[:, 0])


@pytest.mark.filterwarnings("ignore")  # PyTorch would rather see another package quantise
def test_a_quantised_model_is_steered_like_any_other(tiny: LoadedModel, vector: SteeringVector) -> None:
    from torch.ao.quantization import quantize_dynamic

    small = replace(tiny, model=quantize_dynamic(tiny.model, {torch.nn.Linear}, dtype=torch.qint8))
    x = ids(tiny)
    moved = resid(small, Intervention.of(vector, 3.0), input_ids=x) - resid(small, input_ids=x)
    torch.testing.assert_close(moved[0, 1:], (3 * direction(vector)).expand_as(moved[0, 1:]), atol=2e-6, rtol=0)
    assert not torch.equal(resid(small, input_ids=x), resid(tiny, input_ids=x))


# --- while it runs ---------------------------------------------------------------------------------------------------


def test_a_change_acts_from_the_next_token_on(tiny: LoadedModel, vector: SteeringVector) -> None:
    x = ids(tiny)
    strong, weak = Intervention.of(vector, 6.0), Intervention.of(vector, 1.0)
    with torch.no_grad(), steering(tiny, [strong]) as steered, capture(tiny.model, tiny.family, [POINT]) as captured:
        cache = tiny.model(x[:, :5], use_cache=True).past_key_values
        first = captured[POINT]
        steered.set([weak])
        cache = tiny.model(x[:, 5:9], past_key_values=cache).past_key_values
        second = captured[POINT]
        steered.set()
        tiny.model(x[:, 9:], past_key_values=cache)
        third = captured[POINT]
    assert torch.equal(first, resid(tiny, strong, input_ids=x[:, :5]))
    v, plain = direction(vector), resid(tiny, input_ids=x)
    assert float(((second - plain[:, 5:9]) @ v).mean()) == pytest.approx(1.0, abs=0.5)
    with torch.no_grad(), steering(tiny), capture(tiny.model, tiny.family, [POINT]) as captured:
        cache = tiny.model(x[:, :5], use_cache=True).past_key_values
        tiny.model(x[:, 5:], past_key_values=cache)
    torch.testing.assert_close(third, captured[POINT][:, 4:], atol=2e-1, rtol=0)


def test_there_is_room_for_what_was_reserved_and_no_more(tiny: LoadedModel, vector: SteeringVector) -> None:
    v, x = direction(vector), ids(tiny)
    later = Intervention(Ablate(v), HookPoint("resid_post", 2))
    expected = logits(tiny, later, input_ids=x)
    with torch.no_grad(), steering(tiny, [Intervention.of(vector, 1.0)], reserve=[later]) as steered:
        steered.set([later])
        assert torch.equal(tiny.model(x).logits, expected)
        with pytest.raises(ConfigError, match=r"resid_post\.0.*at most 0.*got 1.*reserve"):
            steered.set([Intervention(Add(v), HookPoint("resid_post", 0))])
        with pytest.raises(ConfigError, match=r"at most 1.*got 2.*reserve"):
            steered.set([later, Intervention(Ablate(v.flip(0)), HookPoint("resid_post", 2))])
        with pytest.raises(ConfigError, match=r"gate 'new'.*reserve"):
            steered.set(
                [Intervention(Ablate(v), later.hook_point, gate=Gate(probe(v, 0.0, "resid_post.0"), 0.0, name="new"))]
            )
        with pytest.raises(ShapeError, match="rows"):
            steered.set(rows=[[], []])
        assert torch.equal(tiny.model(x).logits, expected), "what is refused leaves all as it was"


def test_a_coefficient_may_start_at_zero(tiny: LoadedModel, vector: SteeringVector) -> None:
    x, w = ids(tiny), torch.linspace(-1, 1, tiny.d_model)
    later = [Intervention.of(vector, 2.0), Intervention(Ablate(w), POINT)]
    expected, plain = logits(tiny, *later, input_ids=x), logits(tiny, input_ids=x)
    now = [Intervention.of(vector, 0.0), Intervention(Ablate(w, 0.0), POINT)]
    with torch.no_grad(), steering(tiny, rows=[now]) as steered:
        assert torch.equal(tiny.model(x).logits, plain)
        steered.set(rows=[later])
        assert torch.equal(tiny.model(x).logits, expected)


def test_conditions_that_were_not_foreseen_are_refused(tiny: LoadedModel, vector: SteeringVector) -> None:
    v = direction(vector)
    a, b = (Gate(probe(v, 0.0, "resid_post.0"), on, name=str(on)) for on in (0.0, 1.0))
    with steering(tiny, [Intervention(Add(v), POINT, gate=a & b)]) as steered:
        steered.set([Intervention(Add(v), POINT, gate=~a & b)])
        with pytest.raises(ConfigError, match=r"at most 1 alternatives.*got 2.*reserve"):
            steered.set([Intervention(Add(v), POINT, gate=a | b)])
        with pytest.raises(ConfigError, match=r"scope 'generated'.*reserve"):
            steered.set([Intervention(Add(v), POINT, Scope.parse("generated"), a)], prompt_lengths=[3])
        steered.set([Intervention(Add(v), POINT, Scope.parse("after:3"), a)])


def test_compiled_as_eager_without_compiling_again(tiny: LoadedModel, vector: SteeringVector) -> None:
    """Vectors, coefficients, scopes and gates change between tokens; checks of types would stop the compiler."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from transformers import StaticCache

    chat = "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\nyes, and no"
    v, x = direction(vector), ids(tiny, chat).repeat(2, 1)
    w = torch.linspace(-1, 1, len(v))
    gate = Gate(probe(w, 0.0, "resid_post.0"), 0.3, -0.3, 2)
    assistant = Scope.parse("assistant")
    rows = [
        [Intervention(Add(v, 3.0), POINT, assistant), Intervention(Add(w, 2.0), POINT)],
        [Intervention(Ablate(w), POINT, gate=gate), Intervention(Clamp(v, 4.0, 4.0), POINT)],
    ]
    changes = {
        7: [[Intervention(Add(w, 6.0), POINT, Scope.parse("after:9"))], []],
        10: [[Intervention(Add(v, 5.0), POINT, assistant)], [Intervention(Ablate(v), POINT, gate=~gate)]],
    }

    def run(model, steered=None) -> Tensor:
        cache = StaticCache(config=tiny.model.config, max_cache_len=32)
        if steered is not None:
            steered.set(rows=rows)
        tiny.model(x[:, :5], past_key_values=cache)
        parts = []
        for i in range(5, x.shape[1]):
            if i in changes and steered is not None:
                steered.set(rows=changes[i])
            position = torch.full((2, 1), i)
            parts.append(model(input_ids=x[:, i : i + 1], position_ids=position, past_key_values=cache).logits)
        return torch.cat(parts, dim=1)

    compiles = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tiny.model, backend=compiles, fullgraph=True, dynamic=False)
    config.update("jaxtyping_disable", True)
    try:
        with torch.no_grad():
            plain = run(compiled)
            with steering(tiny, rows=rows) as steered:
                expected, fired = run(tiny.model, steered), steered.fired()
                torch.testing.assert_close(run(compiled, steered), expected, atol=2e-5, rtol=1e-5)
                assert compiles.frame_count == 2, "one for the model alone, one for all that it is steered with"
                assert steered.fired() == fired
                assert 0 < len(fired[1]["gate"]) < x.shape[1] - 1
            torch.testing.assert_close(run(compiled), plain, atol=2e-5, rtol=1e-5)
            with steering(tiny, rows=rows) as steered:  # in a new context, which the compiled model has not seen
                torch.testing.assert_close(run(compiled, steered), expected, atol=2e-5, rtol=1e-5)
    finally:
        config.update("jaxtyping_disable", False)
        torch.compiler.reset()


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(loaded: LoadedModel, *interventions: Intervention, **options) -> None:
    with steering(loaded, interventions, **options):
        pass


def test_another_model_is_refused(tiny: LoadedModel, vector: SteeringVector) -> None:
    other = replace(tiny, fingerprint="another")
    refused(tiny, Intervention.of(vector, 1.0))
    with pytest.raises(MismatchError, match="that it was made from"):
        refused(other, Intervention.of(vector, 1.0))
    gate = Gate(probe(direction(vector), 0.0, "resid_post.1"), 0.0, model=tiny.fingerprint)
    gated = Intervention(Add(direction(vector)), POINT, gate=gate)
    refused(tiny, gated)
    with pytest.raises(MismatchError, match="gate"):
        refused(other, gated)


def test_another_width_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(ShapeError, match="32"):
        refused(tiny, Intervention(Add(torch.ones(31)), POINT))
    with pytest.raises(ShapeError, match="gate"):
        refused(
            tiny, Intervention(Add(torch.ones(32)), POINT, gate=Gate(probe(torch.ones(31), 0.0, "resid_post.0"), 0.0))
        )


def test_another_layer_is_refused(tiny: LoadedModel, vector: SteeringVector) -> None:
    with pytest.raises(HookPointError, match="0 to 3"):
        refused(tiny, Intervention(Add(torch.ones(32)), HookPoint("resid_post", 4)))
    with pytest.raises(ConfigError, match="a hook point"):
        refused(tiny, Intervention(Add(torch.ones(32))))


def test_a_gate_behind_what_it_gates_is_refused(tiny: LoadedModel) -> None:
    for name in ("resid_pre.1", "resid_post.1"):
        refused(tiny, Intervention(Add(torch.ones(32)), POINT, gate=Gate(probe(torch.ones(32), 0.0, name), 0.0)))
    late = Gate(probe(torch.ones(32), 0.0, "resid_pre.2"), 0.0)
    with pytest.raises(HookPointError, match=r"no later than resid_post\.1"):
        refused(tiny, Intervention(Add(torch.ones(32)), POINT, gate=late))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(tiny: LoadedModel, bad: float) -> None:
    v = torch.ones(32)
    for operation in (Add(v, bad), Add(bad * v), Ablate(v, bad), Ablate(bad * v), Rotate(v, bad)):
        with pytest.raises(NumericsError):
            refused(tiny, Intervention(operation, POINT))
    with pytest.raises((NumericsError, ConfigError)):
        refused(tiny, Intervention(Clamp(v, float("nan")), POINT))


def test_a_dose_beyond_the_cap_is_refused_unless_forced(tiny: LoadedModel, vector: SteeringVector) -> None:
    limit = MAX_DOSE * vector.mean_norm
    refused(tiny, Intervention.of(vector, limit * 0.999))
    for too_much in ([limit * 1.01], [-limit * 1.01], [limit * 0.6, limit * 0.6]):
        steers = [Intervention.of(vector, coefficient) for coefficient in too_much]
        with pytest.raises(ConfigError, match=r"dose of at most 2.*force"):
            refused(tiny, *steers)
        refused(tiny, *steers, force=True)
    clamp = Intervention(Clamp(direction(vector), 1.01 * limit), POINT, mean_norm=vector.mean_norm)
    with pytest.raises(ConfigError, match="dose"):
        refused(tiny, clamp)


def test_a_batch_of_another_size_is_refused(tiny: LoadedModel, vector: SteeringVector) -> None:
    with pytest.raises(ShapeError, match="one a row"), steering(tiny, rows=[[Intervention.of(vector, 1.0)]] * 2):
        tiny.model(ids(tiny))
    gated = Intervention(Add(torch.ones(32)), POINT, gate=Gate(probe(torch.ones(32), 0.0, "resid_post.0"), 0.0))
    with pytest.raises(ShapeError, match="max_batch"), steering(tiny, [gated], max_batch=1):
        tiny.model(ids(tiny).repeat(2, 1))


# --- indices of tokens -----------------------------------------------------------------------------------------------


class Cache:
    """As long as it says, and of the same name in each process."""

    def __init__(self, length: int):
        self.length = length

    def __repr__(self) -> str:
        return f"Cache({self.length})"

    def get_seq_length(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, [[0, 1, 2]]),
        ({"past_key_values": Cache(4)}, [[4, 5, 6]]),
        ({"attention_mask": [[0, 1, 1]]}, [[-1, 0, 1]]),
        ({"attention_mask": [[0, 1, 1, 1, 1]], "past_key_values": Cache(2)}, [[1, 2, 3]]),
        ({"attention_mask": [[0, 0, 0, 0, 1]], "past_key_values": Cache(2)}, [[-1, -1, 0]]),
        ({"attention_mask": [[0, 1, 1, 1, 1, 0, 0, 0]], "past_key_values": Cache(2)}, [[1, 2, 3]]),
        ({"attention_mask": [[1, 1, 0]]}, [[0, 1, -1]]),
        ({"position_ids": [[0, 0, 1]]}, [[-1, 0, 1]]),
        ({"position_ids": [[0, 0, 0]]}, [[-1, -1, 0]]),
        ({"position_ids": [[5, 6, 7]], "past_key_values": Cache(9)}, [[5, 6, 7]]),
    ],
    ids=str,
)
def test_the_index_of_each_token(inputs: dict, expected: list[list[int]]) -> None:
    tensors = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in inputs.items()}
    assert token_index({"input_ids": torch.zeros(1, 3, dtype=torch.long), **tensors}).tolist() == expected

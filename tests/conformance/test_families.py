"""Every family, on tiny random models of every model type it covers.

A new row in FAMILIES is covered without a change here, as long as transformers builds its config from the usual keys.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from activations.errors import HookPointError, ModelError
from activations.families import FAMILIES, ModelFamily, find_family
from activations.hook_points import HookPoint
from activations.hooks import capture, edit, run_until

N_LAYERS, D_MODEL, VOCAB = 3, 32, 64
MODEL_TYPES = sorted((name, kind) for name, family in FAMILIES.items() for kind in family.model_types)
PRE = [HookPoint("resid_pre", layer) for layer in range(N_LAYERS)]
POST = [HookPoint("resid_post", layer) for layer in range(N_LAYERS)]

pytestmark = pytest.mark.parametrize(("row", "kind"), MODEL_TYPES, ids=[kind for _, kind in MODEL_TYPES])


@cache
def tiny_model(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def token_ids(n_rows: int = 2, n_tokens: int = 7) -> Tensor:
    return torch.randint(3, VOCAB, (n_rows, n_tokens), generator=torch.Generator().manual_seed(1))


def captured_at(model: Any, family: ModelFamily, points: list[HookPoint], **inputs: Any) -> dict[HookPoint, Tensor]:
    with capture(model, family, points) as captured:
        run_until(model, inputs)
    return captured


def test_is_found_with_its_sizes(row: str, kind: str) -> None:
    model = tiny_model(kind)
    family = find_family(model)
    assert family is FAMILIES[row]
    assert family.name == row
    assert (family.d_model(model.config), family.n_layers(model.config)) == (D_MODEL, N_LAYERS)


def test_capture_equals_hidden_states(row: str, kind: str) -> None:
    model, family = tiny_model(kind), FAMILIES[row]
    states = model(token_ids(), output_hidden_states=True).hidden_states
    captured = captured_at(model, family, PRE + POST, input_ids=token_ids())
    for layer in range(N_LAYERS):
        assert torch.equal(captured[PRE[layer]], states[layer])
    for layer in range(N_LAYERS - 1):
        assert torch.equal(captured[POST[layer]], states[layer + 1])
    # What transformers calls the last hidden state has been through the final norm.
    assert torch.equal(family.final_norm(model)(captured[POST[-1]]), states[N_LAYERS])


def test_norm_and_head_lead_to_the_logits(row: str, kind: str) -> None:
    model, family = tiny_model(kind), FAMILIES[row]
    logits = model(token_ids()).logits
    resid = captured_at(model, family, POST, input_ids=token_ids())[POST[-1]]
    ours = family.lm_head(model)(family.final_norm(model)(resid))
    cap = getattr(model.config, "final_logit_softcapping", None)
    torch.testing.assert_close(cap * torch.tanh(ours / cap) if cap else ours, logits)
    assert family.lm_head(model).weight.shape == (VOCAB, D_MODEL)


@pytest.mark.parametrize("point", [PRE[1], POST[1], POST[-1]], ids=str)
def test_edit_arrives_there_and_nowhere_before(row: str, kind: str, point: HookPoint) -> None:
    model, family = tiny_model(kind), FAMILIES[row]
    clean = captured_at(model, family, PRE + POST, input_ids=token_ids())
    direction = torch.linspace(-1, 1, D_MODEL)
    with edit(model, family, point, lambda resid: resid + 3 * direction):
        edited = captured_at(model, family, PRE + POST, input_ids=token_ids())
    order = [site for pair in zip(PRE, POST, strict=True) for site in pair]
    here = order.index(point)
    for before in order[:here]:
        assert torch.equal(edited[before], clean[before])
    assert torch.equal(edited[point], clean[point] + 3 * direction)
    if point.site == "resid_post" and point != POST[-1]:
        assert torch.equal(edited[order[here + 1]], edited[point])
    for after in order[here + 1 :]:
        assert not torch.allclose(edited[after], clean[after])


def test_edit_changes_the_logits_as_the_head_says(row: str, kind: str) -> None:
    model, family = tiny_model(kind), FAMILIES[row]
    resid = captured_at(model, family, POST, input_ids=token_ids())[POST[-1]]
    direction = torch.linspace(-1, 1, D_MODEL)
    with edit(model, family, POST[-1], lambda resid: resid + direction):
        logits = model(token_ids()).logits
    expected = family.lm_head(model)(family.final_norm(model)(resid + direction))
    cap = getattr(model.config, "final_logit_softcapping", None)
    torch.testing.assert_close(logits, cap * torch.tanh(expected / cap) if cap else expected)


@pytest.mark.parametrize("point", [PRE[0], POST[1]], ids=str)
def test_identity_edit_is_bitwise_identity(row: str, kind: str, point: HookPoint) -> None:
    model, family = tiny_model(kind), FAMILIES[row]
    clean = model(token_ids()).logits
    with edit(model, family, point, lambda resid: resid):
        assert torch.equal(model(token_ids()).logits, clean)


def test_kv_cache_gives_the_same(row: str, kind: str) -> None:
    model, family, ids = tiny_model(kind), FAMILIES[row], token_ids()
    direction = torch.linspace(-1, 1, D_MODEL)
    with edit(model, family, POST[0], lambda resid: resid + direction), capture(model, family, POST) as captured:
        whole = model(ids, use_cache=False).logits
        whole_resid = captured[POST[1]]
        first = model(ids[:, :4], use_cache=True)
        steps, cache, resids = [first.logits], first.past_key_values, [captured[POST[1]]]
        for i in range(4, ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
            resids.append(captured[POST[1]])
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(resids, dim=1), whole_resid, rtol=1e-4, atol=1e-4)


def test_left_padding_gives_the_same(row: str, kind: str) -> None:
    model, family, ids = tiny_model(kind), FAMILIES[row], token_ids(1)
    direction = torch.linspace(-1, 1, D_MODEL)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(10) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with edit(model, family, POST[0], lambda resid: resid + direction):
        plain = captured_at(model, family, POST, input_ids=ids)
        left = captured_at(model, family, POST, input_ids=padded, attention_mask=mask, position_ids=positions)
    for point in POST:
        torch.testing.assert_close(left[point][:, 3:], plain[point], rtol=1e-4, atol=1e-4)


def test_stops_right_after_the_last_hook_point(row: str, kind: str) -> None:
    model, family = tiny_model(kind), FAMILIES[row]
    ran: list[str] = []
    handles = [
        family.block(model, 2).register_forward_pre_hook(lambda *_: ran.append("block 2")),
        family.lm_head(model).register_forward_pre_hook(lambda *_: ran.append("head")),
    ]
    with capture(model, family, [POST[1], PRE[0]], stop_after_last=True) as captured:
        output = run_until(model, {"input_ids": token_ids()})
    for handle in handles:
        handle.remove()
    assert (output, ran) == (None, [])
    whole = captured_at(model, family, [POST[1], PRE[0]], input_ids=token_ids())
    assert all(torch.equal(captured[point], whole[point]) for point in whole)


def test_layer_beyond_the_model_is_refused(row: str, kind: str) -> None:
    with (
        pytest.raises(HookPointError, match="a layer from 0 to 2"),
        capture(tiny_model(kind), FAMILIES[row], [HookPoint("resid_post", N_LAYERS)]),
    ):
        pass


def test_unknown_model_type_says_where_to_add_it(row: str, kind: str) -> None:
    model: Any = torch.nn.Module()
    model.config = SimpleNamespace(model_type=kind + "_unknown")
    with pytest.raises(ModelError, match=r"activations/families/.*docs/extending\.md") as caught:
        find_family(model)
    assert kind in caught.value.expected

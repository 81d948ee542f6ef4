"""Steering on every family: rows that leave each other alone, caches and padding that change nothing, and logits that
are what the residual stream says."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.gates import Gate, cosine
from steer.operations import Ablate, Add, Clamp, Intervention
from steer.runtime import steering
from tests.conformance.test_families import (
    COMPRESSES_PADDING,
    D_MODEL,
    N_LAYERS,
    N_TOKENS,
    Case,
    each_case,
    leaving,
    logits_of,
    seen,
    tiny_model,
    token_ids,
)

UP = torch.linspace(-1, 1, D_MODEL)
ACROSS = torch.cos(torch.arange(D_MODEL).float())
MIDDLE = HookPoint("resid_post", 1)
OPEN_AT_TIMES = Gate(cosine(ACROSS, "resid_post.0"), 0.02, -0.02, 2)
ROWS = [
    [],
    [Intervention(Add(UP, 1.0), MIDDLE)],
    [
        Intervention(Ablate(UP), MIDDLE, gate=OPEN_AT_TIMES),
        Intervention(Clamp(ACROSS, 2.0, 2.0), HookPoint("mlp_out", 2)),
    ],
]


def loaded(case: Case) -> LoadedModel:
    model: Any = tiny_model(case)
    named: Any = SimpleNamespace(chat_template=None)
    return LoadedModel(
        model, named, case.family, case.name, case.name, "", "", D_MODEL, N_LAYERS, model.device, torch.float32
    )


def logits(case: Case, rows: list[list[Intervention]], x: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad(), steering(loaded(case), rows=rows):
        return tiny_model(case)(x, **inputs).logits


@each_case
def test_rows_of_a_batch_leave_each_other_alone(case: Case) -> None:
    x = token_ids(len(ROWS))
    together = logits(case, ROWS, x)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(together[i : i + 1], logits(case, [row], x[i : i + 1]), rtol=1e-4, atol=1e-4)
    plain = tiny_model(case)(x).logits
    assert torch.equal(together[0], plain[0])
    assert all(not torch.allclose(together[i], plain[i], atol=1e-2) for i in (1, 2))


@each_case
def test_cached_and_padded_is_uncached_and_not_padded(case: Case) -> None:
    n_pad = 0 if case.name in COMPRESSES_PADDING else 2
    x = token_ids(len(ROWS))
    padded = torch.cat([torch.zeros(len(x), n_pad, dtype=torch.long), x], dim=1)
    mask = (torch.arange(padded.shape[1]) >= n_pad).long().expand(len(x), -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    parts, past, start = [], None, 0
    with torch.no_grad(), steering(loaded(case), rows=ROWS):
        for stop in (n_pad + 3, n_pad + 4, n_pad + N_TOKENS):
            inputs: dict[str, Any] = {"position_ids": positions[:, start:stop]}
            if n_pad:
                inputs["attention_mask"] = mask[:, :stop]
            out = tiny_model(case)(padded[:, start:stop], past_key_values=past, use_cache=True, **inputs)
            past, start = out.past_key_values, stop
            parts.append(out.logits)
    steps = torch.cat(parts, dim=1)[:, n_pad:]
    torch.testing.assert_close(steps, logits(case, ROWS, x, use_cache=False), rtol=1e-3, atol=1e-3)


@each_case
def test_the_logits_of_a_last_layer_add_are_those_that_norm_and_head_predict(case: Case) -> None:
    last, x = HookPoint("resid_post", N_LAYERS - 1), token_ids()
    with seen(case.family.block(tiny_model(case), last.layer)) as block:
        tiny_model(case)(x)
    resid = leaving(block)
    moved = resid.clone()
    moved[:, 1:] += 3 * UP
    measured = logits(case, [[Intervention(Add(UP, 3.0), last)]] * 2, x)
    torch.testing.assert_close(measured, logits_of(case, moved), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(measured[:, 1:], logits_of(case, resid)[:, 1:], atol=1e-2)

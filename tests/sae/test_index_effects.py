"""What a latent does in the running model equals doing it by hand, one latent and one context at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from activations.hook_points import HookPoint
from activations.hooks import edit
from activations.models import LoadedModel, load_model
from sae.artefact import SaeArtefact
from sae.index_effects import AMPLIFY, LENS_TOKENS, PROMPT, ablation_effects, steering_scores
from sae.index_weights import logit_lens
from sae.reservoir import NO_TOKEN
from sae.torch_view import TorchSae
from sae.wiring import Wiring

D_MODEL, D_SAE = 32, 12


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), device="cpu", dtype="float32")


def sae_of(hook_point: str, scale: float = 1.0) -> TorchSae:
    rng, wiring = np.random.default_rng(0), Wiring.parse(hook_point)
    W_enc = rng.standard_normal((D_MODEL * len(wiring.reads), D_SAE)).astype(np.float32)
    W_dec = scale * rng.standard_normal((D_SAE, D_MODEL * len(wiring.writes))).astype(np.float32)
    rule = {"transcodes": True, "apply_b_dec_to_input": False} if wiring.transcodes else {}
    b_enc, b_dec = np.zeros(D_SAE, np.float32), np.zeros(W_dec.shape[1], np.float32)
    return TorchSae(SaeArtefact("standard", W_enc, b_enc, W_dec, b_dec, **rule))


def run(loaded: LoadedModel, ids: list[int], deltas: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Logits with something added at hook points, and what was there before."""
    from contextlib import ExitStack

    seen = {}
    with torch.inference_mode(), ExitStack() as stack:
        for name, delta in deltas.items():

            def add(h: torch.Tensor, name: str = name, delta: torch.Tensor = delta) -> torch.Tensor:
                seen[name] = h[0]
                return h + delta

            stack.enter_context(edit(loaded.model, loaded.family, HookPoint.parse(name), add))
        return loaded.model(input_ids=torch.tensor([ids])).logits[0], seen


@pytest.mark.parametrize("hook_point", ["resid_post.1", "resid_post.0->mlp_out.2", "resid_post.1+resid_post.2"])
def test_steering_scores_by_hand(loaded: LoadedModel, hook_point: str) -> None:
    wiring, sae = Wiring.parse(hook_point), sae_of(hook_point, 0.05)
    lens = logit_lens(loaded, sae.W_dec, LENS_TOKENS).top
    scores, changes = steering_scores(loaded, sae, wiring, lens, torch.tensor([1, 4, 7]))
    ids = loaded.tokenizer(PROMPT)["input_ids"]
    zero = torch.zeros(len(ids), D_MODEL)
    plain, seen = run(loaded, ids, dict.fromkeys(wiring.hook_points, zero))
    x = torch.cat([seen[name][-1] for name in wiring.reads])
    strength = AMPLIFY * float(sae.encode(x).max())
    before = torch.softmax(plain[-1], -1)
    for latent, score, change in zip([1, 4, 7], scores.tolist(), changes.tolist(), strict=True):
        parts = (strength * sae.W_dec[latent]).split(D_MODEL)
        deltas = {name: zero.clone() for name in wiring.writes}
        for name, part in zip(wiring.writes, parts, strict=True):
            deltas[name][-1] = part
        after = torch.softmax(run(loaded, ids, deltas)[0][-1], -1)
        order = after.argsort(descending=True).tolist()
        rank = min(order.index(token) for token in lens[latent].tolist())
        assert score == pytest.approx((1 - rank / len(after)) * float(after[lens[latent]].max()), rel=1e-4)
        confidence = [-float(p.topk(LENS_TOKENS).values.log().mean()) for p in (after, before)]
        assert change == pytest.approx(confidence[0] - confidence[1], abs=1e-4)
    assert scores.std() > 0


@pytest.mark.parametrize("hook_point", ["resid_post.1", "resid_post.0->mlp_out.2", "resid_post.1+resid_post.2"])
def test_ablation_effects_by_hand(loaded: LoadedModel, hook_point: str) -> None:
    wiring, sae = Wiring.parse(hook_point), sae_of(hook_point)
    ids = torch.randint(5, 290, (5, 9), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids[1, :3], ids[2, 6:], ids[3, 5:] = NO_TOKEN, NO_TOKEN, NO_TOKEN
    peak, latents = 4, torch.tensor([0, 3, 5, 7, 3])
    effects = ablation_effects(loaded, sae, wiring, ids, peak, latents)
    for row, latent, effect in zip(ids, latents.tolist(), effects.tolist(), strict=True):
        text = row[row != NO_TOKEN].tolist()
        at = peak - int((row[:peak] == NO_TOKEN).sum())
        zero = torch.zeros(len(text), D_MODEL)
        clean, seen = run(loaded, text, dict.fromkeys(wiring.hook_points, zero))
        values = sae.encode(torch.cat([seen[name] for name in wiring.reads], dim=-1))[:, latent].clone()
        values[0] = 0
        parts = (-values[:, None] * sae.W_dec[latent]).split(D_MODEL, dim=-1)
        ablated, _ = run(loaded, text, dict(zip(wiring.writes, parts, strict=True)))
        losses = [
            torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(text[1:]), reduction="none")[at:]
            for logits in (ablated, clean)
        ]
        expected = float((losses[0] - losses[1]).mean())  # NaN where nothing is behind the peak
        assert effect == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)
    assert torch.isnan(effects).tolist() == [False, False, False, True, False]


def test_nothing_active_on_the_prompt_is_not_measured(loaded: LoadedModel) -> None:
    sae = sae_of("resid_post.1")
    sae.b_enc -= 1e4
    scores = steering_scores(loaded, sae, Wiring.parse("resid_post.1"), torch.zeros(D_SAE, 3).long(), torch.arange(4))
    assert all(torch.isnan(part).all() for part in scores)


def test_a_direction_that_says_one_token_has_little_entropy(loaded: LoadedModel) -> None:
    unembedding = loaded.model.lm_head.weight.detach().float()
    one = unembedding[7] - unembedding.mean(0)
    lens = logit_lens(loaded, torch.stack([one, torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))]), 3)
    for row, direction in enumerate((one, torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1)))):
        logits = loaded.model.model.norm(1e3 * direction) @ unembedding.T
        p = torch.softmax(logits, -1)
        assert float(lens.entropy[row]) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)
    assert lens.top[0, 0] == 7

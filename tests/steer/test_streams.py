"""Steering a model whose residual stream is several streams: DeepSeek-V4, tiny and random."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activations.hook_points import SITES, HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel, load_model
from steer.operations import Add, Intervention
from steer.runtime import steering


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    path = tmp_path_factory.mktemp("models") / "tiny-deepseek-v4"
    config = DeepseekV4Config(
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=8,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        partial_rotary_factor=0.5,
        sliding_window=8,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        mlp_layer_types=["hash_moe", "moe", "moe"],
        vocab_size=len(tiny_tokenizer),
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DeepseekV4ForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), device="cpu", dtype="float32")


@pytest.fixture
def direction(loaded: LoadedModel) -> Tensor:
    v = torch.randn(loaded.d_model, generator=torch.Generator().manual_seed(0))
    return v / v.norm()


def ids(loaded: LoadedModel) -> Tensor:
    return torch.tensor([loaded.tokenizer("The river ran past the mill and on to the sea.")["input_ids"]])


@pytest.mark.parametrize("site", SITES)
def test_adds_the_vector_to_every_token_but_the_first(loaded: LoadedModel, direction: Tensor, site: str) -> None:
    point = HookPoint(site, 1)
    with capture(loaded.model, loaded.family, [point]) as before:
        run_until(loaded.model, {"input_ids": ids(loaded)})
    with (
        steering(loaded, [Intervention(Add(direction, 3.0), point)]),
        capture(loaded.model, loaded.family, [point]) as after,
    ):
        run_until(loaded.model, {"input_ids": ids(loaded)})
    moved = after[point] - before[point]
    assert not moved[0, 0].any()
    torch.testing.assert_close(moved[0, 1:], (3 * direction).expand_as(moved[0, 1:]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("site", SITES)
def test_cached_and_uncached_logits_agree(loaded: LoadedModel, direction: Tensor, site: str) -> None:
    x, cache, parts, start = ids(loaded), None, [], 0
    with torch.no_grad(), steering(loaded, [Intervention(Add(direction, 4.0), HookPoint(site, 1))]):
        whole = loaded.model(x, use_cache=False).logits
        for stop in (4, 5, 6, x.shape[1]):
            out = loaded.model(x[:, start:stop], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, stop
            parts.append(out.logits)
    unsteered = loaded.model(x, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(whole[:, 1:], unsteered[:, 1:], atol=1e-2)
    assert torch.equal(whole[:, 0], unsteered[:, 0])


@pytest.mark.parametrize("site", SITES)
def test_a_bfloat16_model_with_float32_mixers_can_be_steered(folder: Path, direction: Tensor, site: str) -> None:
    half = load_model(str(folder), device="cpu", dtype="bfloat16")
    block: Any = half.family.block(half.model, 1)
    assert block.attn_hc.fn.dtype == torch.float32
    with torch.no_grad(), steering(half, [Intervention(Add(direction, 4.0), HookPoint(site, 1))]):
        logits = half.model(ids(half)).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()

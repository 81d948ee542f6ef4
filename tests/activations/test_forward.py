"""Groups through the model: buffers, int8, and statistics of what is stored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.config import HarvestConfig
from activations.errors import ConfigError, MismatchError
from activations.forward import PASS_COST, Buffer, GroupRunner, cut, quantise
from activations.harvest import harvest, store_meta
from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from activations.store_schema import to_float32

HOOK = "resid_post.2"


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32")


def config(text: Path, out: Path, **changes: object) -> HarvestConfig:
    values = {"text": str(text), "out": str(out), "hook_points": (HOOK,), "ctx": 32, "batch_tokens": 96}
    return HarvestConfig.model_validate({**values, "commit_sequences": 8, "store_dtype": "float32", **changes})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Line {i}: {'on and on, ' * (i % 11)}to the end." for i in range(40)))
    return path


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-20, 1.0, 1e20]), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=60)
def test_int8_is_within_half_a_step(seed: int, scale: float, dtype: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(5, 16, generator=generator) * scale).to(getattr(torch, dtype))
    x[2] = 0
    steps, scales = quantise(x)
    back = to_float32(steps.numpy(), scales.numpy())
    error = np.abs(back - x.float().numpy())
    assert (error <= scales.numpy()[:, None] * (0.5 + 1e-5)).all()
    assert (back[2] == 0).all()
    largest = x.float().abs().amax(dim=1)
    np.testing.assert_allclose(scales.numpy() * 127, largest.numpy(), rtol=1e-6)
    assert (steps.abs().amax(dim=1)[largest > 0] == 127).all()


def test_int8_does_not_hide_what_is_not_finite() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        _, scale = quantise(torch.tensor([[1.0, bad, 2.0]]))
        assert not torch.isfinite(scale).any()


def test_an_int8_store_holds_the_rounded_activations(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    exact = ActivationStore.open(harvest(config(text, tmp_path / "a"), tiny).path)
    stored = ActivationStore.open(harvest(config(text, tmp_path / "b", store_dtype="int8"), tiny).path)
    steps, scale = quantise(torch.from_numpy(exact.activations(HOOK)))
    np.testing.assert_array_equal(stored.activations(HOOK), to_float32(steps.numpy(), scale.numpy()))
    sizes = [sum(store.storage.sizes(HOOK).values()) for store in (exact, stored)]
    assert sizes[1] < sizes[0] / 3.5
    x = stored.activations(HOOK)[stored.mask()]
    np.testing.assert_allclose(stored.stats(HOOK).mean, x.mean(axis=0, dtype=np.float64), atol=1e-6)
    assert stored.stats(HOOK).mean_norm == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-5)


def test_right_padding_needs_no_attention_mask(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    """Batches of unequal lengths, against each sequence alone."""
    meta = store_meta(config(text, tmp_path / "s", batch_tokens=32 * 8), tiny)
    runner, buffer = GroupRunner(meta, tiny), Buffer(meta, tiny.device)
    lengths = [32, 5, 1, 17, 32, 9, 30, 2]
    tokens = np.random.default_rng(0).integers(3, 250, (8, 32), dtype=np.int32)
    attend = np.arange(32) < np.array(lengths)[:, None]
    norms = runner.run(tokens, attend, buffer).norms()[HOOK]
    together = buffer.arrays(8)[HOOK].copy()
    for i, length in enumerate(lengths):
        with torch.no_grad():
            ids = torch.from_numpy(tokens[i : i + 1, :length]).long()
            alone = tiny.model(ids, output_hidden_states=True).hidden_states[3][0].numpy()
        np.testing.assert_allclose(together[i, :length], alone, atol=2e-5)
        assert (together[i, length:] == 0).all()
        np.testing.assert_allclose(norms[i, :length], np.linalg.norm(alone, axis=1), rtol=1e-5)


def test_a_buffer_keeps_nothing_of_the_group_before(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    meta = store_meta(config(text, tmp_path / "s"), tiny)
    runner, buffer = GroupRunner(meta, tiny), Buffer(meta, tiny.device)
    tokens = np.random.default_rng(0).integers(3, 250, (8, 32), dtype=np.int32)
    runner.run(tokens, np.ones((8, 32), bool), buffer)
    runner.run(tokens[:3], np.arange(32) < np.array([[4], [20], [1]]), buffer)
    assert [int((row != 0).any(axis=1).sum()) for row in buffer.arrays(3)[HOOK]] == [4, 20, 1]


def test_sums_are_those_of_the_unmasked_tokens(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    meta = store_meta(config(text, tmp_path / "s"), tiny)
    runner, buffer = GroupRunner(meta, tiny), Buffer(meta, tiny.device)
    rng = np.random.default_rng(1)
    runner.run(rng.integers(3, 250, (8, 32), dtype=np.int32), np.ones((8, 32), bool), buffer)
    mask = rng.random((8, 32)) < 0.5
    expected = buffer.arrays(8)[HOOK][mask].sum(axis=0, dtype=np.float64)
    np.testing.assert_allclose(runner.sums(buffer, HOOK, mask), expected, rtol=1e-5, atol=1e-5)


def test_blocks_are_compiled_one_by_one_and_given_back(
    tiny: LoadedModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the compiler makes is measured on a GPU (benchmarks/harvest.py); here is what it is asked to do."""
    calls: list[int] = []

    def compiler(forward: Any) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            calls.append(args[0].shape[1])
            return forward(*args, **kwargs)

        return compiled

    plain = ActivationStore.open(harvest(config(text, tmp_path / "a"), tiny).path)
    monkeypatch.setattr(torch, "compile", compiler)
    compiled = ActivationStore.open(harvest(config(text, tmp_path / "b", compile=True), tiny).path)
    np.testing.assert_allclose(compiled.activations(HOOK), plain.activations(HOOK), atol=2e-5)
    assert set(calls) == {32}, "one width for all"
    assert len(calls) % 3 == 0, "the blocks up to the hook point, and no further"
    assert all("forward" not in vars(tiny.family.block(tiny.model, layer)) for layer in range(4))
    with pytest.raises(MismatchError, match="compiled of the store"):
        harvest(config(text, tmp_path / "a", compile=True), tiny)


def test_a_site_inside_a_block_cannot_be_compiled(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Set compile=false"):
        harvest(config(text, tmp_path / "s", compile=True, hook_points=("attn_out.1",)), tiny)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(1, 300))
@settings(max_examples=60)
def test_cuts_cover_all_rows_within_the_limit_and_cost_least(lengths: list[int], batch_tokens: int) -> None:
    ordered = np.array(sorted(lengths, reverse=True))
    stops = cut(ordered, batch_tokens)
    starts = [0, *stops[:-1]]
    assert stops[-1] == len(ordered)
    assert stops == sorted(set(stops))
    for start, stop in zip(starts, stops, strict=True):
        assert stop - start == 1 or (stop - start) * ordered[start] <= batch_tokens
    fixed = max(1, batch_tokens // ordered[0])
    greedy = list(range(0, len(ordered), fixed))

    def cost(begins: list[int], ends: list[int]) -> float:
        return sum((b - a) * ordered[a] + PASS_COST * batch_tokens for a, b in zip(begins, ends, strict=True))

    assert cost(starts, stops) <= cost(greedy, [*greedy[1:], len(ordered)]) + 1e-6

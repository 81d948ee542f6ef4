"""Harvesting: the store holds what the model computes, masks what it should, and survives being stopped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from activations.config import HarvestConfig
from activations.errors import (
    DiskSpaceError,
    HookPointError,
    InterruptedRunError,
    MismatchError,
    NumericsError,
    TextError,
)
from activations.forward import GroupRunner
from activations.harvest import harvest, store_meta
from activations.models import LoadedModel, load_model
from activations.plan import measure_speed, plan
from activations.store import ActivationStore

HOOKS = ("resid_pre.1", "resid_post.1", "resid_post.2")


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), dtype="float32")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Forty documents of different lengths, one with a control token in it."""
    rows = [{"text": f"Document {i} says {'la ' * (5 * i % 37)}and ends here."} for i in range(39)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"text": "Hello <|im_start|>user and more."}]))
    return path


def config(text: Path, out: Path, model: Path | None = None, **changes: object) -> HarvestConfig:
    values = {
        "model": str(model or "unused"),
        "text": str(text),
        "hook_points": HOOKS,
        "out": str(out),
        "ctx": 32,
        "batch_tokens": 128,
        "commit_sequences": 8,
        "max_tokens": 10_000,
        "store_dtype": "float32",
        "compute_dtype": "float32",
    }
    return HarvestConfig.model_validate(values | changes)


def test_activations_equal_a_plain_forward(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    result = harvest(config(text, tmp_path / "s"), tiny)
    store = ActivationStore.open(result.path)
    assert store.is_complete
    assert result.n_tokens == store.mask().sum() > 500
    tokens, mask = store.tokens(), store.mask()
    for i in range(store.n_sequences):
        length = int(np.flatnonzero(mask[i]).max()) + 1
        with torch.no_grad():
            states = tiny.model(torch.from_numpy(tokens[i : i + 1, :length]).long(), output_hidden_states=True)
        for name, layer in zip(HOOKS, (1, 2, 3), strict=True):
            ours = store.activations(name, i, i + 1)[0, :length]
            np.testing.assert_allclose(ours, states.hidden_states[layer][0].numpy(), atol=2e-5)


def test_bfloat16_is_the_rounded_forward(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    exact = ActivationStore.open(harvest(config(text, tmp_path / "a"), tiny).path)
    stored = ActivationStore.open(harvest(config(text, tmp_path / "b", store_dtype="bfloat16"), tiny).path)
    expected = torch.from_numpy(exact.activations("resid_post.2")).bfloat16().float().numpy()
    np.testing.assert_array_equal(stored.activations("resid_post.2"), expected)


def test_padding_special_tokens_and_outliers_are_masked(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    store = ActivationStore.open(harvest(config(text, tmp_path / "s", outlier_norm=1.3), tiny).path)
    tokens, mask = store.tokens(), store.mask()
    control = tiny.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert (tokens == control).sum() == 1
    assert not mask[tokens == control].any()
    masked = store.state.masked
    assert masked["control"] == 1
    assert masked["bos"] == 0
    assert masked["padding"] > 0
    assert masked["norm_outlier"] > 0
    assert sum(masked.values()) + store.state.tokens == mask.size
    for name in HOOKS:
        norms = np.linalg.norm(store.activations(name)[mask], axis=1)
        assert norms.max() <= store.state.hooks[name].outlier_limit * (1 + 1e-6)


def test_no_token_sees_another_document(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    store = ActivationStore.open(harvest(config(text, tmp_path / "s"), tiny).path)
    pieces = [tiny.tokenizer.decode(row[used].tolist()) for row, used in zip(store.tokens(), store.mask(), strict=True)]
    assert all(piece.count("Document") <= 1 for piece in pieces)
    assert (np.diff(store.documents()) >= 0).all()


def test_a_token_budget_ends_at_a_group_and_can_be_raised(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    whole = ActivationStore.open(harvest(config(text, tmp_path / "whole"), tiny).path)
    first = harvest(config(text, tmp_path / "s", max_tokens=200), tiny)
    assert 200 <= first.n_tokens < whole.state.tokens
    assert ActivationStore.open(first.path).is_complete
    again = harvest(config(text, tmp_path / "s", max_tokens=200), tiny)
    assert again.new_tokens == 0
    harvest(config(text, tmp_path / "s"), tiny)
    assert ActivationStore.open(first.path).fingerprint == whole.fingerprint


def test_ctrl_c_keeps_what_was_committed(
    tiny: LoadedModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = GroupRunner.run, []

    def stop_at_third(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(GroupRunner, "run", stop_at_third)
    with pytest.raises(InterruptedRunError, match="Run the same command again"):
        harvest(config(text, tmp_path / "s"), tiny)
    assert ActivationStore.open(tmp_path / "s").n_sequences == 16
    monkeypatch.undo()
    harvest(config(text, tmp_path / "s"), tiny)
    harvest(config(text, tmp_path / "whole"), tiny)
    resumed, whole = ActivationStore.open(tmp_path / "s"), ActivationStore.open(tmp_path / "whole")
    assert resumed.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(resumed.activations(HOOKS[2]), whole.activations(HOOKS[2]))


def test_nan_names_the_place(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    broken = load_model(str(tiny_llama), dtype="float32")
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[broken.tokenizer("and")["input_ids"][-1]] = float("nan")
    with pytest.raises(NumericsError, match=r"resid_pre.1 in document 0, position \d+.*NaN"):
        harvest(config(text, tmp_path / "s"), broken)
    assert ActivationStore.open(tmp_path / "s").n_sequences == 0


def test_another_model_is_refused(tiny: LoadedModel, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    import dataclasses

    harvest(config(text, tmp_path / "s"), tiny)
    other = dataclasses.replace(tiny, fingerprint="another")
    with pytest.raises(MismatchError, match="model of the store"):
        harvest(config(text, tmp_path / "s"), other)


def test_a_hook_point_out_of_range(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    with pytest.raises(HookPointError, match="0 to 3"):
        harvest(config(text, tmp_path / "s", hook_points=("resid_post.4",)), tiny)
    assert not (tmp_path / "s").exists()


def test_empty_text(tiny: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    with pytest.raises(TextError):
        harvest(config(tmp_path / "empty.jsonl", tmp_path / "s"), tiny)


def test_too_little_disk_is_found_before_starting(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(text.read_text() + "\n" + json.dumps({"text": "on and on " * 5000}))
    with pytest.raises(DiskSpaceError, match="GB free"):
        harvest(config(long, tmp_path / "s", max_tokens=10**14), tiny)
    assert not (tmp_path / "s").exists()
    small = config(text, tmp_path / "s")
    assert plan(small, tiny, store_meta(small, tiny)).bytes_needed < 10**7


def test_measured_speed_is_a_speed(tiny: LoadedModel, text: Path, tmp_path: Path) -> None:
    settings = config(text, tmp_path / "s")
    assert 10 < measure_speed(settings, tiny, store_meta(settings, tiny), seconds=0.05) < 1e8

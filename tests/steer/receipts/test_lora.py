"""The LoRA baseline: it learns what it is shown, and the model is the same as before outside its context."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from activations.errors import ConfigError, CorruptArtefactError
from activations.models import LoadedModel, load_model
from steer.receipts.config import LoraTraining
from steer.receipts.lora import LoraAdapter, adapted, train

PROMPTS, TEXTS = ["The river", "A cat", "Numbers"] * 2, [" ran on to the sea.", " sat on the mat.", " are digits."] * 2
TRAINING = LoraTraining(rank=4, lr=2e-2, steps=30, batch_size=4)


@pytest.fixture(scope="module")
def own(tiny_llama: Path) -> LoadedModel:
    """A tiny model that may be changed."""
    return load_model(str(tiny_llama), dtype="float32")


@pytest.fixture(scope="module")
def adapter(own: LoadedModel) -> LoraAdapter:
    return train(own, PROMPTS, TEXTS, TRAINING)


def logits(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.tensor([loaded.tokenizer("The river ran on")["input_ids"]])
    with torch.no_grad():
        return loaded.model(ids).logits


def test_the_model_is_another_inside_and_the_same_outside(own: LoadedModel, adapter: LoraAdapter, tiny: LoadedModel):
    before = logits(tiny)
    assert torch.equal(logits(own), before), "training left something behind"
    with adapted(own, adapter):
        inside = logits(own)
        assert not torch.allclose(inside, before, atol=1e-2)
    assert torch.equal(logits(own), before)
    with adapted(own, adapter):
        assert torch.equal(logits(own), inside)
    names = [name for name, _ in tiny.model.named_modules()]
    assert [name for name, _ in own.model.named_modules()] == names
    assert not any(parameter.requires_grad for parameter in own.model.parameters())
    assert not own.model.training


def test_the_model_is_the_same_after_an_error_inside(own: LoadedModel, adapter: LoraAdapter, tiny: LoadedModel) -> None:
    with pytest.raises(RuntimeError, match="inside"), adapted(own, adapter):
        raise RuntimeError("inside")
    assert torch.equal(logits(own), logits(tiny))


def test_it_learns_continuations_and_not_prompts(own: LoadedModel, adapter: LoraAdapter) -> None:
    assert len(adapter.losses) == 30
    assert adapter.losses[-1] < 0.5 * adapter.losses[0]

    def cost(start: int, stop: int) -> float:
        ids = torch.tensor([own.tokenizer("The river ran on to the sea.")["input_ids"]])
        with torch.no_grad():
            p = own.model(ids).logits[0].log_softmax(-1)
        return -float(p[:-1].gather(1, ids[0, 1:, None])[start:stop].mean())

    head = len(own.tokenizer("The river")["input_ids"]) - 1
    before = cost(head, 99)
    with adapted(own, adapter):
        assert cost(head, 99) < 0.5 * before


def test_the_first_loss_is_the_cost_of_the_continuations(own: LoadedModel) -> None:
    first = train(own, PROMPTS[:1], TEXTS[:1], TRAINING.model_copy(update={"steps": 1})).losses[0]
    head = len(own.tokenizer(PROMPTS[0])["input_ids"])
    ids = torch.tensor([own.tokenizer(PROMPTS[0] + TEXTS[0])["input_ids"]])
    with torch.no_grad():
        p = own.model(ids).logits[0].log_softmax(-1)
    costs = -p[:-1].gather(1, ids[0, 1:, None])[head - 1 :]
    assert first == pytest.approx(float(costs.mean()), rel=1e-4)


def test_training_is_a_function_of_the_seed(own: LoadedModel, adapter: LoraAdapter) -> None:
    state = torch.random.get_rng_state()
    again, other = (train(own, PROMPTS, TEXTS, TRAINING, seed) for seed in (0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in adapter.tensors.items())
    assert again.losses != other.losses


def test_an_adapter_comes_back_from_disk(own: LoadedModel, adapter: LoraAdapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "lora.safetensors")
    back = LoraAdapter.load(tmp_path / "lora.safetensors")
    assert (back.training, back.losses, back.seconds) == (adapter.training, adapter.losses, adapter.seconds)
    assert all(torch.equal(tensor, back.tensors[name]) for name, tensor in adapter.tensors.items())
    assert 0 < adapter.n_bytes <= (tmp_path / "lora.safetensors").stat().st_size
    (tmp_path / "lora.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptArtefactError, match="trained again"):
        LoraAdapter.load(tmp_path / "lora.safetensors")


def test_an_adapter_of_another_model(own: LoadedModel, adapter: LoraAdapter) -> None:
    with pytest.raises(ConfigError, match="other weights"), adapted(own, replace(adapter, fingerprint="0")):
        pass


def test_without_peft(own: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"saekit\[lora\]"):
        train(own, PROMPTS, TEXTS, TRAINING)


def test_it_learns_in_bfloat16_too(tiny_llama: Path) -> None:
    half = load_model(str(tiny_llama), dtype="bfloat16")
    before = logits(half)
    learned = train(half, PROMPTS, TEXTS, TRAINING)
    assert torch.equal(logits(half), before)
    assert learned.losses[-1] < 0.5 * learned.losses[0]
    with adapted(half, learned):
        assert not torch.equal(logits(half), before)
    assert torch.equal(logits(half), before)

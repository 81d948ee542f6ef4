"""A LoRA fine-tune on the very pairs that a vector is made from, as a baseline for it.

h W becomes h (W + α/r · A B) with A [d_in, r] and B [r, d_out] in every linear layer but the unembedding (Hu et al.,
arXiv:2106.09685), by the library peft. Flow of `train`: 1. prompts and the continuations that show the concept become
token rows; 2. AdamW lowers the cost of the continuations' tokens, a batch drawn by the seed at a time; 3. what was
learned is kept as tensors. `adapted` puts it into the model and takes it out again: outside, the model is what it was,
bit for bit.

Left out: merging into weights, other adapters, schedules of the learning rate, and looking for a good one.
"""

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from activations.errors import ConfigError, CorruptArtefactError, NumericsError
from activations.models import LoadedModel
from steer.batches import IGNORED, logits_of, padded, token_rows
from steer.receipts.config import LoraTraining


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """What was learned, and how."""

    training: LoraTraining
    tensors: dict[str, Tensor]
    """by the names that peft gives them"""
    fingerprint: str
    """of the model it was trained on"""
    losses: list[float]
    """nats a token, by step"""
    seconds: float
    """what training took"""

    @property
    def n_bytes(self) -> int:
        """What it takes on disk."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def save(self, path: Path) -> None:
        """Write it as one safetensors file."""
        from safetensors.torch import save_file

        about = {"training": self.training.model_dump(), "fingerprint": self.fingerprint}
        about |= {"losses": self.losses, "seconds": self.seconds}
        save_file(self.tensors, path, metadata={"saekit": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> "LoraAdapter":
        """Read it back. Raises: CorruptArtefactError."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["saekit"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            training = LoraTraining.parse(about["training"], where=str(path))
            return cls(training, tensors, about["fingerprint"], about["losses"], about["seconds"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            fix = "Remove it, and it is trained again."
            raise CorruptArtefactError(path, expected="a LoRA of saekit", got=str(error), fix=fix) from error


def train(
    loaded: LoadedModel, prompts: Sequence[str], texts: Sequence[str], training: LoraTraining, seed: int = 0
) -> LoraAdapter:
    """Learn to continue each prompt with its text.

    Raises: ConfigError without peft, NumericsError if the loss is no longer finite.
    """
    start = time.perf_counter()
    rows = token_rows(loaded, prompts, texts)
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _injected(loaded, training, seed) as wrapped:
        learned = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=training.lr, weight_decay=0.0)
        order, losses = _order(len(rows), training, seed), []
        for batch in order:
            read = padded([rows[i] for i in batch], loaded.device)
            with torch.enable_grad():
                logits = logits_of(loaded, read)
                targets = read.labels[:, 1:].reshape(-1)
                loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED)
            if not bool(loss.detach().isfinite()):
                fix = "Lower the learning rate."
                raise NumericsError("LoRA training", expected="a finite loss", got=float(loss.detach()), fix=fix)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(wrapped)
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    return LoraAdapter(training, tensors, loaded.fingerprint, losses, time.perf_counter() - start)


@contextmanager
def adapted(loaded: LoadedModel, adapter: LoraAdapter) -> Iterator[None]:
    """Inside, the model is the fine-tuned one; outside, it is what it was.

    Raises: ConfigError if the adapter was trained on another model, or peft is not there.
    """
    if adapter.fingerprint != loaded.fingerprint:
        raise ConfigError(
            "LoRA", expected=f"one of {loaded.id}", got="one of other weights", fix="Train it on this model."
        )
    with _injected(loaded, adapter.training, 0) as wrapped, torch.no_grad():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(wrapped, adapter.tensors)
        yield


@contextmanager
def _injected(loaded: LoadedModel, training: LoraTraining, seed: int) -> Iterator[Any]:
    """The model with fresh LoRA layers in it, which add nothing yet."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        fix = "Run pip install 'saekit[lora]', or leave the condition lora out."
        raise ConfigError("LoRA", expected="the library peft", got="none", fix=fix) from error
    targets = LoraConfig(
        r=training.rank, lora_alpha=training.alpha, target_modules="all-linear", task_type="CAUSAL_LM", bias="none"
    )
    was_training = loaded.model.training
    with torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that those rename
            wrapped = get_peft_model(loaded.model, targets)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        loaded.model.train(was_training)


def _order(n: int, training: LoraTraining, seed: int) -> list[list[int]]:
    """Which rows each step takes: all of them in a shuffled order, and again."""
    rng, size = torch.Generator().manual_seed(seed), min(training.batch_size, n)
    passes = -(-training.steps * size // n)
    drawn = torch.cat([torch.randperm(n, generator=rng) for _ in range(passes)]).tolist()
    return [drawn[i * size : (i + 1) * size] for i in range(training.steps)]

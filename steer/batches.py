"""Token rows of unequal length as one batch, and what continuations cost the model.

Left out: residual streams of continuations (`steer.measures.effect`); prompts padded on the left, of lessons
(`steer.making.distil`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from activations.models import LoadedModel
from steer.plan import Interventions
from steer.runtime import steering

IGNORED = -100
"""label of tokens that are given and not asked for"""


class TokenRow(NamedTuple):
    """Token ids, of which the first `given` are a prompt's."""

    ids: list[int]
    given: int


class Batch(NamedTuple):
    """Rows padded on the right."""

    ids: Int[Tensor, "row pos"]
    attend: Bool[Tensor, "row pos"]
    new: Bool[Tensor, "row pos"]
    """True on what is not given"""
    heads: list[int]
    """tokens of each row that are given"""

    @property
    def labels(self) -> Int[Tensor, "row pos"]:
        """ids of what is not given, else IGNORED"""
        return torch.where(self.new, self.ids, IGNORED)


def token_rows(loaded: LoadedModel, prompts: Sequence[str], texts: Sequence[str]) -> list[TokenRow]:
    """Prompts with their continuations."""
    return [
        TokenRow(loaded.tokenizer(prompt + text)["input_ids"], len(loaded.tokenizer(prompt)["input_ids"]))
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def padded(rows: Sequence[TokenRow], device: torch.device) -> Batch:
    """A batch of rows."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, attend, new = (torch.zeros(shape, dtype=dtype) for dtype in (torch.long, torch.bool, torch.bool))
    for i, (row, given) in enumerate(rows):
        ids[i, : len(row)], attend[i, : len(row)], new[i, given : len(row)] = torch.tensor(row), True, True
    return Batch(ids.to(device), attend.to(device), new.to(device), [row.given for row in rows])


def logits_of(loaded: LoadedModel, batch: Batch) -> Float[Tensor, "row pos vocab"]:
    """In float32, on the model's device, wherever the batch is."""
    ids, attend = batch.ids.to(loaded.device), batch.attend.long().to(loaded.device)
    return loaded.model(input_ids=ids, attention_mask=attend, use_cache=False).logits.float()


def nlls(logits: Float[Tensor, "row pos vocab"], batch: Batch) -> list[float]:
    """Nats a token that is not given, on average; 0 where there is none."""
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none")
    rows = [loss[new[1:]] for loss, new in zip(losses, batch.new, strict=True)]
    return [float(row.mean()) if len(row) else 0.0 for row in rows]


def costs(
    loaded: LoadedModel,
    prompts: Sequence[str],
    texts: Sequence[str],
    interventions: Interventions = (),
    *,
    rows: int = 8,
) -> Float[np.ndarray, " text"]:
    """Nats a token that texts cost the model while it is steered, each after its prompt; 0 for an empty one.

    Args:
      rows: texts that are read together.
    """
    found, every = [], token_rows(loaded, prompts, texts)
    for start in range(0, len(every), rows):
        batch = padded(every[start : start + rows], loaded.device)
        with (
            torch.inference_mode(),
            steering(loaded, interventions, prompt_lengths=batch.heads, force=True, max_batch=rows),
        ):
            found += nlls(logits_of(loaded, batch), batch)
    return np.array(found)

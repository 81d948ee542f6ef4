"""Token rows of unequal length as one batch, and what the unsteered model makes of continuations, on its own device.

Left out: residual streams of continuations (`steer.effect`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from activations.models import LoadedModel

IGNORED = -100
"""label of tokens that are given and not asked for"""


class TokenRow(NamedTuple):
    """Token ids, of which the first `given` are a prompt's."""

    ids: list[int]
    given: int


class Batch(NamedTuple):
    """Rows padded on the right."""

    ids: Int[Tensor, "row pos"]
    attend: Int[Tensor, "row pos"]
    labels: Int[Tensor, "row pos"]
    """ids of what is not given, else IGNORED"""


def token_rows(loaded: LoadedModel, prompts: Sequence[str], texts: Sequence[str]) -> list[TokenRow]:
    """Prompts with their continuations."""
    return [
        TokenRow(loaded.tokenizer(prompt + text)["input_ids"], len(loaded.tokenizer(prompt)["input_ids"]))
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def padded(rows: Sequence[TokenRow], device: torch.device) -> Batch:
    """A batch of rows."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    attend, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (row, given) in enumerate(rows):
        ids[i, : len(row)], attend[i, : len(row)] = torch.tensor(row), 1
        labels[i, given : len(row)] = torch.tensor(row[given:], dtype=torch.long)
    return Batch(ids.to(device), attend.to(device), labels.to(device))


def costs(loaded: LoadedModel, prompts: Sequence[str], texts: Sequence[str], rows: int) -> list[float]:
    """Nats a token of each continuation, on average; 0 for an empty one. `rows` are read together."""
    found, every = [], token_rows(loaded, prompts, texts)
    for start in range(0, len(every), rows):
        batch = padded(every[start : start + rows], loaded.device)
        with torch.inference_mode():
            logits = loaded.model(input_ids=batch.ids, attention_mask=batch.attend, use_cache=False).logits.float()
            labels = batch.labels[:, 1:]
            losses = functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            asked = (labels != IGNORED).sum(1)
            found += (losses.sum(1) / asked.clamp(min=1)).tolist()
    return found

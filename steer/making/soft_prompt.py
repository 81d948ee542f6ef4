"""A soft prompt: trained input embeddings in front of a prompt (Lester et al., arXiv:2104.08691).

The baseline of learned vectors, with as many numbers to train: one embedding has d_model of them, as one vector has.
It starts from the context that it stands for, cut into as many equal pieces as there are embeddings, each piece being
the mean of its tokens' embeddings. It costs its own tokens in every request, which a vector does not.

Left out: keeping one; libraries hold vectors alone.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from activations.models import LoadedModel
from steer.making.distil import Batch, Student, log_probs


class SoftPrompt(NamedTuple):
    """Where it starts, and how far it was moved."""

    start: Float[Tensor, "n d_model"]
    moved: Float[Tensor, "n d_model"]
    """what is trained, in units in which every embedding of the model has the mean length sqrt(d_model)"""
    unit: float

    @classmethod
    def of(cls, loaded: LoadedModel, context: str, n: int) -> "SoftPrompt":
        """n embeddings that start from a context."""
        table = loaded.model.get_input_embeddings()
        ids = loaded.tokenizer(context, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            words = table(torch.tensor(ids, device=loaded.device)).float()
            every = table(torch.arange(len(loaded.tokenizer), device=loaded.device)).float()
        pieces = torch.arange(len(ids), device=loaded.device) * n // len(ids)
        rows = [words[pieces == i].mean(0) if bool((pieces == i).any()) else words.mean(0) for i in range(n)]
        unit = float(every.norm(dim=1).mean()) / loaded.d_model**0.5
        return cls(torch.stack(rows), torch.zeros(n, loaded.d_model, device=loaded.device, requires_grad=True), unit)

    @property
    def embeddings(self) -> Float[Tensor, "n d_model"]:
        """What the model reads."""
        return self.start + self.unit * self.moved


def with_soft_prompt(loaded: LoadedModel, soft: SoftPrompt) -> Student:
    """The model that reads a soft prompt in front of every row, behind its padding."""
    n, table = len(soft.start), loaded.model.get_input_embeddings()

    def student(batch: Batch) -> Float[Tensor, "row answer vocab"]:
        width = batch.ids.shape[1]
        column = torch.arange(width + n, device=batch.ids.device)
        where = column - (~batch.attend).long().cumprod(1).sum(1, keepdim=True)  # place behind a row's padding
        source = torch.where(where >= n, column - n, column).clamp(max=width - 1)
        is_soft = (where >= 0) & (where < n)
        ids, attend = batch.ids.gather(1, source), batch.attend.gather(1, source) | is_soft
        words = table(ids)
        mine = functional.embedding(where.clamp(0, n - 1), soft.embeddings.to(words.dtype))
        read = torch.where(is_soft[..., None], mine, words)
        places = torch.where(attend, attend.long().cumsum(1) - 1, -1)
        lengths = [n + length for length in batch.prompt_lengths]
        return log_probs(loaded, Batch(ids, attend, places, lengths, batch.answered), read)

    return student

"""Steering a PyTorch model while it runs.

    h[b, p] <- h[b, p] + coefficient * direction      at one hook point, for every token p of sequence b
                                                      except the first token of the sequence and padding

- Sign: a positive coefficient moves towards the direction, a negative one away from it.
- Zero guarantee: with coefficient 0 nothing is attached to the model, so its output is its own, bit for bit.
- The first token is spared because it is an attention sink whose norm is tens of times the others'; an SAE never
  sees it either. Positions count from the first attended token, so left padding changes nothing, and with a KV cache
  each token is steered exactly once, when it is computed.
- Each sequence of a batch may have its own vector: `Steer.delta` may be [batch, d_model].

Left out: gates, projections and clamps; speculative decoding; caches that were filled under other steering.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from activations.errors import MismatchError, ShapeError
from activations.hook_points import HookPoint
from activations.hooks import EditFn, edit
from activations.models import LoadedModel
from steer.vectors import SteeringVector


@dataclass(frozen=True)
class Steer:
    """Something to add at a hook point."""

    hook_point: HookPoint
    """where"""
    delta: Float[Tensor, " d_model"] | Float[Tensor, "batch d_model"]
    """coefficient * direction, for all sequences or for each"""

    @classmethod
    def of(cls, vector: SteeringVector, coefficient: float) -> "Steer":
        """Steer with a vector at a coefficient."""
        return cls(HookPoint.parse(vector.hook_point), coefficient * torch.from_numpy(vector.direction))


@contextmanager
def steering(loaded: LoadedModel, steers: Sequence[Steer]) -> Iterator[None]:
    """Steer every forward pass of `loaded.model` inside the context; several steers add up.

    Raises: ShapeError if a vector is not as wide as the residual stream, or if its batch is not the model's.
    """
    active = [steer for steer in steers if bool(steer.delta.any())]
    for steer in active:
        if steer.delta.shape[-1] != loaded.d_model:
            raise ShapeError(
                f"steering vector at {steer.hook_point}",
                expected=f"d_model {loaded.d_model}",
                got=steer.delta.shape[-1],
                fix="Use a vector that was made from this model.",
            )
    with ExitStack() as stack:
        if active:
            positions = _Positions()
            hook = loaded.model.register_forward_pre_hook(positions.see, with_kwargs=True)
            stack.callback(hook.remove)
            for steer in active:
                stack.enter_context(edit(loaded.model, loaded.family, steer.hook_point, _adder(steer, positions)))
        yield


def check_model(vector: SteeringVector, loaded: LoadedModel) -> None:
    """Raise MismatchError unless the vector was made from this very model."""
    if vector.model.fingerprint != loaded.fingerprint:
        raise MismatchError(
            f"vector '{vector.name}'",
            expected=f"a vector of {loaded.id}",
            got=f"one of {vector.model.id}",
            fix="Load the model that the vector was made from.",
        )


class _Positions:
    """Which tokens of the running forward pass may be steered."""

    keep: Bool[Tensor, "batch pos"] | Bool[Tensor, "1 pos"]

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Tensor | None = args[0] if args else kwargs.get("input_ids")
        new: Tensor = ids if ids is not None else kwargs["inputs_embeds"]
        length, mask = new.shape[1], kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.keep = ((mask.cumsum(1) > 1) & mask.bool())[:, -length:]
        else:
            cache = kwargs.get("past_key_values")
            past = cache.get_seq_length() if cache is not None else 0
            self.keep = (torch.arange(past, past + length, device=new.device) > 0)[None]


def _adder(steer: Steer, positions: _Positions) -> EditFn:
    def add(resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        delta = steer.delta.to(device=resid.device, dtype=resid.dtype)
        if delta.ndim == 2:
            if len(delta) != len(resid):
                raise ShapeError(
                    f"steering vectors at {steer.hook_point}",
                    expected=f"one a sequence, {len(resid)}",
                    got=len(delta),
                    fix="Give as many vectors as the batch has sequences.",
                )
            delta = delta[:, None, :]
        return torch.where(positions.keep[..., None], resid + delta, resid)

    return add

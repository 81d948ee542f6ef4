"""Reading and editing the residual stream of a running model, and what is added to it.

Flow: 1. a hook point becomes a hook on one module of one block, at the `Place` that the family gives for its site;
2. `capture` fills a dict on each forward pass; 3. `edit` replaces the value by a function of it; 4. `run_until` runs a
pass that a capture may stop right after its last hook point, so that later blocks and the unembedding cost nothing.

Hooks run in the order in which they were entered: a capture entered inside an edit sees what the edit wrote, one
entered around it sees what was there before.

Several residual streams are read as their mean in float32. An edit adds to every stream what it changes the mean by.

Left out: single streams, single heads and experts, and anything that survives its context.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activations.errors import ShapeError
from activations.families import ModelFamily
from activations.families.base import Place
from activations.hook_points import HookPoint

EditFn = Callable[[Tensor], Tensor]


class _StopForward(Exception):
    """Raised after the last hook point of a capture; only `run_until` catches it."""


@contextmanager
def capture(
    model: nn.Module,
    family: ModelFamily,
    hook_points: Iterable[HookPoint],
    *,
    stop_after_last: bool = False,
) -> Iterator[dict[HookPoint, Tensor]]:
    """Fill a dict with the value at each hook point, anew on each forward pass.

    Args:
      stop_after_last: end the pass right after the last hook point; run it with `run_until`, which expects that.
    Yields: hook point -> [batch, pos, d_model]. It is the model's own tensor, not copied, except where an edit would
      change it in place and where it is a mean over streams. It is attached to the model's graph if there is one, but
      what follows does not depend on a copy: for gradients at such a site, add zeros that require them with `edit`.
      Under a KV cache it holds the positions of the latest pass only.
    Raises: HookPointError if the model does not have a layer or a site.
    """
    points = sorted(set(hook_points), key=lambda point: point.depth)
    captured: dict[HookPoint, Tensor] = {}
    with ExitStack() as stack:
        for point in points:
            keep = partial(_keep, captured, point, stop_after_last and point == points[-1])
            stack.callback(_attach(model, family, point, keep).remove)
        yield captured


@contextmanager
def edit(model: nn.Module, family: ModelFamily, hook_point: HookPoint, fn: EditFn) -> Iterator[None]:
    """Replace the value at one hook point by `fn(value)` on each forward pass.

    `fn` must not change its argument in place. If it returns that same tensor, the model's output is left as it is,
    bit for bit.

    Raises: HookPointError if the model does not have the layer or the site; ShapeError, during the pass, if `fn`
      returns another shape or dtype.
    """
    handle = _attach(model, family, hook_point, fn)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def run_until(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run `model(**inputs)` without gradients or KV cache; a capture with `stop_after_last` may end it early.

    Returns: the model's output, or None if the pass was stopped.
    """
    try:
        return model(**{"use_cache": False, **inputs})
    except _StopForward:
        return None


def _keep(captured: dict[HookPoint, Tensor], point: HookPoint, stop: bool, value: Tensor) -> Tensor:
    captured[point] = value
    if stop:
        raise _StopForward
    return value


def _attach(model: nn.Module, family: ModelFamily, point: HookPoint, fn: EditFn) -> RemovableHandle:
    sites = family.sites(model.config)
    point.check(family.n_layers(model.config), sites)
    hook = _Hook(point, sites[point.site], fn)
    module = family.block(model, point.layer).get_submodule(hook.place.path)
    if hook.place.side == "input":
        return module.register_forward_pre_hook(hook.on_input, with_kwargs=True)
    return module.register_forward_hook(hook.on_output)


@dataclass(frozen=True)
class _Hook:
    """Applies a function to the value at a hook point, whenever the module at its place is called."""

    point: HookPoint
    place: Place
    fn: EditFn

    def on_input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self._applied(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._applied(kwargs["hidden_states"])}

    def on_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if not isinstance(output, tuple):
            return self._applied(output)
        item = self.place.item
        return (*output[:item], self._applied(output[item]), *output[item + 1 :])

    def _applied(self, tensor: Tensor) -> Tensor:
        value = self._read(tensor)
        edited = self.fn(value)
        if edited is value:
            return tensor
        if edited.shape != value.shape or edited.dtype != value.dtype:
            raise ShapeError(
                f"edit at {self.point}",
                expected=f"{tuple(value.shape)} {value.dtype}",
                got=f"{tuple(edited.shape)} {edited.dtype}",
                fix="Return a tensor of the shape and dtype of the one that was given.",
            )
        return self._write(tensor, edited, value)

    def _read(self, tensor: Tensor) -> Tensor:
        if self.place.streams:
            return tensor.mean(dim=2, dtype=torch.float32)
        return tensor.clone() if self.place.shared else tensor

    def _write(self, tensor: Tensor, edited: Tensor, value: Tensor) -> Tensor:
        new = (tensor + (edited - value)[:, :, None]).to(tensor.dtype) if self.place.streams else edited
        return tensor.copy_(new) if self.place.shared else new

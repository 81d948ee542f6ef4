"""Reading and editing the residual stream of a running model.

Flow: 1. a hook point becomes a hook on one block: a forward pre-hook for resid_pre, a forward hook for resid_post;
2. `capture` fills a dict on each forward pass; 3. `edit` replaces the residual stream by a function of it;
4. `run_until` runs a pass that a capture may stop right after its last hook point, so that later blocks and the
unembedding cost nothing.

Hooks run in the order in which they were entered: a capture entered inside an edit sees what the edit wrote, one
entered around it sees what was there before. Left out: sites inside a block, and anything that survives its context.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activations.errors import ShapeError
from activations.families import ModelFamily
from activations.hook_points import HookPoint

Resid = Float[Tensor, "batch pos d_model"]
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
    """Fill a dict with the residual stream at each hook point, anew on each forward pass.

    Args:
      stop_after_last: end the pass right after the last hook point; run it with `run_until`, which expects that.
    Yields: hook point -> the model's own tensor [batch, pos, d_model], not copied, attached to its graph if there is
      one. Under a KV cache it holds the positions of the latest pass only.
    Raises: HookPointError if the model does not have a layer.
    """
    points = sorted(set(hook_points), key=_depth)
    captured: dict[HookPoint, Tensor] = {}

    def store(point: HookPoint) -> EditFn:
        def read(resid: Tensor) -> Tensor:
            captured[point] = resid
            if stop_after_last and point == points[-1]:
                raise _StopForward
            return resid

        return read

    with ExitStack() as stack:
        for point in points:
            stack.callback(_attach(model, family, point, store(point)).remove)
        yield captured


@contextmanager
def edit(model: nn.Module, family: ModelFamily, hook_point: HookPoint, fn: EditFn) -> Iterator[None]:
    """Replace the residual stream at one hook point by `fn(resid)` on each forward pass.

    `fn` must not change its argument in place. If it returns that same tensor, the model's output is left as it is,
    bit for bit.

    Raises: HookPointError if the model does not have the layer; ShapeError, during the pass, if `fn` returns another
      shape or dtype.
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


def _depth(point: HookPoint) -> tuple[int, bool]:
    return point.layer, point.site == "resid_post"


def _attach(model: nn.Module, family: ModelFamily, point: HookPoint, fn: EditFn) -> RemovableHandle:
    point.check(family.n_layers(model.config))
    block = family.block(model, point.layer)
    if point.site == "resid_pre":
        return block.register_forward_pre_hook(_pre_hook(point, fn), with_kwargs=True)
    return block.register_forward_hook(_post_hook(family, point, fn))


def _pre_hook(point: HookPoint, fn: EditFn) -> Callable[[nn.Module, tuple, dict], tuple[tuple, dict] | None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        resid = args[0] if args else kwargs["hidden_states"]
        edited = fn(resid)
        if edited is resid:
            return None
        _check_same_kind(point, resid, edited)
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    return hook


def _post_hook(family: ModelFamily, point: HookPoint, fn: EditFn) -> Callable[[nn.Module, tuple, Any], Any]:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        resid = family.get_resid(output)
        edited = fn(resid)
        if edited is resid:
            return None
        _check_same_kind(point, resid, edited)
        return family.set_resid(output, edited)

    return hook


def _check_same_kind(point: HookPoint, resid: Tensor, edited: Tensor) -> None:
    if edited.shape != resid.shape or edited.dtype != resid.dtype:
        raise ShapeError(
            f"edit at {point}",
            expected=f"{tuple(resid.shape)} {resid.dtype}",
            got=f"{tuple(edited.shape)} {edited.dtype}",
            fix="Return a tensor of the shape and dtype of the residual stream.",
        )

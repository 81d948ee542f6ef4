"""Groups of sequences through the model: activations in their stored form, and statistics of them.

Flow: 1. batches of similar length run up to the last hook point and no further; 2. what each hook point holds is
converted to the stored dtype on the device and put into the group's buffer there; 3. norms and sums are computed on
the device from the stored values, so that they describe what a trainer will read; 4. the buffer is copied to pinned
host memory.

On a GPU step 1 and 2 only ask for the work, and 3 and 4 run beside the forward passes of the next group. On a CPU the
buffers of steps 2 and 4 are the same memory. Buffers are used in turn, so memory does not grow with the text. Left out:
where groups come from and where they go.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from activations.devices import sent
from activations.errors import ConfigError, ModelError
from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from activations.quiet import first_line
from activations.store_schema import StoreMeta, layout, scale_name

INT8_STEPS = 127
PASS_COST = 1 / 32
_SLICE_BYTES = 1 << 26
_TORCH = {"uint16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}


class Buffer:
    """Room for the activations of one group, on the device and, apart from a CPU, pinned on the host."""

    def __init__(self, meta: StoreMeta, device: torch.device):
        arrays = {name: array for name, array in layout(meta).items() if name not in ("tokens", "mask", "documents")}
        shapes = {name: (meta.commit_sequences, *array.tail) for name, array in arrays.items()}
        dtypes = {name: _TORCH[str(array.dtype)] for name, array in arrays.items()}
        self.device = {name: torch.empty(shapes[name], dtype=dtypes[name], device=device) for name in arrays}
        self._host = self.device
        if device.type == "cuda":
            self._host = {n: torch.empty(shapes[n], dtype=dtypes[n], pin_memory=True) for n in arrays}

    def arrays(self, n: int) -> dict[str, np.ndarray]:
        """The first `n` sequences on the host, bfloat16 as uint16 bits; valid until the buffer is used again."""
        if self._host is not self.device:
            for name, values in self.device.items():
                self._host[name][:n].copy_(values[:n], non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return {name: _numpy(values[:n]) for name, values in self._host.items()}


class GroupRunner:
    """Runs the groups of one harvest.

    Raises: ConfigError if the blocks are to be compiled and a hook point lies inside one.
    """

    def __init__(self, meta: StoreMeta, loaded: LoadedModel):
        self._meta, self._loaded = meta, loaded
        self._points = [HookPoint.parse(name) for name in meta.hook_points]
        self._is_cuda = loaded.device.type == "cuda"
        self._side = torch.cuda.Stream(loaded.device) if self._is_cuda else None
        self._compiled = self._compile() if meta.compiled else []

    def run(self, tokens: Int[np.ndarray, "seq ctx"], attend: Bool[np.ndarray, "seq ctx"], buffer: Buffer) -> "Running":
        """Fill the device's part of `buffer` with the activations of a group, zero where nothing is attended.

        On a GPU this returns before the work is done; `Running` is how to wait for it.
        """
        for values in buffer.device.values():
            values[: len(tokens)].zero_()
        lengths = attend.sum(axis=1)
        order = np.argsort(-lengths, kind="stable")
        with (
            self._blocks_compiled(),
            capture(self._loaded.model, self._loaded.family, self._points, stop_after_last=True) as captured,
        ):
            for rows, width in self._batches(order, lengths[order]):
                self._run_batch(rows, tokens[rows, :width], attend[rows, :width], buffer, captured)
        norms = {name: self._norms(buffer, name, len(tokens)) for name in self._meta.hook_points}
        done = torch.cuda.Event() if self._is_cuda else None
        if done is not None:
            done.record(torch.cuda.current_stream(self._loaded.device))
        return Running(norms, done)

    def beside(self) -> AbstractContextManager[object]:
        """Inside it, what is asked of a GPU runs beside the forward passes instead of behind them."""
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def sums(self, buffer: Buffer, name: str, mask: Bool[np.ndarray, "seq ctx"]) -> Float64[np.ndarray, " d_model"]:
        """Sum over the unmasked tokens of what `buffer` holds for one hook point."""
        used = self._to_device(mask)
        total = torch.zeros(self._loaded.d_model, dtype=torch.float64, device=self._loaded.device)
        for rows in self._slices(len(mask)):
            x = widened(buffer.device, name, rows)
            total += (x * used[rows, :, None]).sum(dim=1).sum(dim=0, dtype=torch.float64)
        return total.cpu().numpy()

    def _batches(
        self, order: Int[np.ndarray, " seq"], lengths: Int[np.ndarray, " seq"]
    ) -> Iterator[tuple[Int[np.ndarray, " row"], int]]:
        """Rows and width of each forward pass; `lengths` are those of `order`, longest first.

        Compiled blocks get one width, since each new one would be compiled anew.
        """
        if self._meta.compiled:
            lengths = np.full_like(lengths, self._meta.ctx)
        start = 0
        for stop in cut(lengths, self._meta.batch_tokens):
            yield order[start:stop], max(1, int(lengths[start]))
            start = stop

    def _run_batch(
        self,
        rows: Int[np.ndarray, " row"],
        tokens: Int[np.ndarray, "row pos"],
        attend: Bool[np.ndarray, "row pos"],
        buffer: Buffer,
        captured: Mapping[HookPoint, Tensor],
    ) -> None:
        # No attention mask: padding is on the right, where no token attends, and without one attention takes its
        # faster, purely causal path.
        run_until(self._loaded.model, {"input_ids": self._to_device(tokens).long()})
        keep = None if attend.all() else self._to_device(attend)
        where = self._to_device(rows)
        for point, resid in captured.items():
            _keep(buffer.device, str(point), where, resid, keep)

    def _to_device(self, values: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(np.ascontiguousarray(values)), self._loaded.device)

    def _norms(self, buffer: Buffer, name: str, n: int) -> Float[Tensor, "seq ctx"]:
        parts = [torch.linalg.vector_norm(widened(buffer.device, name, rows), dim=-1) for rows in self._slices(n)]
        return torch.cat(parts)

    def _slices(self, n: int) -> list[slice]:
        rows = max(1, _SLICE_BYTES // (4 * self._meta.ctx * self._meta.model.d_model))
        return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]

    def _compile(self) -> list[tuple[nn.Module, Any]]:
        for point in self._points:
            if point.site not in ("resid_pre", "resid_post"):
                raise ConfigError(
                    f"compile with hook point {point}",
                    expected="hook points between blocks: resid_pre or resid_post",
                    got=point.site,
                    fix="Set compile=false.",
                )
        layers = range(1 + max(point.layer for point in self._points))
        blocks = [self._loaded.family.block(self._loaded.model, layer) for layer in layers]
        return [(block, torch.compile(block.forward)) for block in blocks]

    @contextmanager
    def _blocks_compiled(self) -> Iterator[None]:
        """Let each block's own computation be compiled; the hooks on it stay outside of what is compiled."""
        for block, forward in self._compiled:
            block.forward = forward
        try:
            yield
        except (TorchDynamoException, InductorError) as error:
            raise ModelError(
                self._loaded.id, expected="torch.compile to work here", got=first_line(error), fix="Set compile=false."
            ) from error
        finally:
            for block, _ in self._compiled:
                del block.forward  # which uncovers the one of its class


class Running(NamedTuple):
    """A group whose forward passes were started."""

    device_norms: Mapping[str, Float[Tensor, "seq ctx"]]
    done: "torch.cuda.Event | None"

    def norms(self) -> dict[str, Float[np.ndarray, "seq ctx"]]:
        """||x|| of the stored values by hook point; waits for the forward passes."""
        if self.done is not None:
            self.done.wait()
        return {name: values.cpu().numpy() for name, values in self.device_norms.items()}


def cut(lengths: Int[np.ndarray, " seq"], batch_tokens: int) -> list[int]:
    """Where to cut sequences, longest first, into batches so that they cost least.

    A batch costs its positions, rows times the length of its first, and PASS_COST * batch_tokens for being one more
    pass; it has at most `batch_tokens` positions, or one row.

    >>> cut(np.array([8, 8, 8, 2, 2, 2]), 24)
    [3, 6]
    >>> cut(np.array([8, 8, 8, 7, 7, 7]), 1000)
    [6]
    """
    n = len(lengths)
    least, last = np.zeros(n + 1), [0] * (n + 1)
    for stop in range(1, n + 1):
        starts = [i for i in range(stop) if i == stop - 1 or (stop - i) * lengths[i] <= batch_tokens]
        costs = [least[i] + (stop - i) * lengths[i] + PASS_COST * batch_tokens for i in starts]
        best = int(np.argmin(costs))
        least[stop], last[stop] = costs[best], starts[best]
    stops = []
    while n:
        stops.append(n)
        n = last[n]
    return stops[::-1]


def quantise(x: Float[Tensor, "... d_model"]) -> tuple[Int[Tensor, "... d_model"], Float[Tensor, "..."]]:
    """Each token as int8 steps of its own scale: scale = max |x| / 127, q = round(x / scale).

    So |x - q scale| <= scale / 2. A token of zeros has scale 0. NaN and infinity end up in the scale.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=-1) / INT8_STEPS
    steps = torch.where(scale[..., None] > 0, wide / scale[..., None], 0.0)
    return torch.nan_to_num(steps, 0.0, 0.0, 0.0).round().to(torch.int8), scale


def _keep(
    device: dict[str, Tensor],
    name: str,
    rows: Int[Tensor, " row"],
    resid: Float[Tensor, "row pos d_model"],
    keep: Bool[Tensor, "row pos"] | None,
) -> None:
    """Put a batch into a group's buffer, zero where `keep` is not."""
    width, target = resid.shape[1], device[name]
    if keep is not None:
        resid = resid.masked_fill(~keep[..., None], 0)
    if target.dtype == torch.int8:
        steps, scale = quantise(resid)
        target[rows, :width] = steps
        device[scale_name(name)][rows, :width] = scale
    else:
        target[rows, :width] = resid.to(target.dtype)


def widened(device: Mapping[str, Tensor], name: str, rows: slice) -> Float[Tensor, "row ctx d_model"]:
    """What a buffer holds of one hook point, in float32."""
    x = device[name][rows].float()
    return x * device[scale_name(name)][rows][..., None] if scale_name(name) in device else x


def _numpy(values: Tensor) -> np.ndarray:
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()

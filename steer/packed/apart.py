"""What lanes read that `reads_apart`, in kernels of Triton which end where no token needs it: for passes in graphs.

A pass that is captured reads all that it may ever have to, so what nobody asks for has to cost next to nothing. z of a
slot is found on the tokens of its own request alone, in two launches:

1. `_encode`, for an SAE that has to be: pre-activations, a block of tokens and latents to a program, where any of the
   tokens is one that any slot of the lane acts on; the programs of other blocks end at once;
2. `_find`, a program to a token: z of the slots in whose range its index lies. A latent is one of the k largest if
   fewer than k are larger, so nothing has to be sorted.

What no slot asks for is left as it was, and is read by nobody (`Lane.change` and the kernel of `steer.packed.kernel`
look at a slot where it acts). It does what `Lane.read` does, to rounding. Left out: passes in no graph, where only
lanes in use are read and a product of PyTorch is faster.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor, nn

from steer.packed.kernel import FEWEST, acting, compiled, on_device
from steer.packed.tables import Batch
from steer.tables import Lane

# Triton's own annotations take a block for a number.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

TOKENS, LATENTS, INNER = 32, 64, 32
"""of a block of pre-activations, and numbers of d_model that are multiplied at once"""
AT_ONCE = 1024
"""pre-activations of a token that are compared at once"""


def read_apart(
    hidden: Float[Tensor, "pos d_model"], residual: Float[Tensor, "pos d_model"] | None, lane: Lane, batch: Batch
) -> Float[Tensor, "1 pos k"]:
    """z of each slot on the tokens that it may act on; whatever on others.

    Args:
      hidden, residual: the residual stream at the hook point that the lane reads, which is the sum of both.
    """
    n, d_model = hidden.shape
    other = hidden if residual is None else residual
    z = _room(hidden, lane.n_slots)
    pre, k, d_sae = z, 0, 0
    common = {"has_residual": residual is not None, "d_model": d_model}
    with on_device(hidden):
        if lane.key.topk is not None:
            assert isinstance(lane.encoder, nn.Linear)
            k, d_sae = int(lane.key.topk.k or 1), lane.key.topk.d_sae
            pre = _room(hidden, d_sae)
            _encode[(triton.cdiv(d_sae, LATENTS), triton.cdiv(n, TOKENS))](
                hidden, other, batch.index, lane.low, lane.high, lane.encoder.weight, lane.encoder.bias, pre,
                n, lane.n_slots, d_sae, **common,
                tokens=TOKENS, latents=LATENTS, inner=INNER, fewest=FEWEST,
            )  # fmt: skip
        _find[(n,)](
            hidden, other, batch.index, lane.low, lane.high, lane.reads, lane.bias, lane.threshold, lane.latent, pre, z,
            lane.n_slots, k, d_sae, **common, is_encoded=lane.key.topk is not None,
            slots=triton.next_power_of_2(max(FEWEST, lane.n_slots)), block=triton.next_power_of_2(d_model),
            at_once=AT_ONCE,
        )  # fmt: skip
    return z[None]


def _room(hidden: Float[Tensor, "pos d_model"], n: int) -> Float[Tensor, "pos {n}"]:
    """For so many numbers a token, which are whatever was there."""
    return hidden.new_empty((len(hidden), n), dtype=torch.float32)


@compiled("n", "n_slots")
def _encode(
    hidden, residual, index, low, high, weight, bias, pre, n, n_slots, d_sae,
    has_residual: tl.constexpr, d_model: tl.constexpr, tokens: tl.constexpr, latents: tl.constexpr,
    inner: tl.constexpr, fewest: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0) * latents + tl.arange(0, latents)
    token = tl.program_id(1) * tokens + tl.arange(0, tokens)
    now = tl.load(index + token, mask=token < n, other=-1)
    if tl.max(now, 0) < 0:
        return
    n_acting = 0
    for start in range(0, n_slots, fewest):
        slot = start + tl.arange(0, fewest)
        hit = acting(slot[None, :], now[:, None], low, high, n_slots)
        n_acting += tl.sum(tl.sum(hit.to(tl.int32), 1), 0)
    if n_acting > 0:
        total = tl.zeros([tokens, latents], dtype=tl.float32)
        for start in range(0, d_model, inner):
            at = start + tl.arange(0, inner)
            place = token[:, None] * d_model + at[None, :]
            is_there = (token < n)[:, None] & (at < d_model)[None, :]
            x = tl.load(hidden + place, mask=is_there, other=0.0).to(tl.float32)
            if has_residual:
                x += tl.load(residual + place, mask=is_there, other=0.0).to(tl.float32)
            is_row = (latent < d_sae)[:, None] & (at < d_model)[None, :]
            w = tl.load(weight + latent[:, None] * d_model + at[None, :], mask=is_row, other=0.0)
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        total += tl.load(bias + latent, mask=latent < d_sae, other=0.0)[None, :]
        place = token[:, None] * d_sae + latent[None, :]
        tl.store(pre + place, total, mask=(token < n)[:, None] & (latent < d_sae)[None, :])


@compiled("n_slots")
def _find(
    hidden, residual, index, low, high, reads, bias, threshold, latent, pre, z, n_slots, k, d_sae,
    has_residual: tl.constexpr, d_model: tl.constexpr, is_encoded: tl.constexpr, slots: tl.constexpr,
    block: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    now = tl.load(index + token)
    if now < 0:
        return
    at = tl.arange(0, block)
    x = tl.load(hidden + token * d_model + at, mask=at < d_model, other=0.0).to(tl.float32)
    if has_residual:
        x += tl.load(residual + token * d_model + at, mask=at < d_model, other=0.0).to(tl.float32)
    slot = tl.arange(0, slots)
    hit = acting(slot, now, low, high, n_slots)
    for _ in range(tl.sum(hit.to(tl.int32), 0)):
        i = tl.min(tl.where(hit, slot, slots), 0)
        hit = hit & (slot != i)
        if is_encoded:
            own = pre + token * d_sae
            s = tl.load(own + tl.load(latent + i))
            n_larger = 0
            for start in range(0, d_sae, at_once):
                other = start + tl.arange(0, at_once)
                value = tl.load(own + other, mask=other < d_sae, other=float("-inf"))
                n_larger += tl.sum((value > s).to(tl.int32), 0)
            is_active = n_larger < k
        else:
            row = tl.load(reads + i * d_model + at, mask=at < d_model, other=0.0)
            s = tl.sum(row * x, 0) + tl.load(bias + i)
            is_active = True
        tl.store(z + token * n_slots + i, tl.where(is_active & (s > tl.load(threshold + i)), s, 0.0))

"""Tables of slots: what the runtime holds on the device, and how it is applied to a forward pass.

A `Lane` is the slots of one hook point that are of one kind: where they read, which SAE decides about their threshold,
whether lengths are kept. Its buffers are [row, slot, ...], with one row for every sequence of the batch, or one for
all. Their shapes are fixed when it is made and their contents are rewritten in place, so that a compiled model goes on
as it is. A slot that is not used acts on no token.

Whether a slot acts on a token is data too:

    low <= index < high   and, for one of the slot's clauses, every needed flag is up and no vetoed one is

where flags are the latches of scopes and the gates, in the order in which a forward pass comes by them.

Left out: which module calls this when (`steer.runtime`).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from activations.devices import sent
from activations.hook_points import HookPoint
from sae.artefact import SaeArtefact
from steer.operations import Slot

FEW = 4
"""slots up to which one is applied after the other, which a compiler fuses; more take a matrix product"""
MOST_ENCODED = 2**26
"""pre-activations of an SAE that are there at once; 4 bytes each, and as much again while the largest are found"""


class LaneKey(NamedTuple):
    """What the slots of a lane have in common."""

    acts: HookPoint
    reads: HookPoint | None
    """none: they read nothing"""
    topk: SaeArtefact | None
    """the SAE that has to be encoded to know which latents are active"""
    keeps_norm: bool

    @classmethod
    def of(
        cls, acts: HookPoint, reads: HookPoint | None, sae: SaeArtefact | None, keeps_norm: bool = False
    ) -> "LaneKey":
        """The lane of an operation, or of all latents of an SAE."""
        return cls(acts, reads, sae if sae is not None and sae.architecture == "topk" else None, keeps_norm)

    @property
    def reads_apart(self) -> bool:
        """Whether what is read is not found where it acts from one row alone: elsewhere, or of an SAE, encoded."""
        return self.reads is not None and (self.topk is not None or self.reads != self.acts)


class Where(NamedTuple):
    """On which tokens of a sequence a slot acts."""

    low: int
    high: int
    clauses: tuple[frozenset[tuple[int, bool]], ...]
    """flags that have to be up (True) or not (False), all of one clause; no clause: never"""


class Row(NamedTuple):
    """A slot and where it acts."""

    slot: Slot
    where: Where


class Lane(nn.Module):
    """The slots of one kind at one hook point."""

    writes: Float[Tensor, "row k d_model"]
    reads: Float[Tensor, "row k d_model"]
    constant: Float[Tensor, "row k"]
    bias: Float[Tensor, "row k"]
    threshold: Float[Tensor, "row k"]
    gain: Float[Tensor, "row k"]
    floor: Float[Tensor, "row k"]
    ceiling: Float[Tensor, "row k"]
    strength: Float[Tensor, "row k"]
    latent: Int[Tensor, "row k"]
    low: Int[Tensor, "row k"]
    high: Int[Tensor, "row k"]
    need: Bool[Tensor, "row k clause flag"]
    veto: Bool[Tensor, "row k clause flag"]

    def __init__(
        self,
        key: LaneKey,
        n_slots: int,
        n_rows: int,
        n_clauses: int,
        n_flags: int,
        d_model: int,
        encoder: nn.Module | None = None,
    ):
        """Make the table, empty. Args: encoder: that of another lane of its key; none: it makes its own."""
        super().__init__()
        self.key, self.n_slots, self.is_empty = key, n_slots, True
        shape, conditions = (n_rows, n_slots), (n_rows, n_slots, n_clauses, n_flags)
        self._buffer("writes", torch.zeros(*shape, d_model))
        for name in ("low", "high", "latent"):
            self._buffer(name, torch.zeros(shape, dtype=torch.long))
        for name in ("need", "veto"):
            self._buffer(name, torch.zeros(conditions, dtype=torch.bool))
        for name in ("constant", "bias", "threshold", "gain", "floor", "ceiling", "strength"):
            self._buffer(name, torch.zeros(shape))
        self._buffer("reads", torch.zeros(*shape, d_model) if key.reads is not None else torch.zeros(0))
        self.encoder = encoder if encoder is not None or key.topk is None else _encoder(key.topk)

    def _buffer(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def fill(self, rows: Sequence[Sequence[Row]]) -> None:
        """Rewrite the table: the slots of each row of it, no more than there is room for."""
        at = [(r, k) for r, row in enumerate(rows) for k in range(len(row))]
        self.is_empty = not at
        with torch.inference_mode(False), torch.no_grad():
            values = {} if self.is_empty else self._values([each for row in rows for each in row])
            for name, buffer in self.named_buffers(recurse=False):
                new = torch.zeros_like(buffer, device="cpu")
                if name in values:
                    new[tuple(torch.tensor(at).T)] = values[name]
                buffer.copy_(new)

    def put(self, places: Sequence[int], rows: Sequence[Row]) -> None:
        """Rewrite some slots of the only row of the table, and no others; at least one."""
        device = self.low.device
        with torch.inference_mode(False), torch.no_grad():
            at = sent(torch.tensor(places), device)
            for name, values in self._values(rows).items():
                self.get_buffer(name).index_copy_(1, at, sent(values, device)[None])

    def _values(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What slots, at least one, are in the buffers, by name; one behind the other."""
        found = {
            name: torch.tensor([of(*row) for row in rows], dtype=self.get_buffer(name).dtype)
            for name, of in _NUMBERS.items()
        }
        found["writes"] = torch.stack([slot.writes for slot, _ in rows])
        if self.key.reads is not None:
            nothing = torch.zeros_like(found["writes"][0])
            found["reads"] = torch.stack([nothing if slot.reads is None else slot.reads for slot, _ in rows])
        return found | _conditions([where for _, where in rows], *self.need.shape[2:])

    def first(self, n_slots: int, n_clauses: int | None = None) -> "Lane":
        """Its first slots alone, and the first clauses of each, in the very same memory."""
        view = copy.copy(self)
        view._buffers = {
            name: buffer if buffer is None or buffer.ndim < 2 else buffer[:, :n_slots]
            for name, buffer in self._buffers.items()
        }
        view.need, view.veto = view.need[:, :, :n_clauses], view.veto[:, :, :n_clauses]
        view.n_slots = n_slots
        return view

    def grown(self, n_slots: int) -> "Lane":
        """The same with room for more slots, which act on nothing."""
        n_rows, _, n_clauses, n_flags = self.need.shape
        new = Lane(self.key, n_slots, n_rows, n_clauses, n_flags, self.writes.shape[-1], self.encoder)
        new.to(self.low.device)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.ndim > 1:
                new.get_buffer(name)[:, : self.n_slots] = buffer
        new.is_empty = self.is_empty
        return new

    def mask(
        self, index: Int[Tensor, "batch pos"], flags: Bool[Tensor, "batch pos flag"]
    ) -> Bool[Tensor, "batch pos k"]:
        """On which tokens each slot acts; flags that are not known yet are asked for by none."""
        at = index[..., None]
        acts = (at >= self.low[:, None]) & (at < self.high[:, None])
        n = flags.shape[-1]
        if n == 0:
            return acts
        up = flags[:, :, None, None]
        fails = (self.need[:, None, ..., :n] & ~up) | (self.veto[:, None, ..., :n] & up)
        return acts & (~fails.any(-1)).any(-1)

    def read(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos k"]:
        """z of each slot: what it reads on each token of x, which is float32."""
        if self.encoder is None:
            s = products(x, self.reads) + self.bias[:, None]
            return torch.where(s > self.threshold[:, None], s, 0.0)
        assert self.key.topk is not None
        n_tokens = max(1, MOST_ENCODED // (self.key.topk.d_sae * len(x)))
        return torch.cat([self._encoded(part) for part in x.split(n_tokens, dim=1)], dim=1)

    def _encoded(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos k"]:
        assert self.encoder is not None
        assert self.key.topk is not None
        pre = self.encoder(x)
        least = pre.topk(int(self.key.topk.k or 1), dim=-1).values[..., -1:]
        s = pre.gather(-1, self.latent[:, None].expand(*x.shape[:2], -1))
        return torch.where((s >= least) & (s > self.threshold[:, None]), s, 0.0)

    def change(self, z: Tensor | None, acts: Bool[Tensor, "batch pos k"]) -> Float[Tensor, "batch pos d_model"]:
        """Σ δ u over the slots, 0 where they do not act."""
        amount = self.constant[:, None]
        if z is not None:
            wanted = (self.gain[:, None] * z).clamp(self.floor[:, None], self.ceiling[:, None])
            amount = amount + self.strength[:, None] * (wanted - z)
        return combined(torch.where(acts, amount, 0.0), self.writes)


def _encoder(sae: SaeArtefact) -> nn.Linear:
    """All pre-activations of an SAE, with b_dec folded into the bias."""
    W_enc, bias = torch.tensor(sae.W_enc), torch.tensor(sae.b_enc).double()
    if sae.apply_b_dec_to_input:
        bias = bias - torch.tensor(sae.b_dec).double() @ W_enc.double()
    linear = nn.Linear(sae.d_model, sae.d_sae, device="meta").to_empty(device="cpu").requires_grad_(False)
    linear.weight.copy_(W_enc.T)
    linear.bias.copy_(bias)
    return linear


_NUMBERS: dict[str, Callable[[Slot, Where], float]] = {
    "constant": lambda slot, where: slot.constant,
    "bias": lambda slot, where: slot.bias,
    "threshold": lambda slot, where: slot.threshold,
    "gain": lambda slot, where: slot.gain,
    "floor": lambda slot, where: slot.low,
    "ceiling": lambda slot, where: slot.high,
    "strength": lambda slot, where: slot.strength,
    "latent": lambda slot, where: slot.latent,
    "low": lambda slot, where: where.low,
    "high": lambda slot, where: where.high,
}
"""what is one number of a slot, by the name of its buffer"""


def _conditions(several: Sequence[Where], n_clauses: int, n_flags: int) -> dict[str, Tensor]:
    """What is needed and vetoed; a clause that is not used asks for a contradiction, and so never holds."""
    need = np.ones((len(several), n_clauses, n_flags), dtype=bool)
    veto = need.copy()
    for i, where in enumerate(several):
        n = len(where.clauses)
        need[i, :n], veto[i, :n] = False, False
        for c, clause in enumerate(where.clauses):
            for flag, wanted in clause:
                (need if wanted else veto)[i, c, flag] = True
    return {"need": torch.from_numpy(need), "veto": torch.from_numpy(veto)}


def products(x: Float[Tensor, "batch pos d"], rows: Float[Tensor, "r k d"]) -> Float[Tensor, "batch pos k"]:
    """x·row for each slot; r is 1 or batch."""
    if x.shape[1] == 1 and rows.shape[1] <= FEW:
        return torch.stack([(x * rows[:, k : k + 1]).sum(-1) for k in range(rows.shape[1])], dim=-1)
    return x @ (rows[0].T if len(rows) == 1 else rows.mT)


def combined(amounts: Float[Tensor, "batch pos k"], rows: Float[Tensor, "r k d"]) -> Float[Tensor, "batch pos d"]:
    """Σ amount * row over the slots; r is 1 or batch."""
    if rows.shape[1] <= FEW:
        terms = [amounts[..., k : k + 1] * rows[:, k : k + 1] for k in range(rows.shape[1])]
        return sum(terms[1:], start=terms[0])
    return amounts @ (rows[0] if len(rows) == 1 else rows)


def applied(
    value: Float[Tensor, "batch pos d_model"],
    lanes: Sequence[Lane],
    readings: Sequence[Any],
    index: Int[Tensor, "batch pos"],
    flags: Bool[Tensor, "batch pos flag"],
) -> Float[Tensor, "batch pos d_model"]:
    """What the lanes make of a hook point; tokens on which no slot acts are those of `value`, bit for bit.

    What is written is summed in float32, added to `value` in float32, and rounded once, to the dtype of `value`.
    """
    masks = [lane.mask(index, flags) for lane in lanes]
    changes = [lane.change(z, acts) for lane, z, acts in zip(lanes, readings, masks, strict=True)]
    moved = value + sum(changes[1:], start=changes[0])
    kept = [acts for lane, acts in zip(lanes, masks, strict=True) if lane.key.keeps_norm]
    if kept:
        length = value.float().norm(dim=-1, keepdim=True)
        scale = length / moved.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        moved = torch.where(_any(kept), moved * scale, moved)
    return torch.where(_any(masks), moved.to(value.dtype), value)


def _any(masks: Sequence[Bool[Tensor, "batch pos _"]]) -> Bool[Tensor, "batch pos 1"]:
    """Whether any slot of any of them acts."""
    together = masks[0] if len(masks) == 1 else torch.cat([*masks], dim=-1)
    return together if together.shape[-1] == 1 else together.any(-1, keepdim=True)

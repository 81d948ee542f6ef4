"""The streaming part of a feature index: what a text says about every latent, in one pass and in constant memory.

Flow for each block of whole sequences:
1. one matrix product gives the pre-activations; from the few that are active everything else follows;
2. counts: tokens, sums and histograms by latent (`sae.histogram`);
3. places: the strongest, and a uniform sample (`sae.reservoir`), with the activations around each looked up in the
   block's codes;
4. near misses: the largest pre-activations of latents in sequences where they are not active at all;
5. the codes of a sample of tokens, for co-activation (`sae.coactivation`).

Each is a sum, or the first n of an order of places, so that blocks may come in any order, and runs over two texts add
up to the run over both; sums of activations, in float64, but for rounding, unless they are added block by block. Left
out: where blocks come from.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae import coactivation, priorities
from sae.codes import Codes, select
from sae.histogram import FIRST, N_BINS, SHIFT
from sae.reservoir import NO_TOKEN, Offer, Reservoir, Window, document_key
from sae.torch_view import TorchSae

BLOCK_VALUES = 1 << 30
"""pre-activations of a block at most, on a GPU; fewer than a 32-bit integer can count"""
CPU_BLOCK_VALUES = 1 << 24
BLOCK_TOKENS = 1 << 14


class PassSettings(NamedTuple):
    """What is kept of a text."""

    n_top: int
    """strongest places a latent"""
    n_sampled: int
    """uniformly sampled places a latent"""
    n_near: int
    """near misses a latent"""
    before: int
    """tokens of a window before the place"""
    after: int
    """tokens of a window after it"""
    coactivation_tokens: int
    """tokens whose codes are kept"""
    seed: int
    """seed of what is sampled"""


class Block(NamedTuple):
    """Whole sequences of one text."""

    source: int
    """number of the text among those of the index, below MAX_SOURCES"""
    key: int
    """an int64 that stands for the text and the seed"""
    first: int
    """its first sequence, counted from the start of the text"""
    tokens: Int[Tensor, "seq ctx"]
    """token ids"""
    mask: Bool[Tensor, "seq ctx"]
    """True for the tokens that count"""
    documents: Int[Tensor, " seq"]
    """document of each sequence"""
    x: Float[Tensor, "token d_model"]
    """what the SAE reads, of the unmasked tokens in order"""


class Statistics:
    """What was found so far; everything is on one device."""

    def __init__(self, settings: PassSettings, d_sae: int, device: torch.device | str = "cpu"):
        """Nothing yet."""
        self.settings, self.d_sae, self.n_tokens = settings, d_sae, 0
        window = settings.before + 1 + settings.after
        self.active = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.histogram = torch.zeros(d_sae, N_BINS, dtype=torch.int64, device=device)
        kept = partial(Reservoir, d_sae, window=window, device=device)
        self.top = kept(n=settings.n_top, by_score=True)
        self.sampled = kept(n=settings.n_sampled, by_score=False)
        self.near = kept(n=settings.n_near, by_score=True)
        self.sample = coactivation.empty(device)

    def add(self, sae: TorchSae, block: Block) -> None:
        """Count one more block in."""
        rows = Rows.of(block)
        with torch.inference_mode(), tensor_cores():
            pre = sae.preactivations(block.x)
            codes = select(sae, pre)
            values = Values(rows.place[codes.row] * self.d_sae + codes.latent, codes.value)
            self._count(codes, len(block.x))
            self._keep_places(rows, codes, values)
            self._keep_near_misses(rows, codes, values, pre)
            self.sample = coactivation.add(self.sample, codes, rows.priority, self.settings.coactivation_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the settings, by name; not copied."""
        self.sample = coactivation.first(self.sample, self.settings.coactivation_tokens)
        parts = {"active": self.active, "total": self.total, "histogram": self.histogram}
        parts["n_tokens"] = torch.tensor(self.n_tokens)
        for name in ("top", "sampled", "near"):
            parts |= {f"{name}.{key}": value for key, value in getattr(self, name).tensors().items()}
        return parts | {f"sample.{name}": value for name, value in self.sample._asdict().items()}

    def merge(self, tensors: Mapping[str, Tensor], totals: Iterable[Float[Tensor, " d_sae"]]) -> None:
        """Count in what `tensors` gave of other statistics with the same settings, of other blocks.

        Args:
          totals: the sum of activations of each of their blocks, in order: added up as if each had been read here.
        """
        tensors = {name: value.to(self.active.device) for name, value in tensors.items()}
        self.n_tokens += int(tensors["n_tokens"])
        self.active += tensors["active"]
        self.histogram += tensors["histogram"]
        for total in totals:
            self.total += total.to(self.total.device)
        for name in ("top", "sampled", "near"):
            reservoir: Reservoir = getattr(self, name)
            reservoir.merge({key: tensors[f"{name}.{key}"] for key in reservoir.tensors()})
        other = coactivation.TokenSample(*(tensors[f"sample.{name}"] for name in coactivation.TokenSample._fields))
        self.sample = coactivation.merged(self.sample, other, self.settings.coactivation_tokens)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave of other statistics with the same settings."""
        own = self.tensors()
        for name in own:
            if not name.startswith("sample."):
                own[name].copy_(tensors[name])
        self.n_tokens = int(tensors["n_tokens"])
        names = coactivation.TokenSample._fields
        self.sample = coactivation.TokenSample(*(tensors[f"sample.{name}"].to(self.active.device) for name in names))

    def _count(self, codes: Codes, n_tokens: int) -> None:
        ones = torch.ones_like(codes.latent)
        self.n_tokens += n_tokens
        self.active.index_add_(0, codes.latent, ones)
        self.total += torch.zeros_like(self.total).index_add_(0, codes.latent, codes.value.double())
        bins = ((codes.value.view(torch.int32) >> SHIFT).long() - FIRST).clamp(0, N_BINS - 1)
        self.histogram.view(-1).index_add_(0, codes.latent * N_BINS + bins, ones)

    def _keep_places(self, rows: "Rows", codes: Codes, values: "Values") -> None:
        priority = priorities.of_entries(rows.priority[codes.row], codes.latent)
        offer = Offer(codes.latent, codes.value, priority, rows.document[codes.row])

        def cut(new: Int[Tensor, " new"]) -> Window:
            return self._cut(rows, values, codes.row[new], codes.latent[new])

        self.top.add(offer, cut)
        self.sampled.add(offer, cut)

    def _keep_near_misses(
        self, rows: "Rows", codes: Codes, values: "Values", pre: Float[Tensor, "token d_sae"]
    ) -> None:
        peaks = torch.stack([part.amax(0) for part in pre.split(rows.lengths)])
        peaks[rows.sequence[codes.row], codes.latent] = -torch.inf
        is_near = (peaks >= self.near.score[:, -1]) & (peaks > -torch.inf)
        sequence, latent = is_near.nonzero(as_tuple=True)
        start = rows.starts[sequence]
        priority = priorities.of_entries(rows.priority[start], latent)

        def cut(new: Int[Tensor, " new"]) -> Window:
            row = _argmax(pre, start[new], rows.length_of[sequence[new]], latent[new])
            return self._cut(rows, values, row, latent[new])

        self.near.add(Offer(latent, peaks[sequence, latent], priority, rows.document[start]), cut)

    def _cut(self, rows: "Rows", values: "Values", row: Int[Tensor, " new"], latent: Int[Tensor, " new"]) -> Window:
        """Windows around rows, with the activations of a latent in each."""
        block, ctx = rows.block, rows.block.tokens.shape[1]
        place = rows.place[row]
        offsets = torch.arange(-self.settings.before, self.settings.after + 1, device=place.device)
        at = (place % ctx)[:, None] + offsets
        inside = (at >= 0) & (at < rows.end[place // ctx, None])
        places = (place[:, None] + offsets).clamp(0, block.tokens.numel() - 1)
        tokens = torch.where(inside, block.tokens.flatten()[places], NO_TOKEN)
        activations = torch.where(inside, values.at(places * self.d_sae + latent[:, None]), 0.0)
        return Window(place % ctx, tokens, activations.clamp(max=torch.finfo(torch.float16).max))


class Values(NamedTuple):
    """Activations by place and latent."""

    keys: Int[Tensor, " entry"]
    """place * d_sae + latent, ascending"""
    values: Float[Tensor, " entry"]

    def at(self, keys: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The activations at these keys, 0 where there are none."""
        if not len(self.keys):
            return torch.zeros(keys.shape, device=keys.device)
        found = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[found] == keys, self.values[found], 0.0)


class Rows(NamedTuple):
    """Where the unmasked tokens of a block are, a row each."""

    block: Block
    place: Int[Tensor, " token"]
    """index into the flattened block"""
    sequence: Int[Tensor, " token"]
    """which of the sequences that have such tokens"""
    document: Int[Tensor, " token"]
    """`document_key`"""
    priority: Int[Tensor, " token"]
    lengths: list[int]
    """tokens of each sequence that has any"""
    length_of: Int[Tensor, " used"]
    """the same on the device"""
    starts: Int[Tensor, " used"]
    """first row of each of them"""
    end: Int[Tensor, " seq"]
    """tokens of each sequence of the block up to its last unmasked one"""

    @classmethod
    def of(cls, block: Block) -> "Rows":
        """Locate the tokens of a block."""
        ctx = block.tokens.shape[1]
        place = block.mask.flatten().nonzero().squeeze(1)
        of_block = place // ctx
        counts = block.mask.sum(1)
        used = counts[counts > 0]
        sequence = torch.arange(len(used), device=place.device).repeat_interleave(used)
        end = (block.mask * torch.arange(1, ctx + 1, device=place.device)).amax(1)
        priority = priorities.of_places(block.key, block.first + of_block, place % ctx)
        document = document_key(block.source, block.documents)[of_block]
        return cls(block, place, sequence, document, priority, used.tolist(), used, used.cumsum(0) - used, end)


def _argmax(
    pre: Float[Tensor, "token d_sae"],
    start: Int[Tensor, " entry"],
    length: Int[Tensor, " entry"],
    latent: Int[Tensor, " entry"],
) -> Int[Tensor, " entry"]:
    """Row of the largest pre-activation of a latent among `length` rows from `start` on; the first of equals."""
    if not len(start):
        return start
    steps = torch.arange(int(length.max()), device=pre.device)
    values = pre[(start[:, None] + steps).clamp(max=len(pre) - 1), latent[:, None]]
    return start + torch.where(steps < length[:, None], values, -torch.inf).argmax(1)


def block_tokens(d_sae: int, device: torch.device) -> int:
    """Tokens of a block whose pre-activations fit well into memory."""
    values = BLOCK_VALUES if device.type == "cuda" else CPU_BLOCK_VALUES
    return max(1, min(BLOCK_TOKENS, values // d_sae))


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Inside it, a GPU may round the factors of float32 products to TF32.

    That is 2^-11 of each, a quarter of what bfloat16 has rounded a stored activation by.
    """
    before: Any = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

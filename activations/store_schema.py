"""What is in an activation store: its settings, its running state, and the layout of its arrays.

`StoreMeta` is fixed when a store is made, `StoreState` is replaced by each commit; both are the group's attributes.
`layout` says from the settings alone which arrays there are. Left out: reading and writing them.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from pydantic import Field, ValidationError

from activations.config import Config
from activations.errors import CorruptArtefactError

SCHEMA_VERSION = 2
GROUP_KEY = "zarr.json"
BINS_PER_OCTAVE = 32
CHUNK_BYTES = 1 << 20
SHARD_BYTES = 1 << 24
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
PINNED_SHARE = 8
AHEAD = 256
"""groups that may be on disk behind the last commit, at most, where several processes write"""
_ON_DISK = {"bfloat16": "uint16", "float16": "float16", "float32": "float32", "int8": "int8"}
_ATTRIBUTE = "saekit_store"


class ModelRef(Config):
    """The model a store or an SAE came from."""

    id: str = Field(description="human-readable name")
    fingerprint: str = Field(description="SHA-256 over config and weights")
    n_layers: int = Field(gt=0, description="blocks")
    d_model: int = Field(gt=0, description="width of the residual stream")


class Ring(Config):
    """Settings of a store whose oldest sequences make room for new ones once a trainer has used them."""

    keep_tokens: int = Field(gt=0, description="positions that are on disk at most, read or not")
    max_tokens: int = Field(gt=0, description="unmasked tokens that the harvest will have made in all")


class StoreMeta(Config):
    """What a store is made of; two harvests may share a store only if all of this is equal."""

    schema_version: int = Field(default=SCHEMA_VERSION, description="layout version of the store")
    model: ModelRef = Field(description="the model")
    tokenizer_fingerprint: str = Field(description="SHA-256 of the tokenizer")
    text: str = Field(description="text spec")
    text_fingerprint: str = Field(description="SHA-256 of the text")
    hook_points: tuple[str, ...] = Field(min_length=1, description="harvested hook points")
    ctx: int = Field(gt=0, description="tokens a sequence")
    cross_documents: bool = Field(default=False, description="a sequence may hold several documents")
    store_dtype: str = Field(description="logical dtype of the activations")
    compute_dtype: str = Field(description="dtype the model ran in")
    compiled: bool = Field(default=False, description="whether the blocks were compiled, which rounds differently")
    batch_tokens: int = Field(gt=0, description="tokens a forward pass; other batches round differently")
    commit_sequences: int = Field(gt=0, description="sequences a commit")
    outlier_norm: float = Field(description="mask limit in median norms")
    ring: Ring | None = Field(default=None, description="ring mode; none: everything is kept")

    @property
    def pinned_sequences(self) -> int:
        """Sequences at the start of a ring that are never released: its held-out part; 0 in other stores."""
        if self.ring is None:
            return 0
        groups = self.ring.keep_tokens // (PINNED_SHARE * self.commit_sequences * self.ctx)
        return max(1, groups) * self.commit_sequences


class HookState(Config):
    """Running sums over the unmasked tokens of one hook point, in float64."""

    n_tokens: int = Field(default=0, description="tokens counted")
    sum: tuple[float, ...] = Field(default=(), description="sum of x, by component")
    sum_norm: float = Field(default=0.0, description="sum of ||x||")
    sum_sq_norm: float = Field(default=0.0, description="sum of ||x||^2")
    norm_bins: dict[int, int] = Field(default={}, description="tokens by floor(32 log2 ||x||)")
    outlier_limit: float = Field(default=0.0, description="norm above which a token is masked")

    def add(self, norms: Float[np.ndarray, " token"], total: Float64[np.ndarray, " d_model"]) -> "HookState":
        """Return the state with tokens of these norms, whose sum is `total`, counted in."""
        wide = norms.astype(np.float64)
        # A vector of zeros has no logarithm; it counts in the lowest bin that float32 norms can reach.
        floor = np.maximum(wide, np.finfo(np.float32).tiny)
        bins = np.floor(BINS_PER_OCTAVE * np.log2(floor)).astype(int)
        lowest = int(bins.min(initial=0))
        counts = enumerate(np.bincount(bins - lowest).tolist(), start=lowest)
        return self.plus(
            HookState(
                n_tokens=len(wide),
                sum=tuple(total.tolist()),
                sum_norm=float(wide.sum()),
                sum_sq_norm=float((wide**2).sum()),
                norm_bins={index: count for index, count in counts if count},
            )
        )

    def plus(self, more: "HookState") -> "HookState":
        """Return the state with the tokens of another, of the same limit if any were counted, counted in."""
        merged = dict(self.norm_bins)
        for index, count in more.norm_bins.items():
            merged[index] = merged.get(index, 0) + count
        total = (np.array(self.sum) + np.array(more.sum)).tolist() if self.sum and more.sum else self.sum or more.sum
        return self.model_copy(
            update={
                "n_tokens": self.n_tokens + more.n_tokens,
                "sum": tuple(total),
                "sum_norm": self.sum_norm + more.sum_norm,
                "sum_sq_norm": self.sum_sq_norm + more.sum_sq_norm,
                "norm_bins": merged,
                "outlier_limit": max(self.outlier_limit, more.outlier_limit),
            }
        )

    def stats(self) -> "HookStats":
        """Means and quantiles from the sums."""
        n = max(self.n_tokens, 1)
        quantiles = {str(q): _quantile(self.norm_bins, q) for q in QUANTILES}
        return HookStats(self.n_tokens, np.array(self.sum) / n, self.sum_norm / n, self.sum_sq_norm / n, quantiles)


class StoreState(Config):
    """What a commit replaces."""

    committed: int = Field(default=0, ge=0, description="sequences that count")
    released: int = Field(default=0, ge=0, description="ring: behind the pinned ones, the first sequence still there")
    complete: bool = Field(default=False, description="the harvest ended: its token budget or its text was used up")
    position: tuple[int, int] = Field(default=(0, 0), description="document and token in it where the text goes on")
    tokens: int = Field(default=0, description="unmasked tokens")
    masked: dict[str, int] = Field(default={}, description="masked tokens by reason")
    hooks: dict[str, HookState] = Field(default={}, description="statistics by hook point")

    @property
    def outlier_limits(self) -> dict[str, float]:
        """Norm above which a token is masked, by hook point; none before the first group."""
        return {name: hook.outlier_limit for name, hook in self.hooks.items()}

    def plus(self, group: "StoreState") -> "StoreState":
        """Return the state behind a group, whose own counts and end `group` holds."""
        hooks = {name: self.hooks.get(name, HookState()).plus(hook) for name, hook in group.hooks.items()}
        return self.model_copy(
            update={
                "position": group.position,
                "tokens": self.tokens + group.tokens,
                "masked": {reason: self.masked.get(reason, 0) + n for reason, n in group.masked.items()},
                "hooks": hooks,
            }
        )


class HookStats(NamedTuple):
    """Statistics of one hook point over the store's unmasked tokens."""

    n_tokens: int
    """tokens counted"""
    mean: Float[np.ndarray, " d_model"]
    """mean of x"""
    mean_norm: float
    """mean of ||x||"""
    mean_sq_norm: float
    """mean of ||x||^2"""
    norm_quantiles: dict[str, float]
    """quantiles of ||x||, within 2.2% (the width of a histogram bin)"""


class ArrayLayout(NamedTuple):
    """One array of a store; its first axis counts sequences."""

    tail: tuple[int, ...]
    """shape of one sequence's entry"""
    dtype: np.dtype
    """dtype on disk"""
    chunk_rows: int
    """sequences a chunk, which is what a checksum covers"""
    object_rows: int
    """sequences an object, which is a shard of several chunks or a single chunk"""
    is_sharded: bool
    """whether objects are shards of raw chunks, else they are compressed chunks"""
    is_released: bool
    """whether a ring gives its old entries up"""

    @property
    def row_bytes(self) -> int:
        """Bytes of one sequence's entry, before compression."""
        return math.prod(self.tail) * self.dtype.itemsize


class Stored(NamedTuple):
    """Activations of one hook point as they are kept; `to_float32(*stored)` widens them."""

    values: np.ndarray
    """[..., d_model]; uint16 holds bfloat16 bits"""
    scale: Float[np.ndarray, "..."] | None
    """of each token of int8 values"""

    def cut(self, start: int, stop: int) -> "Stored":
        """A part of the first axis, in the same memory."""
        return Stored(self.values[start:stop], None if self.scale is None else self.scale[start:stop])


def layout(meta: StoreMeta) -> dict[str, ArrayLayout]:
    """Every array of a store by name; an int8 hook point has a `scale.` array beside it."""
    rows, ctx, width = meta.commit_sequences, meta.ctx, meta.model.d_model
    dtype = np.dtype(_ON_DISK[meta.store_dtype])
    arrays = {
        "tokens": ArrayLayout((ctx,), np.dtype("int32"), rows, rows, False, True),
        "mask": ArrayLayout((ctx,), np.dtype("bool"), rows, rows, False, False),
        "documents": ArrayLayout((), np.dtype("int32"), rows, rows, False, False),
    }
    for name in meta.hook_points:
        row_bytes = ctx * width * dtype.itemsize
        shard = largest_divisor(rows, SHARD_BYTES // row_bytes)
        chunk = largest_divisor(shard, CHUNK_BYTES // row_bytes)
        arrays[name] = ArrayLayout((ctx, width), dtype, chunk, shard, True, True)
        if meta.store_dtype == "int8":
            arrays[scale_name(name)] = ArrayLayout((ctx,), np.dtype("float32"), rows, rows, False, True)
    return arrays


def scale_name(hook_point: str) -> str:
    """Name of the array that holds the scale of each token of an int8 hook point."""
    return f"scale.{hook_point}"


def bytes_per_position(meta: StoreMeta) -> float:
    """Bytes on disk of one position of one sequence, before compression of the small arrays."""
    return sum(array.row_bytes for array in layout(meta).values()) / meta.ctx


def object_keys(name: str, array: ArrayLayout, start: int, stop: int) -> list[str]:
    """Keys of the objects that hold sequences start..stop."""
    numbers = range(start // array.object_rows, -(-stop // array.object_rows))
    return [f"{name}/" + ".".join(map(str, ("c", number, *(0 for _ in array.tail)))) for number in numbers]


def to_bfloat16_bits(x: Float[np.ndarray, "..."]) -> np.ndarray:
    """Round float32 to bfloat16, ties to even, and return the bits as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float32(stored: np.ndarray, scale: Float[np.ndarray, "..."] | None = None) -> Float[np.ndarray, "..."]:
    """Widen stored values to float32: uint16 holds bfloat16 bits, int8 counts steps of a token's `scale`."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    wide = stored.astype(np.float32)
    return wide if scale is None else wide * scale[..., None]


def array_key(name: str) -> str:
    """Key of the metadata of an array."""
    return f"{name}/zarr.json"


def group_json(meta: StoreMeta, state: StoreState, owner: str = "") -> bytes:
    """The zarr.json of the group: replacing it is what commits.

    Args:
      owner: a name of the writer's own, where the place itself cannot tell writers apart.
    """
    ours: dict[str, object] = {"meta": meta.model_dump(mode="json"), "state": state.model_dump(mode="json")}
    if owner:
        ours["owner"] = owner
    ours["sha256"] = _sha256(ours)
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {_ATTRIBUTE: ours}}).encode()


def parse_group_json(where: str, data: bytes) -> tuple[StoreMeta, StoreState]:
    """Read `group_json` back; raises CorruptArtefactError for anything else."""
    try:
        content = json.loads(data)["attributes"][_ATTRIBUTE]
        version, digest = content["meta"]["schema_version"], content.pop("sha256", None)
        if version != SCHEMA_VERSION:
            raise not_a_store(where, f"schema version {version}, not {SCHEMA_VERSION}")
        if digest != _sha256(content):
            raise not_a_store(where, "metadata whose checksum does not hold")
        return StoreMeta.model_validate(content["meta"]), StoreState.model_validate(content["state"])
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        if isinstance(error, CorruptArtefactError):
            raise
        raise not_a_store(where, "metadata of something else, or of another schema") from error


def _sha256(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def not_a_store(where: str, reason: str) -> CorruptArtefactError:
    """The error for what lies where a store should be."""
    return CorruptArtefactError(where, expected="an activation store", got=reason, fix="Harvest into a new directory.")


def damaged(where: str, name: str, start: int, stop: int, reason: str) -> CorruptArtefactError:
    """The error for sequences that cannot be read."""
    place = f"{where}: '{name}' in sequences {start} to {stop - 1}"
    return CorruptArtefactError(place, expected="intact shards", got=reason, fix="Harvest this store again.")


def largest_divisor(n: int, limit: int) -> int:
    """Largest divisor of `n` that is at most `limit`, and at least 1."""
    return max(divisor for divisor in range(1, n + 1) if n % divisor == 0 and divisor <= max(limit, 1))


def _quantile(bins: Mapping[int, int], q: float) -> float:
    if not bins:
        return 0.0
    edges = sorted(bins)
    cumulative = np.cumsum([bins[edge] for edge in edges])
    index = edges[int(np.searchsorted(cumulative, q * cumulative[-1]))]
    return float(2 ** ((index + 0.5) / BINS_PER_OCTAVE))

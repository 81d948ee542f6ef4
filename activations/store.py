"""The activation store: residual-stream tensors of one model over one text, on disk.

A store is a zarr v3 group. Its first axis counts sequences, and every array is aligned to the same sequences:

    tokens     [n_seq, ctx]            int32
    mask       [n_seq, ctx]            bool, True where a token may be used (no padding, special token or norm outlier)
    documents  [n_seq]                 int32, the document a sequence was cut from
    <site>.<layer>  [n_seq, ctx, d_model]   one array a hook point; bfloat16 is kept as its uint16 bits

Writing a group of sequences is: 1. grow the arrays; 2. write one shard an array; 3. replace the group's attributes,
which hold the committed sequence count and the running statistics. Step 3 is one atomic file replacement and is the
commit: a crash at any instant leaves a store that opens at its last commit, and a resumed writer first drops what was
not committed.

Left out: knowing what a model or a text is. The store only compares the fingerprints it is given.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from jaxtyping import Bool, Float, Int
from pydantic import Field, ValidationError
from zarr.codecs import Crc32cCodec, ZstdCodec

from activations.config import Config
from activations.errors import CorruptArtefactError, HookPointError, MismatchError, MissingArtefactError

SCHEMA_VERSION = 1
BINS_PER_OCTAVE = 32
CHUNK_BYTES = 1 << 20
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_BITS = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}

zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


class ModelRef(Config):
    """The model a store or an SAE came from."""

    id: str = Field(description="human-readable name")
    fingerprint: str = Field(description="SHA-256 over config and weights")
    n_layers: int = Field(gt=0, description="blocks")
    d_model: int = Field(gt=0, description="width of the residual stream")


class StoreMeta(Config):
    """What a store is made of; two harvests may share a store only if all of this is equal."""

    schema_version: int = Field(default=SCHEMA_VERSION, description="layout version of the store")
    model: ModelRef = Field(description="the model")
    tokenizer_fingerprint: str = Field(description="SHA-256 of the tokenizer")
    text: str = Field(description="text spec")
    text_fingerprint: str = Field(description="SHA-256 of the text")
    hook_points: tuple[str, ...] = Field(min_length=1, description="harvested hook points")
    ctx: int = Field(gt=0, description="tokens a sequence")
    store_dtype: str = Field(description="logical dtype of the activations")
    compute_dtype: str = Field(description="dtype the model ran in")
    commit_sequences: int = Field(gt=0, description="sequences a shard")
    outlier_norm: float = Field(description="mask limit in median norms")


class HookState(Config):
    """Running sums over the unmasked tokens of one hook point, in float64."""

    n_tokens: int = Field(default=0, description="tokens counted")
    sum: tuple[float, ...] = Field(default=(), description="sum of x, by component")
    sum_norm: float = Field(default=0.0, description="sum of ||x||")
    sum_sq_norm: float = Field(default=0.0, description="sum of ||x||^2")
    norm_bins: dict[int, int] = Field(default={}, description="tokens by floor(32 log2 ||x||)")
    outlier_limit: float = Field(default=0.0, description="norm above which a token is masked")

    def add(self, x: Float[np.ndarray, "token d_model"]) -> "HookState":
        """Return the state with the rows of `x` counted in."""
        norms = np.sqrt(np.einsum("td,td->t", x, x, dtype=np.float64))
        bins, counts = np.unique(np.floor(BINS_PER_OCTAVE * np.log2(norms)).astype(int), return_counts=True)
        merged = dict(self.norm_bins)
        for index, count in zip(bins.tolist(), counts.tolist(), strict=True):
            merged[index] = merged.get(index, 0) + count
        total = x.sum(axis=0, dtype=np.float64)
        return self.model_copy(
            update={
                "n_tokens": self.n_tokens + len(x),
                "sum": tuple((total + np.array(self.sum)).tolist() if self.sum else total.tolist()),
                "sum_norm": self.sum_norm + float(norms.sum()),
                "sum_sq_norm": self.sum_sq_norm + float((norms**2).sum()),
                "norm_bins": merged,
            }
        )


class StoreState(Config):
    """What a commit replaces."""

    committed: int = Field(default=0, ge=0, description="sequences that count")
    complete: bool = Field(default=False, description="the harvest ended: its token budget or its text was used up")
    tokens: int = Field(default=0, description="unmasked tokens")
    masked: dict[str, int] = Field(default={}, description="masked tokens by reason")
    hooks: dict[str, HookState] = Field(default={}, description="statistics by hook point")


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


class Group(NamedTuple):
    """Sequences that are written and committed together."""

    tokens: Int[np.ndarray, "seq ctx"]
    """token ids"""
    mask: Bool[np.ndarray, "seq ctx"]
    """True where a token may be used"""
    documents: Int[np.ndarray, " seq"]
    """document of each sequence"""
    activations: Mapping[str, np.ndarray]
    """by hook point, [seq, ctx, d_model] in the stored representation (bfloat16 as uint16)"""


def to_bfloat16_bits(x: Float[np.ndarray, "..."]) -> np.ndarray:
    """Round float32 to bfloat16, ties to even, and return the bits as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float32(stored: np.ndarray) -> Float[np.ndarray, "..."]:
    """Widen stored values to float32, exactly; uint16 holds bfloat16 bits."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


class ActivationStore:
    """Read access to the committed part of a store."""

    def __init__(self, path: Path, arrays: dict[str, zarr.Array], meta: StoreMeta, state: StoreState):
        self.path, self.meta, self.state = path, meta, state
        self._arrays = arrays

    @classmethod
    def open(cls, path: str | Path) -> "ActivationStore":
        """Open the store at `path` at its last commit.

        Raises: MissingArtefactError if nothing is there, CorruptArtefactError if it is not a whole store.
        """
        path = Path(path)
        try:
            group = zarr.open_group(path, mode="r")
        except FileNotFoundError as error:
            raise MissingArtefactError(
                path, expected="an activation store", got="nothing", fix="Make one with: saekit harvest"
            ) from error
        except (ValueError, KeyError) as error:
            raise _not_a_store(path, "unreadable zarr metadata") from error
        meta, state = _read_attributes(path, group)
        return cls(path, _checked_arrays(path, group, meta, state), meta, state)

    @property
    def n_sequences(self) -> int:
        """Committed sequences."""
        return self.state.committed

    @property
    def ctx(self) -> int:
        """Tokens a sequence."""
        return self.meta.ctx

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.meta.model.d_model

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Names of the harvested hook points."""
        return self.meta.hook_points

    @property
    def is_complete(self) -> bool:
        """Whether the harvest that made the store has ended."""
        return self.state.complete

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what the store was made from and the sums of what it holds."""
        content = {"meta": self.meta.model_dump(mode="json"), "state": self.state.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tokens(self, start: int = 0, stop: int | None = None) -> Int[np.ndarray, "seq ctx"]:
        """Token ids of sequences start..stop."""
        return self._read("tokens", start, stop)

    def mask(self, start: int = 0, stop: int | None = None) -> Bool[np.ndarray, "seq ctx"]:
        """True where a token may be used."""
        return self._read("mask", start, stop)

    def documents(self, start: int = 0, stop: int | None = None) -> Int[np.ndarray, " seq"]:
        """Document of each sequence; never decreasing."""
        return self._read("documents", start, stop)

    def activations(
        self, hook_point: str, start: int = 0, stop: int | None = None
    ) -> Float[np.ndarray, "seq ctx d_model"]:
        """Activations at one hook point, widened to float32; padding is zero.

        Raises: HookPointError if it was not harvested, CorruptArtefactError if a shard is damaged or missing.
        """
        x = to_float32(self._read(self._known(hook_point), start, stop))
        used = self.mask(start, stop)
        lost = used.any(axis=1) & ~np.any(x, axis=(1, 2))
        if lost.any():
            where = start + int(np.flatnonzero(lost)[0])
            raise _damaged(self.path, hook_point, where, where + 1, "a missing shard")
        return x

    def stats(self, hook_point: str) -> HookStats:
        """Mean and norm statistics of one hook point over the unmasked tokens."""
        state = self.state.hooks[self._known(hook_point)]
        n = max(state.n_tokens, 1)
        quantiles = {str(q): _quantile(state.norm_bins, q) for q in QUANTILES}
        return HookStats(state.n_tokens, np.array(state.sum) / n, state.sum_norm / n, state.sum_sq_norm / n, quantiles)

    def _known(self, hook_point: str) -> str:
        if hook_point not in self.hook_points:
            raise HookPointError(
                f"{self.path}: hook point '{hook_point}'",
                expected=f"one of {', '.join(self.hook_points)}",
                got=f"'{hook_point}'",
                fix="Choose one that was harvested, or harvest again with it.",
            )
        return hook_point

    def _read(self, name: str, start: int, stop: int | None) -> np.ndarray:
        stop = self.n_sequences if stop is None else min(stop, self.n_sequences)
        try:
            return np.asarray(self._arrays[name][start:stop])
        except Exception as error:  # the codec pipeline raises plain RuntimeError for bad checksums and short shards
            raise _damaged(self.path, name, start, stop, str(error).splitlines()[0]) from error


class StoreWriter:
    """Append access to one store; use `StoreWriter.open` as a context manager."""

    def __init__(self, path: Path, group: zarr.Group, meta: StoreMeta, state: StoreState):
        self.path, self.meta, self.state = path, meta, state
        self._group = group

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, meta: StoreMeta) -> Iterator["StoreWriter"]:
        """Create the store, or continue the one at `path` if it was made from the same `meta`.

        Raises: MismatchError if it was made from something else, or if another writer has it open.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise MismatchError(
                path, expected="a directory for out", got="a file", fix="Choose another --set out=..."
            ) from error
        with _lock(path):
            if (path / "zarr.json").exists():
                yield cls._resume(path, meta)
            else:
                yield cls._create(path, meta)

    def append(self, group: Group, state: StoreState) -> None:
        """Write `group` after the committed sequences, then commit it with `state` (whose `committed` is set here)."""
        start, stop = self.state.committed, self.state.committed + len(group.tokens)
        parts = {"tokens": group.tokens, "mask": group.mask, "documents": group.documents, **group.activations}
        for name, values in parts.items():
            array = self._array(name)
            array.resize((stop, *array.shape[1:]))
            array[start:stop] = values
        self._commit(state.model_copy(update={"committed": stop}))

    def finish(self, complete: bool) -> None:
        """Record whether the harvest ended."""
        self._commit(self.state.model_copy(update={"complete": complete}))

    def _commit(self, state: StoreState) -> None:
        self._group.attrs.put(_attributes(self.meta, state))
        self.state = state

    def _array(self, name: str) -> zarr.Array:
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array

    @classmethod
    def _create(cls, path: Path, meta: StoreMeta) -> "StoreWriter":
        state = StoreState()
        group = zarr.open_group(path, mode="a", attributes=_attributes(meta, state))
        rows, ctx, width = meta.commit_sequences, meta.ctx, meta.model.d_model
        plain: dict[str, Any] = {"compressors": (ZstdCodec(), Crc32cCodec())}
        group.create_array("tokens", shape=(0, ctx), chunks=(rows, ctx), dtype="int32", **plain)
        group.create_array("mask", shape=(0, ctx), chunks=(rows, ctx), dtype="bool", **plain)
        group.create_array("documents", shape=(0,), chunks=(rows,), dtype="int32", **plain)
        dtype = np.dtype(_BITS[meta.store_dtype])
        chunk = _chunk_rows(rows, ctx * width * dtype.itemsize)
        for hook_point in meta.hook_points:
            group.create_array(
                hook_point,
                shape=(0, ctx, width),
                chunks=(chunk, ctx, width),
                shards=(rows, ctx, width),
                dtype=dtype,
                compressors=(Crc32cCodec(),),
            )
        return cls(path, group, meta, state)

    @classmethod
    def _resume(cls, path: Path, meta: StoreMeta) -> "StoreWriter":
        ActivationStore.open(path)
        group = zarr.open_group(path, mode="r+")
        old, state = _read_attributes(path, group)
        for field in StoreMeta.model_fields:
            have, want = getattr(old, field), getattr(meta, field)
            if have != want and field != "text":  # a path may be spelt in several ways
                raise MismatchError(
                    f"{path}: {field} of the store",
                    expected=_brief(want),
                    got=_brief(have),
                    fix="Use another --set out=..., or the settings that the store was made with.",
                )
        writer = cls(path, group, meta, state)
        for name in ("tokens", "mask", "documents", *meta.hook_points):
            array = writer._array(name)
            array.resize((state.committed, *array.shape[1:]))
        return writer


def _attributes(meta: StoreMeta, state: StoreState) -> dict[str, Any]:
    return {"saekit_store": {"meta": meta.model_dump(mode="json"), "state": state.model_dump(mode="json")}}


def _read_attributes(path: Path, group: zarr.Group) -> tuple[StoreMeta, StoreState]:
    content: Any = group.attrs.get("saekit_store")
    if not isinstance(content, dict):
        raise _not_a_store(path, "a zarr group without saekit's attributes")
    try:
        version = content["meta"]["schema_version"]
        if version != SCHEMA_VERSION:
            raise _not_a_store(path, f"schema version {version}, not {SCHEMA_VERSION}")
        return StoreMeta.model_validate(content["meta"]), StoreState.model_validate(content["state"])
    except (KeyError, TypeError, ValidationError) as error:
        raise _not_a_store(path, "attributes of another schema") from error


def _checked_arrays(path: Path, group: zarr.Group, meta: StoreMeta, state: StoreState) -> dict[str, zarr.Array]:
    shape = (meta.ctx, meta.model.d_model)
    tails = {"tokens": shape[:1], "mask": shape[:1], "documents": ()} | dict.fromkeys(meta.hook_points, shape)
    arrays = {}
    for name, tail in tails.items():
        array = group.get(name)
        if not isinstance(array, zarr.Array) or array.shape[1:] != tail or array.shape[0] < state.committed:
            raise _not_a_store(path, f"array '{name}' missing or of the wrong shape")
        arrays[name] = array
    return arrays


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path / ".writer.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MismatchError(
                path, expected="no other writer", got="a harvest that is writing it", fix="Wait for it, or stop it."
            ) from error
        yield


def _chunk_rows(rows: int, row_bytes: int) -> int:
    """Largest divisor of `rows` whose chunk stays under CHUNK_BYTES, at least 1."""
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * row_bytes <= CHUNK_BYTES))


def _quantile(bins: Mapping[int, int], q: float) -> float:
    if not bins:
        return 0.0
    edges = sorted(bins)
    cumulative = np.cumsum([bins[edge] for edge in edges])
    index = edges[int(np.searchsorted(cumulative, q * cumulative[-1]))]
    return float(2 ** ((index + 0.5) / BINS_PER_OCTAVE))


def _brief(value: object) -> str:
    text = value.id if isinstance(value, ModelRef) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _not_a_store(path: Path, reason: str) -> CorruptArtefactError:
    return CorruptArtefactError(path, expected="an activation store", got=reason, fix="Harvest into a new directory.")


def _damaged(path: Path, name: str, start: int, stop: int, reason: str) -> CorruptArtefactError:
    where = f"{path}: '{name}' in sequences {start} to {stop - 1}"
    return CorruptArtefactError(where, expected="intact shards", got=reason, fix="Harvest this store again.")

"""Where the blocks of an index come from: an activation store, or a text that is run through the model.

Either is a text with a key that stands for its documents and how they are cut, so that the same text is never counted
twice: a store that has grown since, or a larger `max_tokens`, goes on behind what was read. Blocks are whole
sequences; with each comes the cursor that the next one is read from. Left out: what is made of them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.ahead import ahead
from activations.config import HarvestConfig
from activations.harvest import store_meta
from activations.models import LoadedModel
from activations.store import ActivationStore
from activations.store_schema import Stored, StoreMeta
from activations.stream import StreamPlace, stream
from sae.config import IndexConfig
from sae.index_pass import Block, block_tokens
from sae.index_state import Cursor

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""tokens a forward pass where a text is run through the model"""
_PREFETCHED = 2

Span = tuple[int, int]
"""first sequence of a block, and the first behind it"""
Blocks = Iterator[tuple[Block, Cursor | None]]
"""blocks, each with the place behind it, or None where nothing can go on"""


class Source(NamedTuple):
    """A text to index."""

    name: str
    """the store's path, or the text"""
    key: str
    """SHA-256 over what makes it a text"""
    expected_tokens: int
    """unmasked tokens that it has, at most where it is run through the model"""
    blocks: Callable[[int, int, Cursor], Blocks]
    """from the number of the source, the int64 that stands for it and a seed, and a cursor"""


def seed_key(key: str, seed: int) -> int:
    """The int64 that stands for a text and a seed."""
    return int.from_bytes(hashlib.sha256(f"{key}:{seed}".encode()).digest()[:8], "little", signed=True)


def store_source(store: ActivationStore, reads: tuple[str, ...], d_sae: int, device: torch.device) -> Source:
    """The committed sequences of a store, as far as it still has them."""

    def blocks(number: int, key: int, cursor: Cursor) -> Blocks:
        tokens = cursor.tokens
        for block in store_blocks(store, reads, store_spans(store, d_sae, device, cursor), number, key, device):
            tokens += len(block.x)
            yield block, Cursor(sequence=block.first + len(block.tokens), tokens=tokens)

    n_tokens = sum(int(store.mask(kept.start, kept.stop).sum()) for kept in store.kept())
    return Source(store.path, text_key(store.meta), n_tokens, blocks)


def store_spans(store: ActivationStore, d_sae: int, device: torch.device, cursor: Cursor) -> list[Span]:
    """The sequences of each block behind a place, on a kind of device."""
    rows = max(1, block_tokens(d_sae, device) // store.ctx)
    return [
        (start, min(start + rows, kept.stop))
        for kept in store.kept()
        for start in range(max(kept.start, cursor.sequence), kept.stop, rows)
    ]


def store_blocks(
    store: ActivationStore, reads: tuple[str, ...], spans: Sequence[Span], number: int, key: int, device: torch.device
) -> Iterator[Block]:
    """Blocks of these sequences; `number` and `key` as in `Block`."""
    with ahead((_read(store, reads, *span) for span in spans), _PREFETCHED) as parts:
        for start, (ids, mask, documents, stored) in parts:
            used = torch.from_numpy(mask).to(device)
            x = torch.cat([_widened(part, device)[used] for part in stored], dim=-1)
            yield Block(number, key, start, _moved(ids, device), used, _moved(documents, device), x)


def text_source(config: IndexConfig, reads: tuple[str, ...], d_sae: int, loaded: LoadedModel) -> Source:
    """`config.text` through the model, up to the group in which `config.max_tokens` is reached."""
    assert config.text is not None
    harvest = HarvestConfig(
        model=config.model,
        text=config.text,
        hook_points=reads,
        ctx=config.ctx,
        max_tokens=config.max_tokens,
        outlier_norm=config.outlier_norm,
        batch_tokens=BATCH_TOKENS[loaded.device.type],
    )
    meta = store_meta(harvest, loaded)
    rows = max(1, block_tokens(d_sae, loaded.device) // config.ctx)

    def blocks(number: int, key: int, cursor: Cursor) -> Blocks:
        tokens, first = cursor.tokens, cursor.sequence
        groups = stream(harvest, loaded, meta, StreamPlace(cursor.position, cursor.outlier_limits))
        while tokens < config.max_tokens and (group := next(groups, None)) is not None:
            x = torch.cat([group.activations[name] for name in reads], dim=-1)
            n, tokens = len(group.tokens), tokens + int(group.mask.sum())
            after = Cursor(
                sequence=first + n,
                tokens=tokens,
                position=group.after.position,
                outlier_limits=group.after.outlier_limits,
            )
            arrays = [_moved(part, x.device) for part in (group.tokens, group.mask, group.documents)]
            for start in range(0, n, rows):
                ids, mask, documents = (part[start : start + rows] for part in arrays)
                block = Block(number, key, first + start, ids, mask, documents, x[start : start + rows][mask])
                yield block, after if start + rows >= n else None
            first += n

    return Source(config.text, text_key(meta), config.max_tokens, blocks)


def text_key(meta: StoreMeta) -> str:
    """SHA-256 over the model, the documents, and how they are cut into sequences of tokens."""
    content = {
        "model": meta.model.fingerprint,
        "tokenizer": meta.tokenizer_fingerprint,
        "text": meta.text_fingerprint,
        "ctx": meta.ctx,
        "cross_documents": meta.cross_documents,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_Part = tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray, list[Stored]]]


def _read(store: ActivationStore, reads: tuple[str, ...], start: int, stop: int) -> _Part:
    stored = [store.room(stop - start) for _ in reads]
    for name, room in zip(reads, stored, strict=True):
        store.read_into(room, name, start)
    return start, (store.tokens(start, stop), store.mask(start, stop), store.documents(start, stop), stored)


def _widened(stored: Stored, device: torch.device) -> Float[Tensor, "seq ctx d_model"]:
    """Stored values in float32 on the device, which does the widening: bfloat16 is half as much to copy."""
    values = stored.values
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).to(device).view(torch.bfloat16).float()
    wide = torch.from_numpy(values).to(device).float()
    return wide if stored.scale is None else wide * _moved(stored.scale, device)[..., None]


def _moved(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)

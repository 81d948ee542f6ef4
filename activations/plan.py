"""What a harvest would take, found out before it starts: sequences, bytes and seconds.

Flow: 1. pack the head of the text and see how many tokens a sequence really holds; 2. run some of it through the model
and time it; 3. scale both up to the token budget, and compare the bytes with the room there is. `choose_batch_tokens`
times the same passes at several sizes. Left out: writing anything.
"""

import time
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from activations.config import HarvestConfig
from activations.errors import DiskSpaceError, TextError
from activations.forward import Buffer, GroupRunner
from activations.models import LoadedModel
from activations.storage import open_storage
from activations.store_schema import StoreMeta, bytes_per_position
from activations.text import documents
from activations.tokens import TokenSequence, pack

PROBE_SEQUENCES = 256
CPU_BATCH_TOKENS = 2048
GAIN = 1.03
_WARM_UP = 2


class HarvestPlan(NamedTuple):
    """What a harvest would do."""

    tokens: int
    """unmasked tokens it stops at, or all of the text if that is known to be less"""
    sequences: int
    """estimate of the sequences it stores"""
    bytes_needed: int
    """estimate of the bytes on disk when it ends; in ring mode, at any one time"""
    bytes_free: int | None
    """room where the store goes; none if there is no limit to ask for"""
    seconds: float | None
    """estimate of its wall time; none if it was not probed"""
    tok_s: float | None
    """tokens a second of the probe; none if it was not probed"""
    batch_tokens: int
    """tokens a forward pass"""


def plan(config: HarvestConfig, loaded: LoadedModel, meta: StoreMeta, *, probe_s: float | None = None) -> HarvestPlan:
    """Estimate what a harvest takes.

    Args:
      probe_s: seconds of forward passes to time; none leaves the time out.
    Raises: DiskSpaceError if the disk cannot hold it; TextError if the text has no tokens.
    """
    head = list(islice(_sequences(config, loaded), PROBE_SEQUENCES))
    if not head:
        raise TextError(config.text, expected="some text", got="no tokens", fix="Choose a text that is not empty.")
    used = sum(int((row.attend & ~row.special).sum()) for row in head)
    is_all = len(head) < PROBE_SEQUENCES
    tokens = min(config.max_tokens, used) if is_all else config.max_tokens
    sequences = -(-tokens * len(head) // max(used, 1))
    positions = sequences * config.ctx
    if meta.ring:
        positions = min(positions, meta.ring.keep_tokens)
    needed = int(positions * bytes_per_position(meta))
    free = _check_room(config, needed)
    if probe_s is None:
        return HarvestPlan(tokens, sequences, needed, free, None, None, meta.batch_tokens)
    tok_s = _measure(head, loaded, meta, probe_s)
    return HarvestPlan(tokens, sequences, needed, free, tokens / tok_s, tok_s, meta.batch_tokens)


def measure_speed(config: HarvestConfig, loaded: LoadedModel, meta: StoreMeta, seconds: float = 3.0) -> float:
    """Unmasked tokens a second of forward passes over the head of the text; writing is not counted."""
    return _measure(list(islice(_sequences(config, loaded), PROBE_SEQUENCES)), loaded, meta, seconds)


def choose_batch_tokens(config: HarvestConfig, loaded: LoadedModel, meta: StoreMeta) -> int:
    """The smallest forward pass that is within GAIN of the fastest that fits into memory.

    On a CPU a size that suits every model measured. On a GPU sizes are tried from one sequence up, each twice the one
    before, until memory runs out or doubling gains less than GAIN.
    """
    if loaded.device.type != "cuda":
        return CPU_BATCH_TOKENS
    head = list(islice(_sequences(config, loaded), PROBE_SEQUENCES))
    best, speed, size = config.ctx, 0.0, max(config.ctx, 4096)
    while size <= config.commit_sequences * config.ctx:
        try:
            measured = _measure(head, loaded, meta.model_copy(update={"batch_tokens": size}), 0.5)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if measured < speed * GAIN:
            break
        best, speed, size = size, measured, size * 2
    return best


def _sequences(config: HarvestConfig, loaded: LoadedModel) -> Iterator[TokenSequence]:
    texts = documents(config.text)
    return pack(texts, loaded.tokenizer, config.ctx, cross_documents=config.cross_documents)


def _measure(head: list[TokenSequence], loaded: LoadedModel, meta: StoreMeta, seconds: float) -> float:
    """Unmasked tokens a second, over sequences from all over the sample."""
    runner, rows = GroupRunner(meta, loaded), sorted(head, key=lambda row: int(row.attend.sum()))
    # Few rows at a time are enough; their order is that of their length, as inside a group.
    few = max(1, meta.batch_tokens // meta.ctx)
    buffer = Buffer(meta.model_copy(update={"commit_sequences": few}), loaded.device)
    tokens, attend = np.stack([row.tokens for row in rows]), np.stack([row.attend for row in rows])
    for _ in range(_WARM_UP):
        runner.run(tokens[:few], attend[:few], buffer).norms()
    done, began = 0, time.perf_counter()
    for start in _forever(range(0, len(rows), few)):
        part = slice(start, start + few)
        runner.run(tokens[part], attend[part], buffer).norms()
        done += sum(int((row.attend & ~row.special).sum()) for row in rows[part])
        if time.perf_counter() - began >= seconds:
            break
    return max(done, 1) / (time.perf_counter() - began)


def _forever(starts: range) -> Iterator[int]:
    while True:
        yield from starts


def _check_room(config: HarvestConfig, needed: int) -> int | None:
    storage = open_storage(config.out)
    free = storage.free_bytes()
    if free is not None and needed - sum(storage.sizes().values()) > free:
        raise DiskSpaceError(
            config.out,
            expected=f"{needed / 1e9:.1f} GB of room for {config.max_tokens:,} tokens",
            got=f"{free / 1e9:.1f} GB free",
            fix="Lower max_tokens, choose another out, set store_dtype=int8, or train beside it with keep_tokens.",
        )
    return free

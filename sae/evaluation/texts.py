"""Activations of single texts, and one vector of features a text.

Flow: 1. the first window of each text, as the store's would be, runs up to the last hook point that is read; 2. its
tokens, without those that the store would mask, are kept in a file without a name, since several passes need them;
3. an SAE's latents are pooled over the tokens of a text, into a sparse matrix. Left out: labels.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse

from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from activations.progress import progress
from activations.store import ActivationStore
from activations.store_schema import HookState
from activations.text import Document
from activations.tokens import TokenSequence, pack
from sae.evaluation.core import LATENTS_AT_ONCE
from sae.torch_view import TorchSae
from sae.wiring import Wiring

BATCH_TOKENS = 2048
Pool = Literal["mean", "max"]
Features = Float[np.ndarray, "text feature"] | sparse.csr_array


class Subject(NamedTuple):
    """What is measured on texts."""

    store: ActivationStore
    """whose length of sequences and limits for norm outliers texts get"""
    wiring: Wiring
    """of all the SAEs"""
    loaded: LoadedModel
    saes: Mapping[str, TorchSae]
    """the SAE, and what it has to beat, by name"""
    seed: int


@dataclass(frozen=True, eq=False)
class Texts:
    """Activations of texts, one after the other."""

    x: Float[np.ndarray, "token d_in"]
    """what the SAE reads of each token; on disk"""
    bounds: Int[np.ndarray, " bound"]
    """text i has the tokens bounds[i]..bounds[i + 1]; it may have none"""

    @property
    def n(self) -> int:
        """Number of texts."""
        return len(self.bounds) - 1

    def of(self, text: int) -> Float[np.ndarray, "token d_in"]:
        """The tokens of a text."""
        return self.x[self.bounds[text] : self.bounds[text + 1]]

    def means(self) -> Float[np.ndarray, "text d_in"]:
        """Mean over the tokens of each text; zeros for one without tokens."""
        lengths = np.diff(self.bounds)
        rows = (self.of(i).mean(axis=0) if lengths[i] else np.zeros(self.x.shape[1]) for i in range(self.n))
        return np.stack(list(rows)).astype(np.float32)


def read_texts(subject: Subject, texts: Sequence[str]) -> Texts:
    """Run texts through the model, each up to the store's `ctx` tokens."""
    store, wiring, loaded = subject[:3]
    counts, d_in = np.zeros(len(texts), np.int64), len(wiring.reads) * store.d_model
    # The memory map keeps a handle of its own.
    with tempfile.TemporaryFile() as file, progress("read texts", len(texts), "text") as advance:
        for rows in _batches(_windows(texts, loaded, store.ctx)):
            for sequence, x in zip(rows, _activations(store, wiring, loaded, rows), strict=True):
                counts[sequence.document] = len(x)
                file.write(x.tobytes())
            advance(len(rows))
        file.flush()
        n = int(counts.sum())
        x = np.memmap(file, np.float32, "r", shape=(n, d_in)) if n else np.zeros((0, d_in), np.float32)
    return Texts(x, np.concatenate([[0], np.cumsum(counts)]))


def pooled_latents(sae: TorchSae, texts: Texts, how: Pool) -> sparse.csr_array:
    """Mean or largest activation of each latent over the tokens of each text, [text, d_sae]."""
    rows, step = [], max(1, LATENTS_AT_ONCE // sae.d_sae)
    for first, last in _groups(texts.bounds, step):
        start = texts.bounds[first]
        x = torch.from_numpy(np.array(texts.x[start : texts.bounds[last]])).to(sae.W_enc.device)
        with torch.inference_mode():
            latents = sae.encode(x)
            for a, b in pairwise((texts.bounds[first : last + 1] - start).tolist()):
                part = latents[a:b] if b > a else latents.new_zeros(1, sae.d_sae)
                rows.append(sparse.csr_array((part.mean(0) if how == "mean" else part.amax(0))[None].cpu().numpy()))
    return sparse.csr_array(sparse.vstack(rows))


def dense(table: Features) -> Float[np.ndarray, "text feature"]:
    """The table with its zeros written out."""
    return table.toarray() if isinstance(table, sparse.csr_array) else table


def _windows(texts: Sequence[str], loaded: LoadedModel, ctx: int) -> Iterator[TokenSequence]:
    """The first window of each text."""
    last = -1
    for sequence in pack((Document(text, i) for i, text in enumerate(texts)), loaded.tokenizer, ctx):
        if sequence.document > last:
            last = sequence.document
            yield sequence


def _batches(sequences: Iterator[TokenSequence]) -> Iterator[list[TokenSequence]]:
    batch: list[TokenSequence] = []
    width = 0
    for sequence in sequences:
        width = max(width, int(sequence.attend.sum()))
        if batch and (len(batch) + 1) * width > BATCH_TOKENS:
            yield batch
            batch, width = [], int(sequence.attend.sum())
        batch.append(sequence)
    if batch:
        yield batch


def _activations(
    store: ActivationStore, wiring: Wiring, loaded: LoadedModel, rows: list[TokenSequence]
) -> Iterator[Float[np.ndarray, "token d_in"]]:
    """Of each sequence the tokens that the store would not mask."""
    points = [HookPoint.parse(name) for name in wiring.reads]
    width = max(1, max(int(row.attend.sum()) for row in rows))
    tokens = torch.from_numpy(np.stack([row.tokens[:width] for row in rows])).long().to(loaded.device)
    with capture(loaded.model, loaded.family, points, stop_after_last=True) as captured:
        run_until(loaded.model, {"input_ids": tokens})
    values = [captured[point].float().cpu().numpy() for point in points]
    used = np.stack([(row.attend & ~row.special)[:width] for row in rows])
    for name, value in zip(wiring.reads, values, strict=True):
        limit = store.state.hooks.get(name, HookState()).outlier_limit
        used &= np.linalg.norm(value, axis=-1) <= (limit or np.inf)
    for row, keep in zip(np.concatenate(values, axis=-1), used, strict=True):
        yield row[keep]


def _groups(bounds: Int[np.ndarray, " bound"], step: int) -> Iterator[tuple[int, int]]:
    """Runs of whole texts of at most `step` tokens, or of one text."""
    first = 0
    while first < len(bounds) - 1:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + step, side="right")) - 1)
        yield first, last
        first = last

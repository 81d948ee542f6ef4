"""Contexts of a latent as one compact blob.

A context is a window of tokens around a place, with the latent's activation at each token.
Layout: a zlib stream of the number of contexts as int32; [n_contexts, 4] int32 (source, document, position of the peak
inside the window, window length); [n_contexts, 2] float32 (score, effect); then all token ids as int32, then all
activations as float16, little-endian. Left out: decoding token ids to text.
"""

import math
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from activations.errors import CorruptArtefactError

MAX_BYTES = 1 << 24
_HEAD, _FIGURES = 16, 8


class Context(NamedTuple):
    """One window of tokens."""

    document: int
    """document that the window was cut from"""
    peak: int
    """index inside the window of the place that it was cut around"""
    tokens: Int[np.ndarray, " window"]
    """token ids"""
    activations: Float[np.ndarray, " window"]
    """activation of the latent at each token; float16 precision once stored"""
    source: int = 0
    """number of the document's text among the sources of the index"""
    score: float = math.nan
    """pre-activation at the peak, which is the activation where the latent is active"""
    effect: float = math.nan
    """what the text costs more, in nats, without the latent (`sae.index_effects`); NaN where it was not measured"""


def pack_contexts(contexts: list[Context]) -> bytes:
    """Serialise contexts; `unpack_contexts` is the inverse up to rounding: activations to float16, figures to 32."""
    head = np.array([[c.source, c.document, c.peak, len(c.tokens)] for c in contexts], dtype="<i4").reshape(-1, 4)
    figures = np.array([[c.score, c.effect] for c in contexts], dtype="<f4")
    tokens = np.concatenate([c.tokens for c in contexts] or [np.zeros(0)]).astype("<i4")
    values = np.concatenate([c.activations for c in contexts] or [np.zeros(0)])
    stored = np.minimum(values, np.finfo(np.float16).max).astype("<f2")
    parts = np.int32(len(contexts)), head, figures, tokens, stored
    return zlib.compress(b"".join(part.tobytes() for part in parts))


def unpack_contexts(blob: bytes) -> list[Context]:
    """Read contexts back. Raises: CorruptArtefactError if the blob is damaged."""
    try:
        stream = zlib.decompressobj()
        raw = stream.decompress(blob, MAX_BYTES)
        count = int(np.frombuffer(raw, "<i4", 1)[0])
        head = np.frombuffer(raw, "<i4", max(4 * count, 0), 4).reshape(-1, 4)
        figures = np.frombuffer(raw, "<f4", max(2 * count, 0), 4 + _HEAD * count).reshape(-1, 2)
        total, start = int(head[:, 3].sum()), 4 + (_HEAD + _FIGURES) * count
        if not stream.eof or stream.unused_data or len(raw) != start + 6 * total:
            raise ValueError("bytes missing or left over")
        if (head[:, 2] < 0).any() or (head[:, 2] >= head[:, 3]).any():
            raise ValueError("a peak outside its window")
        tokens = np.frombuffer(raw, "<i4", total, start)
        values = np.frombuffer(raw, "<f2", total, start + 4 * total).astype(np.float32)
    except (zlib.error, ValueError, IndexError) as error:
        raise CorruptArtefactError(
            "contexts of a latent", expected="a whole blob", got=str(error), fix="Build the index again."
        ) from error
    ends = np.cumsum(head[:, 3])[:-1]
    parts = zip(head.tolist(), figures.tolist(), np.split(tokens, ends), np.split(values, ends), strict=True)
    return [Context(h[1], h[2], t, v, h[0], *f) for h, f, t, v in (parts if count else ())]

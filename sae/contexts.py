"""Contexts of a latent as one compact blob.

A context is a window of tokens around a place where a latent was active, with the latent's activation at each token.
Layout: a zlib stream of [n_contexts, 3] int32 (document, position of the peak inside the window, window length), then
all token ids as int32, then all activations as float16, little-endian. Left out: decoding token ids to text.
"""

import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from activations.errors import CorruptArtefactError

MAX_BYTES = 1 << 24


class Context(NamedTuple):
    """One window of tokens."""

    document: int
    """document that the window was cut from"""
    peak: int
    """index inside the window of the strongest activation"""
    tokens: Int[np.ndarray, " window"]
    """token ids"""
    activations: Float[np.ndarray, " window"]
    """activation of the latent at each token; float16 precision once stored"""


def pack_contexts(contexts: list[Context]) -> bytes:
    """Serialise contexts; `unpack_contexts` is the inverse up to float16 rounding of activations."""
    head = np.array([[c.document, c.peak, len(c.tokens)] for c in contexts], dtype="<i4").reshape(-1, 3)
    tokens = np.concatenate([c.tokens for c in contexts] or [np.zeros(0)]).astype("<i4")
    values = np.concatenate([c.activations for c in contexts] or [np.zeros(0)])
    stored = np.minimum(values, np.finfo(np.float16).max).astype("<f2")
    return zlib.compress(np.int32(len(contexts)).tobytes() + head.tobytes() + tokens.tobytes() + stored.tobytes())


def unpack_contexts(blob: bytes) -> list[Context]:
    """Read contexts back. Raises: CorruptArtefactError if the blob is damaged."""
    try:
        stream = zlib.decompressobj()
        raw = stream.decompress(blob, MAX_BYTES)
        count = int(np.frombuffer(raw, "<i4", 1)[0])
        head = np.frombuffer(raw, "<i4", max(3 * count, 0), 4).reshape(-1, 3)
        total = int(head[:, 2].sum())
        if not stream.eof or stream.unused_data or len(raw) != 4 + 12 * count + 6 * total:
            raise ValueError("bytes missing or left over")
        if (head[:, 1] < 0).any() or (head[:, 1] >= head[:, 2]).any():
            raise ValueError("a peak outside its window")
        tokens = np.frombuffer(raw, "<i4", total, 4 + 12 * count)
        values = np.frombuffer(raw, "<f2", total, 4 + 12 * count + 4 * total).astype(np.float32)
    except (zlib.error, ValueError, IndexError) as error:
        raise CorruptArtefactError(
            "contexts of a latent", expected="a whole blob", got=str(error), fix="Build the index again."
        ) from error
    ends = np.cumsum(head[:, 2])[:-1]
    windows = zip(head, np.split(tokens, ends), np.split(values, ends), strict=True) if count else ()
    return [Context(int(h[0]), int(h[1]), t, v) for h, t, v in windows]

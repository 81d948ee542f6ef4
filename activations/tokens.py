"""Documents to token sequences of one width, for harvesting.

Flow: 1. documents are tokenised some at a time; 2. each is cut into windows of `ctx` tokens, BOS included where the
tokenizer itself adds one; 3. the last, shorter window is padded on the right, and dropped under MIN_TOKENS tokens.

A sequence holds tokens of one document only, so that nothing attends across documents. The result depends on the
documents, the tokenizer and `ctx` alone, and can be taken up again behind any sequence. Left out: torch, and the choice
of what to mask; `attend` and `special` say what a token is.
"""

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from activations.errors import ConfigError
from activations.text import Document

MIN_TOKENS = 4
_BATCH_DOCUMENTS = 256
_BATCH_CHARS = 1_000_000
_CONTROL_TOKEN = re.compile(r"<\|.*\|>")


class TokenSequence(NamedTuple):
    """One window of one document."""

    tokens: Int32[np.ndarray, " ctx"]
    """Token ids, then padding."""
    attend: Bool[np.ndarray, " ctx"]
    """True for tokens, False for padding."""
    special: Bool[np.ndarray, " ctx"]
    """True for BOS and other control tokens; False for text and for padding."""
    document: int
    """`Document.index` of the document it was cut from."""
    window: int
    """0-based place of the window in its document; packing goes on behind it from (document, window + 1)."""


def pack(
    documents: Iterable[Document],
    tokenizer: Any,
    ctx: int,
    skip: int = 0,
    start: tuple[int, int] = (0, 0),
) -> Iterator[TokenSequence]:
    """Cut documents into sequences of `ctx` tokens.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      ctx: tokens a sequence.
      skip: sequences to leave out at the head; their documents are tokenised all the same.
      start: (document, window) to begin at; documents before it are not tokenised.
    Raises: ConfigError if `ctx` leaves no room for MIN_TOKENS tokens of text.
    """
    # Set either way: the tokenizer otherwise warns about threads whenever the process forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    bos = bos_ids(tokenizer)
    if ctx < len(bos) + MIN_TOKENS:
        least = len(bos) + MIN_TOKENS
        raise ConfigError(f"ctx {ctx}", expected=f"at least {least} tokens", got=ctx, fix=f"Use ctx={least} or more.")
    return islice(_pack(documents, tokenizer, ctx, bos, start), skip, None)


def bos_ids(tokenizer: Any) -> list[int]:
    """The token ids that the tokenizer by itself puts before a text; often none."""
    bare, full = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return list(full[: full.index(bare[0])])


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that steer a model instead of being text: BOS, EOS, padding, chat turns."""
    added = tokenizer.added_tokens_decoder.items()
    control = {index for index, token in added if token.special or _CONTROL_TOKEN.fullmatch(token.content)}
    return frozenset(control) | frozenset(tokenizer.all_special_ids)


def _pack(
    documents: Iterable[Document],
    tokenizer: Any,
    ctx: int,
    bos: list[int],
    start: tuple[int, int],
) -> Iterator[TokenSequence]:
    special = np.array(sorted(special_ids(tokenizer)), dtype=np.int32)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    remaining = (document for document in documents if document.index >= start[0])
    for batch in _batches(remaining):
        encoded = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for document, ids in zip(batch, encoded, strict=True):
            for window, piece in _windows(ids, ctx - len(bos)):
                if (document.index, window) >= start:
                    yield _sequence([*bos, *piece], ctx, padding, special, document.index, window)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    n_chars = 0
    for document in documents:
        batch.append(document)
        n_chars += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or n_chars >= _BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _windows(ids: list[int], width: int) -> Iterator[tuple[int, list[int]]]:
    for window, begin in enumerate(range(0, len(ids), width)):
        piece = ids[begin : begin + width]
        if len(piece) >= MIN_TOKENS:
            yield window, piece


def _sequence(
    ids: list[int],
    ctx: int,
    padding: int,
    special: Int32[np.ndarray, " n_special"],
    document: int,
    window: int,
) -> TokenSequence:
    tokens = np.full(ctx, padding, dtype=np.int32)
    tokens[: len(ids)] = ids
    attend = np.arange(ctx) < len(ids)
    return TokenSequence(tokens, attend, np.isin(tokens, special) & attend, document, window)

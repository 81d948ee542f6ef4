"""Documents to token sequences of one width, for harvesting.

Flow: 1. documents are tokenised some at a time; 2. each is cut into windows of `ctx` tokens, BOS included where the
tokenizer itself adds one; 3. the last, shorter window of each is padded on the right.

A sequence holds tokens of one document only, so that nothing attends across documents, unless `cross_documents` asks
for it: then documents are joined, with EOS between them, and only the very last window is shorter. The result depends
on the documents, the tokenizer and the arguments alone, and can be taken up again behind any sequence. Left out: torch,
and the choice of what to mask; `attend` and `special` say what a token is.
"""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from activations.errors import ConfigError
from activations.text import Document

_BATCH_DOCUMENTS = 256
_BATCH_CHARS = 1_000_000
_CONTROL_TOKEN = re.compile(r"<\|.*\|>")


class Position(NamedTuple):
    """A place in the text: a token of a document."""

    document: int
    """`Document.index`"""
    token: int
    """0-based place among the document's tokens, BOS not counted"""


class TokenSequence(NamedTuple):
    """One window of text."""

    tokens: Int32[np.ndarray, " ctx"]
    """Token ids, then padding."""
    attend: Bool[np.ndarray, " ctx"]
    """True for tokens, False for padding."""
    special: Bool[np.ndarray, " ctx"]
    """True for BOS and other control tokens; False for text and for padding."""
    document: int
    """`Document.index` of the document it begins in."""
    after: Position
    """Where the next sequence begins; packing goes on from here with `start`."""


def pack(
    documents: Iterable[Document],
    tokenizer: Any,
    ctx: int,
    *,
    start: tuple[int, int] = (0, 0),
    cross_documents: bool = False,
) -> Iterator[TokenSequence]:
    """Cut documents into sequences of `ctx` tokens.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      ctx: tokens a sequence.
      start: position to begin at, the `after` of an earlier sequence; documents before it are not tokenised.
      cross_documents: join documents, with EOS between them, so that a sequence may hold several.
    Raises: ConfigError if `ctx` leaves no room for text.
    """
    # Set either way: the tokenizer otherwise warns about threads whenever the process forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    bos = bos_ids(tokenizer)
    if ctx <= len(bos):
        least = len(bos) + 1
        raise ConfigError(f"ctx {ctx}", expected=f"at least {least} tokens", got=ctx, fix=f"Use ctx={least} or more.")
    remaining = (document for document in documents if document.index >= start[0])
    windows = _joined if cross_documents else _separate
    return _sequences(windows(_encoded(remaining, tokenizer), tokenizer, ctx - len(bos), start), tokenizer, ctx, bos)


def bos_ids(tokenizer: Any) -> list[int]:
    """The token ids that the tokenizer by itself puts before a text; often none."""
    bare, full = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return list(full[: full.index(bare[0])])


def without_bos(tokenizer: Any, text: str) -> str:
    """A text that holds what the tokenizer puts in front by itself, without it, so that it is not there twice."""
    return text.removeprefix(str(tokenizer.decode(bos_ids(tokenizer))))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that steer a model instead of being text: BOS, EOS, padding, chat turns."""
    added = tokenizer.added_tokens_decoder.items()
    control = {index for index, token in added if token.special or _CONTROL_TOKEN.fullmatch(token.content)}
    return frozenset(control) | frozenset(tokenizer.all_special_ids)


_Encoded = tuple[int, list[int]]
_Window = tuple[list[int], int, Position]


def _sequences(windows: Iterator[_Window], tokenizer: Any, ctx: int, bos: list[int]) -> Iterator[TokenSequence]:
    special = np.array(sorted(special_ids(tokenizer)), dtype=np.int32)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for ids, document, after in windows:
        tokens = np.full(ctx, padding, dtype=np.int32)
        length = len(bos) + len(ids)
        tokens[:length] = [*bos, *ids]
        attend = np.arange(ctx) < length
        yield TokenSequence(tokens, attend, np.isin(tokens, special) & attend, document, after)


def _separate(encoded: Iterator[_Encoded], tokenizer: Any, width: int, start: tuple[int, int]) -> Iterator[_Window]:
    for document, ids in encoded:
        first = start[1] if document == start[0] else 0
        for begin in range(first, len(ids), width):
            piece = ids[begin : begin + width]
            yield piece, document, Position(document, begin + len(piece))


def _joined(encoded: Iterator[_Encoded], tokenizer: Any, width: int, start: tuple[int, int]) -> Iterator[_Window]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    window: list[int] = []
    document, after = start[0], Position(*start)
    for index, ids in encoded:
        ids, begin = [*ids, *end], start[1] if index == start[0] else 0
        while begin < len(ids):
            document = document if window else index
            piece = ids[begin : begin + width - len(window)]
            window, begin = [*window, *piece], begin + len(piece)
            after = Position(index, begin)
            if len(window) == width:
                yield window, document, after
                window = []
    if window:
        yield window, document, after


def _encoded(documents: Iterable[Document], tokenizer: Any) -> Iterator[_Encoded]:
    for batch in _batches(documents):
        encoded = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        yield from zip((document.index for document in batch), encoded, strict=True)


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

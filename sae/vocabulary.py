"""The tokens of a model as bytes, so that text is shown token by token without a tokenizer.

Flow: 1. bytes of each token, from the pieces of a fast Hugging Face tokenizer and what its decoder says they mean;
2. a sequence of ids as one text a token.

A byte-level token may be a part of a character. The character is shown at the token that completes it, and the bytes
of the parts before as they are, so that nothing is shown twice and nothing as U+FFFD:

    bytes          " caf"   C3      A9 "!"   FF      0A
    texts          " caf"   "⟨C3⟩"  "é!"     "⟨FF⟩"  "↵"

What would not be seen is shown in its place: line breaks and control characters as ↵, ⇥ or a picture such as ␛, other
characters that only direct how text is laid out, such as those that turn its direction, as ⟨U+202E⟩, and an id that is
no token as ⟨#49152⟩. White space else stays as it is. Left out: from text to tokens.
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_BLANK = "\u2581"
"""what stands for a space in the pieces of SentencePiece"""
_PICTURES = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


class Vocabulary(NamedTuple):
    """The bytes of all tokens, joined."""

    ends: Int[np.ndarray, " token"]
    """where the bytes of each token end; they begin where those of the one before end"""
    data: UInt8[np.ndarray, " byte"]

    @classmethod
    def of(cls, tokens: Iterable[bytes]) -> "Vocabulary":
        """The vocabulary whose tokens these are, in the order of their ids; b"" where an id is no token."""
        parts = list(tokens)
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64).astype(np.int32)
        return cls(ends, np.frombuffer(b"".join(parts), np.uint8))

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> "Vocabulary":
        """The vocabulary of a Hugging Face tokenizer, its added tokens included."""
        ids = tokenizer.get_vocab()
        tokens = [b""] * (max(ids.values(), default=-1) + 1)
        added = set(tokenizer.get_added_vocab().values())
        read = _reader(tokenizer)
        for piece, token in ids.items():
            tokens[token] = piece.encode() if token in added else read(piece, token)
        return cls.of(tokens)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; none of an id that is no token."""
        if not 0 <= token < len(self.ends):
            return b""
        return self.data[int(self.ends[token - 1]) if token else 0 : int(self.ends[token])].tobytes()

    def texts(self, ids: Iterable[int | np.integer]) -> list[str]:
        """How a sequence of tokens is shown, one text a token."""
        texts, before = [], b""
        for token in ids:
            new = self.bytes_of(int(token))
            text, before = _shown(before, new) if new else (f"⟨#{token}⟩", b"")
            texts.append(text)
        return texts


NO_TOKENS = Vocabulary.of([])


def visible(text: str) -> str:
    """Text with what would not be seen shown in its place.

    >>> visible("a b\\n\\x1b[1m\\u202e")
    'a b↵␛[1m⟨U+202E⟩'
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(letter: str) -> str:
    if letter in _PICTURES:
        return _PICTURES[letter]
    if letter < " ":
        return chr(0x2400 + ord(letter))
    return f"⟨U+{ord(letter):04X}⟩" if unicodedata.category(letter) in _HIDDEN else letter


def _shown(before: bytes, new: bytes) -> tuple[str, bytes]:
    """Text of bytes behind `before`, a part of a character, and the part of a character that they end with."""
    if not before:
        try:
            return visible(new.decode()), b""
        except UnicodeDecodeError:
            pass
    whole, texts, loose, at = before + new, [], b"", 0
    while at < len(whole):
        letter, n = _letter(whole[at : at + 4])
        if letter is None and n == 0:
            break
        if letter is not None:
            texts += [_bytes(loose), visible(letter)]
            loose = b""
        elif at >= len(before):
            loose += whole[at : at + 1]
        at += n
    texts.append(_bytes(loose + whole[max(at, len(before)) :]))
    return "".join(texts), whole[at:]


def _letter(start: bytes) -> tuple[str | None, int]:
    """The character that bytes begin with, with its length; (None, 0) for a part of one, (None, 1) for neither."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for n in range(1, len(start) + 1):
        try:
            if letter := decoder.decode(start[n - 1 : n]):
                return letter, n
        except UnicodeDecodeError:
            return None, 1
    return None, 0


def _bytes(values: bytes) -> str:
    return f"⟨{values.hex(' ').upper()}⟩" if values else ""


def _reader(tokenizer: Any) -> Callable[[str, int], bytes]:
    """A function from a piece and its id to bytes, by how the tokenizer's own decoder reads it."""
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"], ensure_ascii=False)
    kinds = set(re.findall(r'"type": "(\w+)"', decoder))
    if "ByteLevel" in kinds:
        values = {letter: value for value, letter in enumerate(_byte_letters())}
        return lambda piece, _: _byte_level(piece, values)
    if "ByteFallback" in kinds or "Metaspace" in kinds or _BLANK in decoder:
        return lambda piece, _: _sentencepiece(piece)
    return lambda _, token: str(tokenizer.decode([token])).encode()


def _byte_level(piece: str, values: dict[str, int]) -> bytes:
    # A control token that is not declared as added is written as it is.
    return bytes(values[letter] for letter in piece) if values.keys() >= set(piece) else piece.encode()


def _sentencepiece(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(_BLANK, " ").encode()


def _byte_letters() -> list[str]:
    """The letter by which byte-level BPE writes each byte: itself if it prints, else one from U+0100 on, in order."""
    spare = map(chr, range(0x100, 0x200))
    return [chr(i) if chr(i).isprintable() and chr(i) != " " else next(spare) for i in range(256)]

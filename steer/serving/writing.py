"""The text of an answer, token by token, up to where it stops.

Flow: 1. a token becomes the text that it completes; 2. what may be the beginning of a stop string is held back; 3. a
stop string ends the answer in front of it.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream


class Piece(NamedTuple):
    """What a token adds."""

    text: str
    has_stopped: bool
    """a stop string came: nothing follows"""


class Writer:
    """Turns the tokens of one answer into its text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        """Args: tokenizer: a fast one of transformers."""
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded = self._held = ""

    def add(self, token: int) -> Piece:
        """The text that this token adds to what is shown."""
        self._tokens.append(token)
        new = self._step(token)
        self._decoded += new
        return self._shown(self._held + new)

    def _step(self, token: int) -> str:
        """What a token completes.

        Tokenizers that fall back to bytes decode a run of them at once, so one that is no character can change those
        before it, which have been shown. The library raises a bare Exception then; text begins anew at this token.
        """
        try:
            return self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        except Exception:
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer.backend_tokenizer, token) or ""

    def end(self) -> Piece:
        """What is left when the last token has come."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        shown = self._shown(self._held + rest)
        return shown if shown.has_stopped else Piece(shown.text + self._held, False)

    def _shown(self, text: str) -> Piece:
        at = min((i for stop in self._stops if (i := text.find(stop)) >= 0), default=-1)
        if at >= 0:
            self._held = ""
            return Piece(text[:at], True)
        n = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n :]
        return Piece(text[: len(text) - n], False)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


def text_of(tokenizer: Any, token: int) -> str:
    """One token by itself, special ones as they are spelled."""
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def bytes_of(tokenizer: Any, token: int) -> list[int] | None:
    """The bytes of one token, also where it is only a part of a character; none: the tokenizer does not tell."""
    text = text_of(tokenizer, token)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return list(text.encode())
    spelled, known = tokenizer.convert_ids_to_tokens(token), _byte_of()
    return [known[each] for each in spelled] if all(each in known for each in spelled) else None


@cache
def _byte_of() -> dict[str, int]:
    """How byte-level tokenizers spell bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {spelled: byte for byte, spelled in bytes_to_unicode().items()}

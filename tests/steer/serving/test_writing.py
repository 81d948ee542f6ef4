"""Text as it is written: whole characters, and stop strings that never show."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Sequence
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from steer.serving.writing import Writer, bytes_of, text_of

TEXTS = ["The river ran past the mill.", "naïve — 漢字 🌊 end", "a\n\nb", ""]


def say(tokenizer: Any, text: str, stops: list[str]) -> tuple[str, list[str], bool]:
    writer, pieces = Writer(tokenizer, stops), []
    for token in tokenizer(text)["input_ids"]:
        piece = writer.add(token)
        pieces.append(piece.text)
        if piece.has_stopped:
            return "".join(pieces), pieces, True
    piece = writer.end()
    return "".join([*pieces, piece.text]), pieces, piece.has_stopped


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text_and_never_end_within_a_character(tiny_tokenizer: Any, text: str) -> None:
    said, pieces, _ = say(tiny_tokenizer, text, [])
    assert said == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_bytes_that_are_no_character_come_at_the_end_as_they_decode(tiny_tokenizer: Any) -> None:
    (first, *_) = tiny_tokenizer("漢")["input_ids"]
    writer = Writer(tiny_tokenizer)
    assert writer.add(first).text == ""
    assert writer.end().text == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_undo_what_was_shown_do_not_end_the_text() -> None:
    """A tokenizer that falls back to bytes, as Gemma's does: a space that was shown is none beside what follows."""
    vocabulary = {"<unk>": 0, "x": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = Sequence([ByteFallback(), Fuse()])
    writer = Writer(PreTrainedTokenizerFast(tokenizer_object=backend))
    shown = [writer.add(token).text for token in (1, 0x20 + 2, 0xC2 + 2, 0x41 + 2, 1, 1)]
    assert "".join(shown).startswith("x ")
    assert "".join(shown).endswith("xx")


@given(st.text("abc ", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_in_front_of_it(tiny_tokenizer: Any, text: str, stops: list[str]) -> None:
    said, pieces, has_stopped = say(tiny_tokenizer, text, stops)
    first = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    assert has_stopped == (first is not None)
    if first is None:
        assert said == text
    else:  # a stop string that is whole earlier may begin later than one that was not yet
        assert text.startswith(said)
        assert all(stop not in said for stop in stops)
        assert any(text[len(said) :].startswith(stop) for stop in stops)
    assert not any(stop in "".join(pieces) for stop in stops)


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back(tiny_tokenizer: Any) -> None:
    writer = Writer(tiny_tokenizer, ["<end>"])
    shown = ""
    for token in tiny_tokenizer("go <en")["input_ids"]:
        shown += writer.add(token).text
    assert shown == "go "
    assert writer.end().text == "<en"


def test_tokens_are_told_by_their_bytes_also_within_a_character(tiny_tokenizer: Any) -> None:
    tokens = tiny_tokenizer("é漢x")["input_ids"]
    assert bytes(byte for token in tokens for byte in bytes_of(tiny_tokenizer, token) or []).decode() == "é漢x"
    assert text_of(tiny_tokenizer, tiny_tokenizer.eos_token_id) == "<|endoftext|>"

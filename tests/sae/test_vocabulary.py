"""Tokens as bytes and as text, with real tokenizers and any bytes."""

import re
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.models import LoadedModel
from sae.vocabulary import NO_TOKENS, Vocabulary, visible

TEXTS = [
    "The mill by the sea.", " two  spaces\tand\n\n", "café ÅÄÖ ñ", "日本語 漢字", "🙂👩‍👩‍👧 🇸🇪", "עברית العربية",
    "\x00\x1b[1m\x7f\u202eabc\u2028", "﷽ \u0301 \ufeff", "<|im_start|>user\n",
]  # fmt: skip
SHOWN_BYTES = re.compile("⟨[0-9A-F]{2}(?: [0-9A-F]{2})*⟩")


@pytest.fixture(scope="module")
def vocabulary(smollm2: LoadedModel) -> Vocabulary:
    return Vocabulary.of_tokenizer(smollm2.tokenizer)


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """A tokenizer of the kind of Llama 2 and Gemma: pieces with a blank for a space, and bytes for what it lacks."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "m", "i", "l", "é", "▁m", "il", "▁mil"]
    merges = [("▁", "m"), ("i", "l"), ("▁m", "il")]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


def test_bytes_of_a_real_models_tokens_are_those_of_the_text(smollm2: LoadedModel, vocabulary: Vocabulary) -> None:
    assert len(vocabulary.ends) == len(smollm2.tokenizer) == 49_152
    for text in TEXTS:
        ids = smollm2.tokenizer(text)["input_ids"]
        assert b"".join(map(vocabulary.bytes_of, ids)).decode() == text
    whole = [i for i in range(len(smollm2.tokenizer)) if "�" not in smollm2.tokenizer.decode([i])]
    assert len(whole) > 48_000
    for token in whole:
        assert vocabulary.bytes_of(token).decode() == smollm2.tokenizer.decode([token])


@given(st.text())
def test_any_text_is_shown_whole(smollm2: LoadedModel, vocabulary: Vocabulary, text: str) -> None:
    ids = smollm2.tokenizer(text)["input_ids"]
    read = b"".join(map(vocabulary.bytes_of, ids))
    assert read.decode(errors="replace") == smollm2.tokenizer.decode(ids), "the tokenizer has no token for a few bytes"
    texts = vocabulary.texts(ids)
    assert len(texts) == len(ids)
    assert all(texts), "each token is seen"
    assert "\ufffd" in text or "\ufffd" not in "".join(texts)
    assert SHOWN_BYTES.sub("", "".join(texts)) == visible(read.decode(errors="ignore"))


def test_tokens_of_sentencepiece(sentencepiece: Any) -> None:
    vocabulary = Vocabulary.of_tokenizer(sentencepiece)
    ids = sentencepiece("<bos> mil mié€", add_special_tokens=False)["input_ids"]
    assert vocabulary.texts(ids) == ["<bos>", " mil", " m", "i", "é", "⟨E2⟩", "⟨82⟩", "€"]
    assert b"".join(map(vocabulary.bytes_of, ids[1:])).decode() == " mil mié€"


def test_a_tokenizer_of_another_kind_is_asked_itself() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "mill": 1, "##s": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert Vocabulary.of_tokenizer(tokenizer).texts([1, 2, 0]) == ["mill", tokenizer.decode([2]), "[UNK]"]


def test_parts_of_a_character_are_bytes_until_it_is_complete() -> None:
    euro, face = "€".encode(), "🙂".encode()
    tokens = [b" caf\xc3", b"\xa9!", euro[:2], euro[2:], face[:1], face[1:3], face[3:] + b"x\xff" + euro[:1], b"a", b""]
    vocabulary = Vocabulary.of(tokens)
    texts = [" caf⟨C3⟩", "é!", "⟨E2 82⟩", "€", "⟨F0⟩", "⟨9F 99⟩", "🙂x⟨FF E2⟩", "a", "⟨#8⟩", "⟨#9⟩", "⟨#-1⟩"]
    assert vocabulary.texts([*range(10), -1]) == texts
    assert vocabulary.texts([3, 1, 2, 7]) == ["⟨AC⟩", "⟨A9⟩!", "⟨E2 82⟩", "a"]
    assert [vocabulary.bytes_of(i) for i in range(9)] == tokens
    assert vocabulary.texts([4, 8, 5]) == ["⟨F0⟩", "⟨#8⟩", "⟨9F 99⟩"], "what is no token ends a character"


@given(st.lists(st.binary(min_size=1, max_size=5), max_size=12))
def test_any_bytes_are_shown_once_and_in_order(tokens: list[bytes]) -> None:
    texts = Vocabulary.of(tokens).texts(range(len(tokens)))
    joined = b"".join(tokens)
    assert all(texts)
    assert len(texts) == len(tokens)
    assert "\ufffd" not in "".join(texts) or "\ufffd".encode() in joined
    assert "".join(SHOWN_BYTES.sub("", text) for text in texts) == visible(joined.decode(errors="ignore"))
    for token, text in zip(tokens, texts, strict=True):
        if SHOWN_BYTES.fullmatch(text):
            assert bytes.fromhex(text[1:-1]) in token


@given(st.text())
def test_nothing_hides(text: str) -> None:
    for letter in visible(text):
        assert unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    assert len(visible(text)) >= len(text)


def test_no_tokens() -> None:
    assert NO_TOKENS.texts([0, 1]) == ["⟨#0⟩", "⟨#1⟩"]

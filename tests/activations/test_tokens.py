"""Packing documents into sequences."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activations import tokens
from activations.errors import ConfigError
from activations.text import Document
from activations.tokens import TokenSequence, bos_ids, pack, special_ids

TEXTS = st.lists(st.text("abc de.\n", min_size=1, max_size=60), max_size=6)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def docs(*texts: str) -> list[Document]:
    return [Document(text, index) for index, text in enumerate(texts)]


def same(one: TokenSequence, other: TokenSequence) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def all_same(ones: list[TokenSequence], others: list[TokenSequence]) -> bool:
    return len(ones) == len(others) and all(map(same, ones, others))


@pytest.fixture
def bos_tokenizer(tiny_tokenizer: Any) -> Any:
    """The tiny tokenizer, made to put <|endoftext|> before each text by itself."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tiny_tokenizer.eos_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@quick
@given(texts=TEXTS, ctx=st.integers(2, 12))
def test_sequences_hold_the_tokens_of_one_document_each(tiny_tokenizer: Any, texts: list[str], ctx: int) -> None:
    sequences = list(pack(docs(*texts), tiny_tokenizer, ctx))
    for index, text in enumerate(texts):
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [int(t) for s in sequences if s.document == index for t in s.tokens[s.attend]] == ids
    assert [s.after for s in sequences] == sorted(s.after for s in sequences)
    for sequence in sequences:
        assert sequence.tokens.shape == sequence.attend.shape == sequence.special.shape == (ctx,)
        assert sequence.tokens.dtype == np.int32
        assert 1 <= sequence.attend.sum() <= ctx
        assert sequence.attend[: sequence.attend.sum()].all(), "padding is on the right"


@quick
@given(texts=TEXTS, n_done=st.integers(1, 20), cross=st.booleans())
def test_resumes_behind_any_sequence(tiny_tokenizer: Any, texts: list[str], n_done: int, cross: bool) -> None:
    whole = list(pack(docs(*texts), tiny_tokenizer, 6, cross_documents=cross))
    if n_done := min(n_done, len(whole)):
        start = whole[n_done - 1].after
        assert all_same(list(pack(docs(*texts), tiny_tokenizer, 6, start=start, cross_documents=cross)), whole[n_done:])


@quick
@given(texts=TEXTS, ctx=st.integers(2, 12))
def test_joined_documents_have_eos_between_them_and_one_short_end(
    tiny_tokenizer: Any, texts: list[str], ctx: int
) -> None:
    sequences = list(pack(docs(*texts), tiny_tokenizer, ctx, cross_documents=True))
    ids = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    stream = [(token, index) for index, one in enumerate(ids) for token in [*one, tiny_tokenizer.eos_token_id]]
    assert [int(t) for s in sequences for t in s.tokens[s.attend]] == [token for token, _ in stream]
    assert [s.document for s in sequences] == [index for _, index in stream[::ctx]]
    assert all(s.attend.all() for s in sequences[:-1])
    assert all((s.special == ((s.tokens == tiny_tokenizer.eos_token_id) & s.attend)).all() for s in sequences)


def test_batches_make_no_difference(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = docs(*["the river ran on " * n for n in range(1, 30)])
    whole = list(pack(documents, tiny_tokenizer, 16))
    monkeypatch.setattr(tokens, "_BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(tokens, "_BATCH_CHARS", 100)
    assert all_same(list(pack(documents, tiny_tokenizer, 16)), whole)


def test_documents_before_the_start_are_not_tokenised(tiny_tokenizer: Any) -> None:
    seen: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_tokenizer, name)

        def __call__(self, texts: Any, **kwargs: Any) -> Any:
            seen.extend([texts] if isinstance(texts, str) else texts)
            return tiny_tokenizer(texts, **kwargs)

    sequences = list(pack(docs("one two three", "four five six"), Spy(), 8, start=(1, 0)))
    assert {sequence.document for sequence in sequences} == {1}
    assert "one two three" not in seen


def test_is_lazy(tiny_tokenizer: Any) -> None:
    def endless() -> Iterator[Document]:
        index = 0
        while True:
            yield Document("the cat sat on the mat", index)
            index += 1

    assert next(pack(endless(), tiny_tokenizer, 8)).document == 0


def test_bos_only_where_the_tokenizer_adds_it(tiny_tokenizer: Any, bos_tokenizer: Any) -> None:
    assert bos_ids(tiny_tokenizer) == []
    bos = bos_tokenizer.bos_token_id
    assert bos_ids(bos_tokenizer) == [bos]
    plain = list(pack(docs("the river ran past the mill"), tiny_tokenizer, 8))
    with_bos = list(pack(docs("the river ran past the mill"), bos_tokenizer, 9))
    assert all(s.tokens[0] == bos and s.special[0] and s.attend[0] for s in with_bos)
    assert [list(s.tokens[1:][s.attend[1:]]) for s in with_bos] == [list(s.tokens[s.attend]) for s in plain]


def test_control_tokens_are_special_and_padding_is_not(tiny_tokenizer: Any) -> None:
    (sequence,) = pack(docs("<|im_start|>user\nhey<|im_end|>"), tiny_tokenizer, 32)
    marked = [tiny_tokenizer.decode([t]) for t in sequence.tokens[sequence.special]]
    assert marked == ["<|im_start|>", "<|im_end|>"]
    assert not sequence.special[~sequence.attend].any()


def test_added_words_are_not_special(tiny_tokenizer: Any) -> None:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("    ", special=False), AddedToken("<|tool|>", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    special = special_ids(tokenizer)
    assert backend.token_to_id("<|tool|>") in special
    assert backend.token_to_id("    ") not in special


def test_truncation_left_on_by_a_caller_does_not_cut(tiny_tokenizer: Any) -> None:
    text = "the river ran past the mill " * 4
    whole = list(pack(docs(text), tiny_tokenizer, 8))
    tiny_tokenizer(text, truncation=True, max_length=5, padding="max_length")
    assert all_same(list(pack(docs(text), tiny_tokenizer, 8)), whole)


def test_ctx_too_small(bos_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        pack(docs("a"), bos_tokenizer, 1)

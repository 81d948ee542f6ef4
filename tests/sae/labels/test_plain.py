"""Labels without a language model are counts, of the strongest activations, for every latent."""

from types import SimpleNamespace

import pytest

from sae.index_db import FeatureIndex
from sae.labels.plain import active_tokens, logit_label, namer, plain_labels, token_label
from tests.sae.labels.conftest import D_SAE, DEAD, Indexed, context, latent_row

WORDS = {1: " river", 2: "River", 3: " sea", 4: "\n", 5: " of"}
NAMES = namer(SimpleNamespace(decode=lambda ids: WORDS[ids[0]]))


def test_tokens_are_ranked_by_their_activation_and_not_by_their_number() -> None:
    row = latent_row([context(0, [1, 3, 5], [1.0, 9.0, 0.0])], [context(1, [1, 2, 5, 5], [2.0, 2.5, 0.25, 0.25])])
    tokens = active_tokens(row, NAMES)
    assert [token.text for token in tokens] == ["sea", "river", "of"]
    assert [token.share for token in tokens] == pytest.approx([9 / 15, 5.5 / 15, 0.5 / 15])
    assert token_label(row, NAMES) == "tokens sea, river, of"


def test_one_token_that_holds_nearly_all_stands_for_itself() -> None:
    row = latent_row([context(0, [1, 3], [8.0, 0.0])], [context(1, [2, 3], [1.0, 1.9])])
    assert token_label(row, NAMES) == "the token river"
    row = latent_row([context(0, [4, 3], [9.0, 0.5])], [])
    assert token_label(row, NAMES) == "the token ↵"


def test_a_document_counts_once_and_rare_tokens_are_not_named() -> None:
    twice = context(0, [1, 3], [5.0, 0.0])
    row = latent_row([twice, context(1, [3, 5], [5.0, 0.1])], [twice])
    assert token_label(row, NAMES) == "tokens river, sea"


def test_one_that_was_never_active_has_only_what_it_raises() -> None:
    row = latent_row([], [])
    assert token_label(row, NAMES) is None
    assert logit_label(row) == "raises sea, mill"
    assert [label.kind for label in plain_labels([row], NAMES)] == ["logits"]


def test_every_latent_of_an_index_gets_one(indexed: Indexed) -> None:
    index = FeatureIndex.open(indexed.index)
    labels = list(plain_labels(index.each(), namer(indexed.loaded.tokenizer)))
    index.close()
    assert {label.latent for label in labels} == set(range(D_SAE))
    assert [label.kind for label in labels if label.latent == DEAD] == ["logits"]
    assert {label.author for label in labels} == {"saekit"}

"""What the explainer is shown is never what a label is scored on, and negatives are what they are said to be."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.artefact import SaeArtefact
from sae.contexts import Context
from sae.index_db import FeatureIndex, LatentRow
from sae.labels.examples import Pool, draw_pool, make_case, marks, split, spread, strength, text_of, wrong_marks
from sae.labels.reading import active_in
from sae.torch_view import TorchSae
from sae.wiring import Wiring
from tests.sae.labels.conftest import D_SAE, HOOK, Indexed, context, latent_row


def many(n: int = 24, latent: int = 5) -> LatentRow:
    sampled = [context(i, [i, i + 1, i + 2], [0, 0.3 + i / 4, 0]) for i in range(n)]
    strongest = [context(i, [9, 9, i], [0, 0, 8.0 + i / 100]) for i in range(n - 6, n + 6)]
    near = tuple(context(500 + i, [i], [0.0]) for i in range(4))
    return latent_row(strongest, sampled, latent, near)


def documents(contexts: list[Context]) -> set[tuple[int, int]]:
    return {(each.source, each.document) for each in contexts}


@given(st.integers(0, 40), st.integers(0, 5))
def test_no_document_is_on_both_sides_and_none_is_lost(n: int, seed: int) -> None:
    row = many(n) if n > 6 else latent_row([], [context(i, [1], [1.0 + i]) for i in range(n)])
    shown, held = split(row, seed)
    assert not documents(shown) & documents(held)
    assert documents(shown) | documents(held) == documents([*row.sampled, *row.contexts])
    assert abs(len(shown) - len(held)) <= 1


def test_sides_depend_on_seed_and_latent_alone_and_span_all_strengths() -> None:
    row = many()
    assert str(split(row, 0)) == str(split(row, 0))
    assert documents(split(row, 0)[0]) != documents(split(row, 1)[0])
    assert documents(split(row, 0)[0]) != documents(split(many(latent=6), 0)[0])
    for side in split(row, 0):
        scores = [each.score for each in side]
        assert scores == sorted(scores, reverse=True)
        assert min(scores) < 1
        assert max(scores) > 8


def test_contexts_are_taken_from_all_quantiles_in_turn() -> None:
    row = many(40)
    taken = spread(row, split(row, 0)[1], 5, 5)
    shares = [np.mean([each.score <= one.score for each in row.sampled]) for one in taken]
    assert len(taken) == 5
    assert all(a > b for a, b in pairwise(shares))
    assert shares[0] > 0.8
    assert shares[-1] < 0.3


def pool_of(active: np.ndarray) -> Pool:
    return Pool([context(100 + i, [i], [1.0]) for i in range(len(active))], active)


def test_half_of_the_negatives_are_near_misses_and_none_activates_the_latent() -> None:
    row, active = many(), np.zeros((30, 8), bool)
    active[::2, 5] = True
    case = make_case(row, pool_of(active), 6, 8, 5, 0)
    assert len(case.positives) == len(case.negatives) == 8
    assert len(case.shown) == 6
    assert [each.document for each in case.negatives[:4]] == [500, 501, 502, 503]
    assert all((each.document - 100) % 2 == 1 for each in case.negatives[4:])
    assert not documents(case.shown) & documents([*case.positives, *case.negatives])


def test_the_explainer_is_shown_no_document_that_a_label_is_tested_on(indexed: Indexed) -> None:
    index = FeatureIndex.open(indexed.index)
    contexts = draw_pool(index, 30, 0)
    pool, n_tested = Pool(contexts, np.zeros((len(contexts), D_SAE), bool)), 0
    for row in index.each():
        case = make_case(row, pool, 6, 6, 5, 0)
        tested = documents([*case.positives, *case.negatives])
        n_tested += len(tested)
        assert not documents(case.shown) & tested
        assert len(case.positives) == len(case.negatives)
    assert n_tested > 100
    index.close()


def test_a_near_miss_of_a_document_that_was_shown_is_left_out() -> None:
    pool, row = pool_of(np.zeros((30, 8), bool)), many()
    shown = make_case(row, pool, 6, 8, 5, 0).shown
    case = make_case(
        replace(row, near_misses=[context(shown[0].document, [7], [0.0]), *row.near_misses]), pool, 6, 8, 5, 0
    )
    assert [each.document for each in case.negatives[:4]] == [500, 501, 502, 503]


def test_where_negatives_are_few_so_are_positives() -> None:
    active = np.ones((30, 8), bool)
    active[:2, 5] = False
    case = make_case(many(), pool_of(active), 6, 10, 5, 0)
    assert len(case.positives) == len(case.negatives) == 6


def test_a_document_of_the_latent_is_no_negative() -> None:
    pool = Pool([context(3, [1], [1.0]), context(700, [1], [1.0])], np.zeros((2, 8), bool))
    assert 3 not in {each.document for each in make_case(many(), pool, 6, 10, 5, 0).negatives}


def test_the_pool_is_read_as_the_store_was(indexed: Indexed) -> None:
    index, artefact = FeatureIndex.open(indexed.index), SaeArtefact.load(indexed.sae)
    contexts = draw_pool(index, 12, 0)
    assert len(documents(contexts)) == len(contexts) == 12
    assert str(draw_pool(index, 12, 0)) == str(contexts)
    sae = TorchSae(artefact)
    active = active_in(indexed.loaded, sae, Wiring.parse(HOOK), contexts)
    for latent in index.latents(min_density=1e-9):
        row = index.latent(latent)
        starts = [each for each in row.sampled if each.document in {one.document for one in contexts}]
        for each in starts:
            for i, one in enumerate(contexts):
                same = (one.source, one.document) == (each.source, each.document)
                # Windows that begin where the sequence does are read with all that was before them.
                if same and len(one.tokens) == len(each.tokens) and (one.tokens == each.tokens).all() and one.peak < 8:
                    assert active[i, latent] == (each.activations[1:] > 0).any()
    index.close()


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 3))
def test_wrong_marks_are_as_many_and_never_right(right: list[bool], seed: int) -> None:
    marked = np.array(right)
    wrong = wrong_marks(marked, [seed])
    if wrong is None:
        assert not marked.any() or 2 * marked.sum() > len(marked)
    else:
        assert wrong.sum() == marked.sum()
        assert not (wrong & marked).any()


def test_tokens_are_marked_by_their_own_context() -> None:
    assert marks(context(0, [1, 2, 3, 4], [0.0, 1.0, 0.2, 0.4])).tolist() == [False, True, False, True]
    assert strength(context(0, [1], [0.1]), 10.0) == 1


@given(st.lists(st.tuples(st.integers(3, 290), st.booleans()), min_size=1, max_size=30))
def test_a_marked_text_without_its_marks_is_the_text(tiny_tokenizer: Any, tokens: list[tuple[int, bool]]) -> None:
    ids, marked = np.array([token for token, _ in tokens]), np.array([mark for _, mark in tokens])
    plain = text_of(tiny_tokenizer.decode, ids)
    text = text_of(tiny_tokenizer.decode, ids, marked)
    letters = tiny_tokenizer.decode(ids)
    if letters.isprintable() and not set(letters) & set("<> �"):
        assert text.replace("<<", "").replace(">>", "") == plain


def test_white_space_that_is_marked_can_be_seen() -> None:
    words = ["end", "\n\n", "Begin", "  "]
    marked = np.array([False, True, False, True])
    text = text_of(lambda ids: "".join(words[i] for i in ids), np.arange(4), marked)
    assert text == "end ↵ ↵ <<↵↵>>Begin <<␣␣>>"


def test_marks_are_around_words_and_spaces_are_outside(tiny_tokenizer: Any) -> None:
    whole = "The river\nran << past."
    encoded = tiny_tokenizer(whole, return_offsets_mapping=True)
    spans = [(whole.index(word), whole.index(word) + len(word)) for word in ("river", "ran")]
    marked = np.array([any(a < end and b > start for start, end in spans) for a, b in encoded["offset_mapping"]])
    text = text_of(tiny_tokenizer.decode, np.array(encoded["input_ids"]), marked)
    assert text == "The <<river>> ↵ <<ran>> < < past."


@pytest.mark.parametrize("n", [1, 3])
def test_a_tokenizer_that_drops_the_first_space_changes_nothing(n: int) -> None:
    words = [" the", " river", " ran", " past"]

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).removeprefix(" ")

    marked = np.arange(4) == n
    wanted = " ".join(f"<<{word.strip()}>>" if i == n else word.strip() for i, word in enumerate(words))
    assert text_of(decode, np.arange(4), marked) == wanted

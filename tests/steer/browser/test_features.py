"""One latent over HTTP: all that the index has, as it has it."""

import contextlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sae.histogram import edges
from sae.index_db import FeatureIndex
from steer.browser.features import Window, as_feature

from .conftest import HOSTILE


@pytest.fixture
def index(own_index: Path) -> Iterator[FeatureIndex]:
    with contextlib.closing(FeatureIndex.open(own_index)) as index:
        yield index


@pytest.mark.parametrize("latent", [0, 3, 9, 10, 299])
def test_a_feature_is_the_row(index: FeatureIndex, latent: int) -> None:
    row = index.latent(latent)
    feature = as_feature("a", index, row, 0.5)
    json.loads(feature.model_dump_json())
    assert (feature.latent, feature.density) == (latent, pytest.approx(row.density))
    for shown, held in ((feature.contexts, row.contexts), (feature.near_misses, row.near_misses)):
        assert len(shown) == len(held)
        for window, context in zip(shown, held, strict=True):
            assert window.tokens == index.token_texts(context.tokens)
            assert window.values == pytest.approx(context.activations, rel=1e-5)
            assert (window.peak, window.document) == (context.peak, context.document)
            assert window.effect is None
    assert [other.latent for other in feature.neighbours] == [other for other, _ in row.neighbours]
    told = [(other.latent, other.jaccard, other.lift) for other in feature.coactive]
    assert told == [pytest.approx(each, rel=1e-6) for each in row.coactivations]
    assert feature.histogram.edges == edges(row.histogram_start, len(row.histogram)).tolist()
    assert all(text.isprintable() for window in feature.contexts for text in window.tokens)


def test_bins_hold_every_sampled_context_once_and_ascend(index: FeatureIndex) -> None:
    row = index.latent(3)
    bins = as_feature("a", index, row, None).bins
    scores = [window.score for each in bins for window in each.contexts]
    assert sorted(score or 0 for score in scores) == pytest.approx(sorted(each.score for each in row.sampled))
    assert all(low.share_high <= high.share_low + 1e-9 and low.high <= high.low for low, high in pairwise(bins))
    for each in bins:
        found = [window.score or 0 for window in each.contexts]
        assert found == sorted(found, reverse=True)


def test_explanations_come_first_with_scores_controls_and_chance(index: FeatureIndex) -> None:
    said = as_feature("a", index, index.latent(10), None).said
    assert [each.kind for each in said] == ["explanation", "tokens"]
    assert said[0].text == HOSTILE.replace("\u202e", "⟨U+202E⟩")
    scores = {(each.method, each.control): each for each in said[0].scores}
    assert scores["detection", "explanation"].chance == 0.5
    assert scores["intruder", "contexts"].chance == pytest.approx(0.2)
    assert scores["detection", "shuffled"].low is None


def test_a_dead_latent_has_nothing_where_nothing_is(index: FeatureIndex) -> None:
    feature = as_feature("a", index, index.latent(9), None)
    assert (feature.contexts, feature.bins, feature.histogram.counts, feature.coactive) == ([], [], [], [])
    assert feature.output_score is None


def test_an_effect_is_told_where_it_was_measured(index: FeatureIndex) -> None:
    row = index.latent(0)
    row.contexts[0] = row.contexts[0]._replace(effect=np.float32(0.25))
    first: Window = as_feature("a", index, row, None).contexts[0]
    assert first.effect == 0.25

"""What a list of latents is made from: columns over all latents, token texts, pages of rows, and labels."""

import math
import sqlite3
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import CorruptArtefactError, UnknownNameError
from sae.contexts import Context
from sae.index_db import BLOBS, COLUMNS, FIELDS, FILE_NAME, FeatureIndex, LatentRow, write_index
from sae.labels.store import LabelStore, NewLabel
from sae.vocabulary import Vocabulary

N = 5
INFO = {"d_sae": N, "sae_sha256": "beef"}
TOKENS = Vocabulary.of([b"mill", b" sea", b"\xe2\x82", b"\xac"])


def context(effect: float) -> Context:
    return Context(1, 0, np.array([0], np.int32), np.array([1.0], np.float32), effect=effect)


def row(latent: int, effects: tuple[float, ...] = (), **figures: Any) -> LatentRow:
    values: dict[str, Any] = {
        "density": latent / 10, "max_activation": 2.0 * latent, "mean_activation": 1.5 * latent, "histogram": [1, 2],
        "top_logits": [("mill", 1.0), ("sea", 0.5)], "bottom_logits": [("b", -1.0)],
        "neighbours": [(0, 0.25), (1, -0.5)], "contexts": [context(effect) for effect in effects],
    }  # fmt: skip
    return LatentRow(latent, **{**values, **figures})


ROWS = [
    row(0, (math.nan, 0.5, -0.25), logit_entropy=3.0, output_score=0.1, confidence_change=-0.2),
    row(2, (math.nan,), stability=0.75, coactivations=[(0, 0.125, 2.0), (1, 0.0625, 9.0)]),
    row(1, (), top_logits=[], neighbours=[]),
    row(4, (0.75,)),
]


@pytest.fixture
def index(tmp_path: Path) -> FeatureIndex:
    write_index(tmp_path, INFO, ROWS, TOKENS)
    return FeatureIndex.open(tmp_path)


def test_columns_hold_every_figure_in_order_of_the_latents(index: FeatureIndex) -> None:
    nan = math.nan
    expected = {
        "density": [0, 0.1, 0.2, nan, 0.4],
        "max_activation": [0, 2, 4, nan, 8],
        "mean_activation": [0, 1.5, 3, nan, 6],
        "logit_entropy": [3, nan, nan, nan, nan],
        "top_logit": [1, nan, 1, nan, 1],
        "output_score": [0.1, nan, nan, nan, nan],
        "confidence_change": [-0.2, nan, nan, nan, nan],
        "stability": [nan, nan, 0.75, nan, nan],
        "max_ablation_effect": [0.5, nan, nan, nan, 0.75],
        "mean_ablation_effect": [0.125, nan, nan, nan, 0.75],
        "nearest_cosine": [0.25, nan, 0.25, nan, 0.25],
        "nearest_jaccard": [nan, nan, 0.125, nan, nan],
    }
    columns = index.columns()
    assert list(columns) == list(expected) == list(COLUMNS)
    for name, column in columns.items():
        assert column.dtype == np.float32
        np.testing.assert_array_equal(column, np.array(expected[name], np.float32), err_msg=name)
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


@given(st.lists(st.one_of(st.none(), st.floats(width=32)), min_size=1, max_size=8))
def test_any_figure_comes_back(tmp_path_factory: pytest.TempPathFactory, scores: list[float | None]) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = [row(i, output_score=score) for i, score in enumerate(scores) if score is None or not math.isnan(score)]
    write_index(folder, {"d_sae": len(scores)}, rows)
    index = FeatureIndex.open(folder)
    expected = np.array([math.nan if score is None else score for score in scores], np.float32)
    np.testing.assert_array_equal(index.columns()["output_score"], expected)
    index.close()


def test_columns_and_tokens_are_replaced_with_the_rows_and_not_before(tmp_path: Path) -> None:
    write_index(tmp_path, INFO, ROWS, TOKENS)
    reading = FeatureIndex.open(tmp_path)

    def failing() -> Any:
        yield row(0, output_score=0.9)
        np.testing.assert_array_equal(reading.columns()["output_score"][:1], np.float32(0.1))
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_index(tmp_path, INFO, failing(), Vocabulary.of([b"other"]))
    assert reading.columns()["output_score"][0] == np.float32(0.1)
    assert FeatureIndex.open(tmp_path).token_texts([0]) == ["mill"]
    write_index(tmp_path, {"d_sae": 1}, [row(0, output_score=0.9)])
    again = FeatureIndex.open(tmp_path)
    assert again.columns()["output_score"].tolist() == [np.float32(0.9)]
    assert again.token_texts([0]) == ["⟨#0⟩"], "without a vocabulary tokens are numbers"


def test_tokens_are_shown_from_the_index(index: FeatureIndex) -> None:
    assert index.token_texts([0, 1, 2, 3, 4]) == ["mill", " sea", "⟨E2 82⟩", "€", "⟨#4⟩"]
    assert index.token_texts(np.array([1], np.int32)) == [" sea"]


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE arrays",
        "DELETE FROM arrays",
        "UPDATE arrays SET dtype = '<f8'",
        "UPDATE arrays SET dtype = '|O'",
        "UPDATE arrays SET shape = '[1000000000000]'",
        "UPDATE arrays SET shape = '[4]', data = substr(data, 1, 16)",
        "UPDATE arrays SET shape = '[-5]'",
        "UPDATE arrays SET shape = '[5, 1]'",
        "UPDATE arrays SET shape = 'no json'",
        "UPDATE arrays SET data = substr(data, 1, 19)",
        "UPDATE arrays SET data = CAST(zeroblob(20) AS TEXT)",
        "UPDATE arrays SET data = 20",
        "UPDATE arrays SET data = zeroblob(100000000)",
        "UPDATE arrays SET name = 'a' || name",
    ],
)
def test_damaged_arrays_are_corrupt_and_cost_no_memory(tmp_path: Path, statement: str) -> None:
    write_index(tmp_path, INFO, ROWS, TOKENS)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute(statement)
    connection.close()
    index = FeatureIndex.open(tmp_path)
    tracemalloc.start()
    with pytest.raises(CorruptArtefactError, match="Build it again with: saekit index"):
        index.columns()
    if "[5, 1]" not in statement and "19" not in statement:  # which leave the tokens whole
        with pytest.raises(CorruptArtefactError, match="Build it again with: saekit index"):
            index.token_texts([0])
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize(
    "ends", [[4, 3, 10, 11], [-1, 8, 10, 11], [4, 8, 10, 12], [4, 8, 10, 10], [2**31 - 1, -(2**31)]]
)
def test_a_vocabulary_that_cannot_be_is_corrupt(tmp_path: Path, ends: list[int]) -> None:
    write_index(tmp_path, INFO, ROWS, TOKENS._replace(ends=np.array(ends, np.int32)))
    with pytest.raises(CorruptArtefactError, match="a vocabulary that cannot be"):
        FeatureIndex.open(tmp_path).token_texts([0])


@pytest.mark.parametrize("value", ["null", '"5"', "[5]", "1.5"])
def test_an_index_that_does_not_say_how_wide_it_is(tmp_path: Path, value: str) -> None:
    write_index(tmp_path, INFO, ROWS)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("UPDATE info SET value = ? WHERE key = 'd_sae'", [value])
    connection.close()
    with pytest.raises(CorruptArtefactError, match="d_sae"):
        FeatureIndex.open(tmp_path)


def test_an_index_of_schema_2_is_to_be_built_again(tmp_path: Path) -> None:
    write_index(tmp_path, INFO, ROWS)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("UPDATE info SET value = '2' WHERE key = 'schema_version'")
        connection.execute("DROP TABLE arrays")
    connection.close()
    with pytest.raises(CorruptArtefactError, match=r"got schema version 2\. Build it again with: saekit index"):
        FeatureIndex.open(tmp_path)
    write_index(tmp_path, INFO, ROWS)
    assert len(FeatureIndex.open(tmp_path).columns()["density"]) == N


def test_a_page_of_rows_has_what_was_asked_for_in_the_order_asked(index: FeatureIndex) -> None:
    assert index.rows_of([4, 0], ["max_activation", "top_logits"]) == [
        {"latent": 4, "max_activation": 8.0, "top_logits": [["mill", 1.0], ["sea", 0.5]]},
        {"latent": 0, "max_activation": 0.0, "top_logits": [["mill", 1.0], ["sea", 0.5]]},
    ]
    assert index.rows_of(np.array([1, 1], np.int32), []) == [{"latent": 1}, {"latent": 1}]
    assert index.rows_of([], FIELDS) == []
    (whole,) = index.rows_of([2], FIELDS)
    stored = vars(index.latent(2))
    assert set(whole) == (set(stored) - set(BLOBS)) | {"label"}
    assert whole["density"] == stored["density"]
    assert whole["label"] is None


def test_a_page_is_one_query_that_reads_no_blob(tmp_path: Path) -> None:
    many = 40_000  # more than a statement takes parameters
    write_index(tmp_path, {"d_sae": many, "sae_sha256": "beef"}, (row(i) for i in range(many)))
    index = FeatureIndex.open(tmp_path)
    asked: list[str] = []
    with index._engine.connect() as connection:
        connection.connection.driver_connection.set_trace_callback(asked.append)  # type: ignore[union-attr]
    assert [each["latent"] for each in index.rows_of(range(many))] == list(range(many))
    queries = [statement for statement in asked if statement.startswith("SELECT")]
    assert len(queries) == 1
    assert not [name for name in BLOBS if name in queries[0]]


def test_fields_and_latents_that_are_not_there(index: FeatureIndex) -> None:
    for name in (*BLOBS, "rowid", "latents.contexts"):
        with pytest.raises(UnknownNameError, match="fields: expected some of latent, density"):
            index.rows_of([0], [name])
    for latent in (-1, 3, 5):
        with pytest.raises(UnknownNameError, match=f"latent {latent}: expected 0 to 4"):
            index.rows_of([0, latent])


def test_the_label_of_a_list_is_the_newest_explanation_before_tokens_before_logits(
    index: FeatureIndex, tmp_path: Path
) -> None:
    assert index.top_labels() == index.top_labels([0]) == {}
    said = [
        NewLabel(0, "logits", "says mill", "saekit"),
        NewLabel(0, "tokens", "on mill", "saekit"),
        NewLabel(1, "note", "who knows", "somebody"),
        NewLabel(1, "logits", "says sea", "saekit"),
        NewLabel(2, "explanation", "old", "a model"),
        NewLabel(2, "explanation", "mills by the sea", "a model"),
        NewLabel(2, "tokens", "on sea", "saekit"),
    ]
    with LabelStore.open(tmp_path, "beef") as store:
        for label in said:
            store.add_label(label)
    with LabelStore.open(tmp_path, "another") as store:
        store.add_label(NewLabel(4, "explanation", "of another SAE", "a model"))
    expected = {0: "on mill", 1: "says sea", 2: "mills by the sea"}
    assert index.top_labels() == index.top_labels(range(N)) == expected
    assert index.top_labels([2, 4]) == {2: "mills by the sea"}
    assert index.top_labels([]) == {}
    with LabelStore.open(tmp_path, "beef") as store:
        store.add_label(NewLabel(2, "explanation", "water mills", "another model"))
        store.add_label(NewLabel(4, "note", "alone", "somebody"))
    assert index.top_labels() == expected | {2: "water mills", 4: "alone"}
    assert [each["label"] for each in index.rows_of([4, 2, 0], ["label"])] == ["alone", "water mills", "on mill"]


def test_a_search_ranks_what_it_finds_and_names_a_latent_once(tmp_path: Path) -> None:
    long = [("mill", 1.0), *((word, 0.5) for word in ["one", "two", "three", "four", "five"])]
    write_index(tmp_path, INFO, [row(0, top_logits=long), row(1, top_logits=[("mill", 1.0)]), row(2, top_logits=[])])
    with LabelStore.open(tmp_path, "beef") as store:
        store.add_label(NewLabel(0, "explanation", "wind mill", "a model"))
        store.add_label(NewLabel(2, "explanation", "a mill which stands far away by the river", "a model"))
    index = FeatureIndex.open(tmp_path)
    assert index.search("mill") == index.search("mi") == [1, 0, 2]
    assert [index.search("m", limit) for limit in (0, 1, 2)] == [[], [1], [1, 0]]
    assert index.search("wind") == index.search("mill w WIND") == [0]
    assert (index.search("mi", cut_from=3), index.search("mil a", cut_from=3)) == ([], [2])
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        query = "SELECT latent FROM search WHERE search MATCH 'mill*' GROUP BY latent ORDER BY min(rank)"
        assert [latent for (latent,) in connection.execute(query)] == [1, 0, 2]
    connection.close()


def test_words_in_very_many_texts_are_found_unranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(i, top_logits=[("mill", 1.0), *[("sea", 1.0)] * (N - i)]) for i in range(N)]
    write_index(tmp_path, INFO, rows)
    index = FeatureIndex.open(tmp_path)
    assert index.search("mill") == [4, 3, 2, 1, 0], "the shortest first"
    monkeypatch.setattr("sae.index_db.RANKED", N)
    assert index.search("mill") == [4, 3, 2, 1, 0]
    monkeypatch.setattr("sae.index_db.RANKED", N - 1)
    assert index.search("mill") == [0, 1, 2, 3, 4]
    assert index.search("mill", 2) == [0, 1]


def test_labels_are_still_found_in_an_index_that_is_built_anew(tmp_path: Path) -> None:
    write_index(tmp_path, INFO, ROWS)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:  # as schema 2 had it
        connection.execute("DROP TABLE search")
        connection.execute("CREATE VIRTUAL TABLE search USING fts5(body, kind UNINDEXED, latent UNINDEXED)")
        connection.execute("INSERT INTO search VALUES ('mill', 'words', 3), ('river', 'explanation', 4)")
    connection.close()
    write_index(tmp_path, INFO, ROWS)
    index = FeatureIndex.open(tmp_path)
    assert index.search("river") == [4]
    assert sorted(index.search("mill")) == [0, 2, 4]
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE name LIKE '%kept%'")]
        assert not tables
        assert (
            "prefix='1 2 3'" in connection.execute("SELECT sql FROM sqlite_master WHERE name = 'search'").fetchone()[0]
        )
    connection.close()

"""Labels, scores and answers stay, are found, and are those of one SAE."""

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sql

from activations.errors import CorruptArtefactError, MismatchError, StorageError
from sae.index_db import FILE_NAME, FeatureIndex, write_index
from sae.labels.chat import Message, Reply, Request, key_of
from sae.labels.store import LabelStore, NewLabel, Spent, explained
from sae.labels.tables import Label, Score
from tests.sae.labels.conftest import Indexed
from tests.sae.labels.scripted import Scripted

SAE = "5ae"
ASKED = Request("detection", 2, (Message("user", "is it so?"),))


@pytest.fixture
def index(tmp_path: Path, indexed: Indexed) -> Iterator[FeatureIndex]:
    shutil.copytree(indexed.index, tmp_path / "index")
    index = FeatureIndex.open(tmp_path / "index")
    index.info["sae_sha256"] = SAE
    yield index
    index.close()


@pytest.fixture
def path(index: FeatureIndex, tmp_path: Path) -> Path:
    return tmp_path / "index"


def told(label: Label) -> tuple[str, str, str]:
    return label.kind, label.author, label.text


def test_labels_are_appended_and_the_newest_of_each_kind_and_author_is_read(path: Path, index: FeatureIndex) -> None:
    assert index.labels(2) == []
    with LabelStore.open(path, SAE) as store:
        first = store.add_label(NewLabel(2, "explanation", "rivers", "m", "p", "r1"))
        assert store.add_label(NewLabel(2, "explanation", "rivers", "m", "p", "r1")) == first
        second = store.add_label(NewLabel(2, "explanation", "brooks", "m", "p", "r2"))
        store.add_label(NewLabel(2, "explanation", "lakes", "n"))
        assert (
            store.add_labels([NewLabel(2, "tokens", "the token sea", "saekit"), NewLabel(3, "logits", "x", "saekit")])
            == 2
        )
        assert (
            store.add_labels([NewLabel(2, "tokens", "the token sea", "saekit"), NewLabel(3, "logits", "y", "saekit")])
            == 1
        )
    assert second > first
    wanted = [("explanation", "m", "brooks"), ("explanation", "n", "lakes"), ("tokens", "saekit", "the token sea")]
    assert [told(label) for label in index.labels(2)] == wanted
    assert [told(label) for label in index.labels(3)] == [("logits", "saekit", "y")]
    with sqlite3.connect(path / FILE_NAME) as database:
        assert database.execute("SELECT text FROM labels WHERE latent = 2 ORDER BY id").fetchall() == [
            ("rivers",), ("brooks",), ("lakes",), ("the token sea",)
        ]  # fmt: skip


def test_labels_are_found_by_their_words_and_old_ones_are_not_once_refreshed(path: Path, index: FeatureIndex) -> None:
    with LabelStore.open(path, SAE) as store:
        store.add_label(NewLabel(2, "explanation", "quaint rivulets", "m", "p", "r1"))
        assert index.search("rivul") == [2]
        store.add_label(NewLabel(2, "explanation", "quaint brooks", "m", "p", "r2"))
        store.add_labels([])
    assert index.search("quaint brook") == [2]
    assert index.search("rivul") == []


def test_labels_of_another_sae_are_neither_read_nor_found(path: Path, index: FeatureIndex) -> None:
    with LabelStore.open(path, "other") as store:
        store.add_label(NewLabel(2, "explanation", "quaint rivers", "m"))
    with LabelStore.open(path, SAE) as store:
        store.add_labels([])
    assert index.labels(2) == []
    assert index.search("quaint") == []


def test_labels_and_answers_outlive_a_new_index(path: Path, index: FeatureIndex) -> None:
    with LabelStore.open(path, SAE) as store:
        number = store.add_label(NewLabel(2, "explanation", "quaint rivers", "m"))
        store.add_scores(
            number, 2, [Score("detection", "explanation", "balanced_accuracy", 0.75, 0.5, 0.9, 20, 1, "j")]
        )
        store.keep(Scripted(), ASKED, Reply("yes", 5, 1))
    write_index(path, dict(index.info), [index.latent(2)])
    assert [label.scores[0].value for label in index.labels(2)] == [0.75]
    assert index.search("quaint") == [2]
    with LabelStore.open(path, SAE, write=False) as store:
        assert store.answers([key_of(Scripted(), ASKED.messages)]) == {key_of(Scripted(), ASKED.messages): "yes"}


def test_scores_are_appended_once_and_the_newest_is_read(path: Path, index: FeatureIndex) -> None:
    old, new = (
        Score("detection", "tokens", "balanced_accuracy", value, None, None, 20, 0, "j", ["a"]) for value in (0.5, 0.75)
    )
    with LabelStore.open(path, SAE) as store:
        number = store.add_label(NewLabel(2, "explanation", "rivers", "m"))
        for scores in ([old], [old], [new], [new]):
            store.add_scores(number, 2, scores)
        assert store.scores([number]) == {number: [new]}
    with sqlite3.connect(path / FILE_NAME) as database:
        assert database.execute("SELECT count(*) FROM scores").fetchone() == (2,)


def test_an_answer_is_kept_whole_and_what_failed_tries_cost_remains(path: Path) -> None:
    chat = Scripted(price_in=1e6, price_out=2e6)
    with LabelStore.open(path, SAE) as store:
        key = key_of(chat, ASKED.messages)
        store.keep(chat, ASKED, Reply(None, 3, 0, "HTTP 503", tries=4))
        assert store.answers([key]) == {}
        store.keep(chat, ASKED, Reply("yes\x00 \u2028", 5, 2, tries=2))
        assert store.answers([key]) == {key: "yes\x00 \u2028"}
        assert store.spent(["scripted"]) == Spent(8, 2, 12.0)
        assert store.spent(["another"]) == Spent(0, 0, 0.0)
    with sqlite3.connect(path / FILE_NAME) as database:
        row = database.execute("SELECT purpose, latent, messages, settings, error, tries FROM requests").fetchall()
    assert row == [("detection", 2, '[{"role": "user", "content": "is it so?"}]', '{"t": 0}', None, 6)]


def test_reading_makes_no_tables(path: Path) -> None:
    with LabelStore.open(path, SAE, write=False) as store:
        assert store.answers(["x"]) == {}
        assert store.spent(["m"]) == Spent(0, 0, 0.0)
    with sqlite3.connect(path / FILE_NAME) as database:
        assert not database.execute("SELECT * FROM sqlite_master WHERE name = 'labels'").fetchall()


def test_tables_without_a_column_are_refused_in_one_line(path: Path, index: FeatureIndex) -> None:
    with sqlite3.connect(path / FILE_NAME) as database:
        database.execute("CREATE TABLE labels (id INTEGER PRIMARY KEY, latent INTEGER, text TEXT)")
    with (
        pytest.raises(CorruptArtefactError, match=r"table labels.*none named author, created"),
        LabelStore.open(path, SAE),
    ):
        pass
    with pytest.raises(CorruptArtefactError, match="table labels"):
        index.labels(2)


def test_a_second_writer_is_refused_and_a_reader_is_not(path: Path) -> None:
    with LabelStore.open(path, SAE):
        with pytest.raises(MismatchError, match="another saekit label"), LabelStore.open(path, SAE):
            pass
        with LabelStore.open(path, SAE, write=False):
            pass


def test_what_a_database_complains_of_is_one_line(tmp_path: Path) -> None:
    def failing(said: str) -> None:
        with explained(tmp_path):
            raise sql.exc.OperationalError("INSERT", {}, sqlite3.OperationalError(said))

    with pytest.raises(StorageError, match="attempt to write a readonly database"):
        failing("attempt to write a readonly database")
    with pytest.raises(OSError, match="database or disk is full"):
        failing("database or disk is full")
    with pytest.raises(CorruptArtefactError, match="malformed"):
        failing("database disk image is malformed")

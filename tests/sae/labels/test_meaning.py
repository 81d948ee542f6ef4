"""Labels by meaning: the rows that are kept, what is embedded when, and hostile files."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from activations.errors import CorruptArtefactError
from sae.index_db import FeatureIndex, LatentRow, write_index
from sae.labels import meaning
from sae.labels.meaning import FILE_NAME, Meanings
from sae.labels.store import LabelStore, NewLabel

SHA, N = "0" * 64, 8


class Letters:
    """How often each of a few letters is in a text, of norm 1; counts what it is asked for."""

    def __init__(self, fingerprint: str = "one"):
        self.fingerprint, self.width = fingerprint, 4
        self.asked: list[str] = []

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        return np.array([self.query(text) for text in texts])

    def query(self, text: str) -> np.ndarray:
        row = np.array([text.count(letter) for letter in "abcd"], np.float32)
        return row / max(float(np.linalg.norm(row)), 1e-9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [LatentRow(i, 0.1, 1.0, 1.0, [], [], [], [], []) for i in range(N)]
    write_index(tmp_path, {"d_sae": N, "sae_sha256": SHA}, rows)
    say(tmp_path, {0: "aab", 1: "b", 2: "aab", 3: "dd", 5: "cab"})
    return tmp_path


@pytest.fixture
def index(path: Path) -> Iterator[FeatureIndex]:
    with closing(FeatureIndex.open(path)) as found:
        yield found


def say(path: Path, labels: dict[int, str], kind: str = "tokens") -> None:
    with LabelStore.open(path, SHA, write=True) as store:
        store.add_labels(NewLabel(latent, kind, text, "ann") for latent, text in labels.items())


def read(index: FeatureIndex, path: Path, model: Letters) -> Meanings:
    found = Meanings(index, path, model)
    found.read()
    return found


def test_cosines_are_those_of_the_labels_that_lists_show(index: FeatureIndex, path: Path) -> None:
    say(path, {1: "cc"}, "explanation")
    model = Letters()
    cosines = read(index, path, model).cosines("aa")
    expected = [model.query(text) @ model.query("aa") for text in ("aab", "cc", "aab", "dd", "cab")]
    np.testing.assert_allclose(cosines[[0, 1, 2, 3, 5]], expected, atol=1e-3)
    assert np.isnan(cosines[[4, 6, 7]]).all()
    assert sorted(model.asked) == ["aab", "cab", "cc", "dd"]


def test_only_what_is_new_is_embedded(index: FeatureIndex, path: Path) -> None:
    read(index, path, Letters()).close()
    again = Letters()
    meanings = read(index, path, again)
    assert again.asked == []
    assert (meanings.n_done, meanings.n_texts, meanings.is_current) == (4, 4, True)
    say(path, {4: "abcd"})
    assert not meanings.is_current
    meanings.read()
    assert again.asked == ["abcd"]
    assert meanings.cosines("abcd")[4] == pytest.approx(1, abs=1e-3)
    assert meanings.is_current


def test_rows_of_another_model_are_not_taken(index: FeatureIndex, path: Path) -> None:
    read(index, path, Letters("one"))
    other = Letters("two")
    read(index, path, other)
    assert len(other.asked) == 4
    assert read(index, path, one := Letters("one")).n_done == 4
    assert one.asked == []


def test_what_was_embedded_before_it_was_stopped_is_kept(
    index: FeatureIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meaning, "BATCH", 1)
    model = Letters()
    stopped = Meanings(index, path, model)
    whole = model.documents

    def and_stop(texts: Sequence[str]) -> np.ndarray:
        if len(model.asked) == 1:
            stopped.close()
        return whole(texts)

    model.documents = and_stop  # type: ignore[method-assign]
    stopped.read()
    assert len(model.asked) == 2
    assert stopped.revision is None
    read(index, path, rest := Letters())
    assert len(rest.asked) == 2


def test_an_index_without_labels_has_no_cosines(tmp_path: Path) -> None:
    write_index(tmp_path, {"d_sae": 1, "sae_sha256": SHA}, [LatentRow(0, 0.1, 1.0, 1.0, [], [], [], [], [])])
    with closing(FeatureIndex.open(tmp_path)) as index:
        meanings = Meanings(index, tmp_path, Letters())
        assert np.isnan(meanings.cosines("a")).all()
        meanings.read()
        assert np.isnan(meanings.cosines("a")).all()


@pytest.mark.parametrize(
    "change",
    ["SET row = x'00'", "SET row = 'text four'", "SET text_sha256 = 'x' || rowid", "SET row = x'ffffffffffffffff'"],
)
def test_a_row_that_cannot_be_one_is_made_again(index: FeatureIndex, path: Path, change: str) -> None:
    read(index, path, Letters()).close()
    with closing(sqlite3.connect(path / FILE_NAME)) as connection:
        connection.execute(f"UPDATE embeddings {change.replace('rowid', 'hex(text_sha256)')}")
        connection.commit()
    model = Letters()
    cosines = read(index, path, model).cosines("aab")
    assert len(model.asked) == 4
    assert cosines[0] == pytest.approx(1, abs=1e-3)
    read(index, path, healed := Letters())
    assert healed.asked == []


def test_another_file_in_its_place_is_one_line(index: FeatureIndex, path: Path) -> None:
    (path / FILE_NAME).write_bytes(b"something else" * 100)
    with pytest.raises(CorruptArtefactError, match="expected rows of texts, got another file"):
        read(index, path, Letters())


def test_where_nothing_can_be_kept_it_is_embedded_all_the_same(
    index: FeatureIndex, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    nowhere = tmp_path_factory.mktemp("folder") / "gone"
    meanings = read(index, nowhere, Letters())
    assert meanings.cosines("dd")[3] == pytest.approx(1, abs=1e-3)
    assert not nowhere.exists()

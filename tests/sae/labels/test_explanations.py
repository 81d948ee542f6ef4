"""The best explanations, kept up to date with labels and scores: the same as from reading all of them."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
from sqlalchemy import orm

from sae.index_db import FeatureIndex, LatentRow, write_index
from sae.labels.store import LabelStore, NewLabel
from sae.labels.tables import Score

SAE = "5ae"


@pytest.fixture
def index(tmp_path: Path) -> Iterator[FeatureIndex]:
    rows = [LatentRow(latent, 0.1, 1.0, 0.5, [1], [], [], [], []) for latent in range(6)]
    write_index(tmp_path / "index", {"sae_sha256": SAE, "d_sae": 6}, rows)
    index = FeatureIndex.open(tmp_path / "index")
    yield index
    index.close()


def score(method: str, value: float, judge: str = "judge", control: str = "explanation") -> Score:
    return Score(method, control, "balanced_accuracy", value, None, None, 20, 0, judge)


def plain(labels: list[tuple[int, NewLabel]], scores: list[tuple[int, Score]]) -> dict[int, float | None]:
    """From all that was ever written."""
    newest = {(new.latent, new.author): (number, new) for number, new in labels if new.kind == "explanation"}
    best: dict[int, float | None] = {}
    for number, new in newest.values():
        if not new.text:
            continue
        of = [each for label, each in scores if label == number and each.control == "explanation"]
        counting = {(each.method, each.judge): each.value for each in of if each.method in ("detection", "fuzzing")}
        mean = sum(counting.values()) / len(counting) if counting else None
        known = best.get(new.latent)
        best[new.latent] = mean if known is None else known if mean is None else max(known, mean)
    return best


def test_it_is_the_same_as_from_all_labels_and_scores(index: FeatureIndex, tmp_path: Path) -> None:
    rng = random.Random(0)
    labels: list[tuple[int, NewLabel]] = []
    scores: list[tuple[int, Score]] = []
    assert index.explained() == {}
    with LabelStore.open(tmp_path / "index", SAE, write=True) as store:
        for i in range(150):
            if not labels or rng.random() < 0.4:
                kind, text = rng.choice(["explanation"] * 3 + ["tokens"]), rng.choice([f"text {i}"] * 4 + [""])
                new = NewLabel(rng.randrange(6), kind, text, rng.choice(["ann", "bob", "model"]))
                labels.append((store.add_label(new), new))
            else:
                number, new = rng.choice(labels)
                method, control = (
                    rng.choice(["detection", "fuzzing", "intruder"]),
                    rng.choice(["explanation", "tokens"]),
                )
                each = score(method, rng.random(), rng.choice(["one", "other"]), control)
                store.add_scores(number, new.latent, [each])
                scores.append((number, each))
            if rng.random() < 0.5:
                assert index.explained() == pytest.approx(plain(labels, scores))
    assert index.explained() == pytest.approx(plain(labels, scores))


def test_only_what_is_new_is_read(index: FeatureIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LabelStore.open(tmp_path / "index", SAE, write=True) as store:
        for latent in range(5):
            store.add_scores(
                store.add_label(NewLabel(latent, "explanation", "x", "m")), latent, [score("fuzzing", 0.6)]
            )
        index.explained()
        store.add_scores(store.add_label(NewLabel(5, "explanation", "y", "m")), 5, [score("fuzzing", 0.7)])
    read: list[int] = []
    with orm.Session(index._engine) as session:
        execute = session.execute

        def counted(statement: Any) -> list[Any]:
            rows = list(execute(statement))
            read.extend(row[0] for row in rows)
            return rows

        monkeypatch.setattr(session, "execute", counted)
        assert index._explanations.best(session)[5] == 0.7
    assert read == [6, 6], "the new label, and the score of it"


def test_what_was_read_is_forgotten_where_numbers_went_back(index: FeatureIndex, tmp_path: Path) -> None:
    with LabelStore.open(tmp_path / "index", SAE, write=True) as store:
        for latent in (1, 2):
            store.add_label(NewLabel(latent, "explanation", "x", "m"))
    assert set(index.explained()) == {1, 2}
    with sql.create_engine(f"sqlite:///{tmp_path / 'index' / 'index.sqlite'}").begin() as connection:
        connection.execute(sql.text("DELETE FROM labels WHERE id = 2"))
    assert set(index.explained()) == {1}

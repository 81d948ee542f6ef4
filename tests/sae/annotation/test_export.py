"""What is exported is what people said, readable by others and harmless in a spreadsheet."""

import csv
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError
from sae.annotation.export import export_labels, export_neuronpedia, final_labels, prefixed, unprefixed
from sae.annotation.store import AnnotationStore
from tests.sae.annotation.conftest import SAE, doing

NEURONPEDIA = {
    "id", "modelId", "layer", "index", "description", "authorId", "embedding", "triggeredById", "typeName",
    "explanationModelName", "notes", "createdAt",
}  # fmt: skip


@pytest.fixture
def filled(own: AnnotationStore) -> AnnotationStore:
    do = doing(own)
    do(1, "ann", "accept", "rivers")
    do(1, "bob", "accept", "Rivers.")
    do(2, "ann", "accept", "=HYPERLINK(1)")
    do(2, "bob", "reject")
    do(3, "ann", "flag", note="odd")
    do(4, "ann", "skip")
    event = do(5, "ann", "accept", "x")
    do(5, "ann", "undo", undoes=event.id)
    do(6, "ann", "accept", "a")
    do(6, "bob", "accept", "b")
    do(6, "eve", "adjudicate", "=c")
    do(7, "eve", "adjudicate", "")
    return own


def test_a_final_label_is_what_is_agreed_or_decided(filled: AnnotationStore) -> None:
    found = {label.latent: label for label in final_labels(filled.events())}
    assert {latent: (label.status, label.text, label.authors) for latent, label in found.items()} == {
        1: ("accepted", "Rivers.", ["ann", "bob"]),
        2: ("disputed", "", ["ann", "bob"]),
        3: ("flagged", "", ["ann"]),
        4: ("skipped", "", []),
        5: ("pending", "", []),
        6: ("adjudicated", "=c", ["ann", "bob", "eve"]),
        7: ("adjudicated", "", ["eve"]),
    }
    assert (found[1].verdict_agreement, found[1].text_agreement) == (1.0, 1.0)
    assert (found[2].verdict_agreement, found[2].text_agreement) == (0.0, None)
    assert (found[6].verdict_agreement, found[6].text_agreement) == (1.0, 0.0)
    assert found[3].verdict_agreement is None
    assert [event["action"] for event in found[5].history] == ["accept", "undo"]
    assert found[6].decided == found[6].history[-1]["created"]


def test_tables_hold_the_same_in_every_format(filled: AnnotationStore, tmp_path: Path) -> None:
    from pyarrow import parquet

    for name in ("l.csv", "l.jsonl", "l.parquet"):
        assert export_labels(filled, tmp_path / name) == {"out": str(tmp_path / name), "rows": 7}
    lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert parquet.read_table(tmp_path / "l.parquet").to_pylist() == lines
    assert lines[1]["texts"] == [{"author": "ann", "text": "=HYPERLINK(1)"}]
    assert {line["sae_sha256"] for line in lines} == {SAE}
    with (tmp_path / "l.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [unprefixed(row["text"]) for row in rows] == [line["text"] for line in lines]
    assert rows[5]["text"] == "'=c"
    assert [json.loads(row["history"]) for row in rows] == [line["history"] for line in lines]
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())


def test_a_session_is_exported_alone_and_an_empty_one_has_its_columns(own: AnnotationStore, tmp_path: Path) -> None:
    session = own.create_session("s", [1, 2]).id
    doing(own)(1, "ann", "accept", "x")
    for name in ("e.csv", "e.jsonl", "e.parquet"):
        assert export_labels(own, tmp_path / name, session=session)["rows"] == 0
    assert (tmp_path / "e.csv").read_text().startswith("latent,status,text,")
    doing(own)(2, "ann", "accept", "y", session=session)
    export_labels(own, tmp_path / "s.jsonl", session=session)
    assert json.loads((tmp_path / "s.jsonl").read_text())["latent"] == 2


@given(st.text(alphabet="=+-@'\t\n\r ＝a1,;\"", max_size=8))
def test_a_prefix_keeps_formulas_out_and_is_taken_away_again(text: str) -> None:
    assert unprefixed(prefixed(text)) == text
    assert not prefixed(text).lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝"))


def test_explanations_for_neuronpedia_have_its_fields(filled: AnnotationStore, tmp_path: Path) -> None:
    out = tmp_path / "explanations.jsonl"
    names = {"model_id": "gpt2-small", "source": "6-res-jb", "author_id": "u1"}
    assert export_neuronpedia(filled, out, **names)["rows"] == 2
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert set(first) == set(second) == NEURONPEDIA
    told = ("gpt2-small", "6-res-jb", "1", "Rivers.", "u1", "accepted by ann, bob")
    assert tuple(first[name] for name in ("modelId", "layer", "index", "description", "authorId", "notes")) == told
    assert second["description"] == "=c"
    assert first["id"] != second["id"]
    assert (len(first["id"]), first["id"][0]) == (25, "c")
    again = tmp_path / "again.jsonl"
    export_neuronpedia(filled, again, **names)
    assert again.read_text() == out.read_text()
    with pytest.raises(ConfigError, match=r"ends in \.jsonl"):
        export_neuronpedia(filled, tmp_path / "x.csv", **names)


def test_what_cannot_be_written_is_said_before(
    own: AnnotationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="ends in one of"):
        export_labels(own, tmp_path / "l.xlsx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install 'saekit"):
        export_labels(own, tmp_path / "l.parquet")

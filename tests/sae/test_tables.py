"""What is written in parts is read back by others' readers, whole or not at all."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from activations.errors import ConfigError, MissingArtefactError, StorageError
from sae.tables import write_table

PARTS = [
    {
        "latent": np.array([1, 2]),
        "share": np.array([0.5, np.nan]),
        "is_in": np.array([True, False]),
        "of": [np.array([1]), []],
    },
    {"latent": np.array([3]), "share": np.array([0.25]), "is_in": np.array([True]), "of": [[2, 3]]},
]
ROWS = [
    {"latent": 1, "share": 0.5, "is_in": True, "of": [1]},
    {"latent": 2, "share": None, "is_in": False, "of": []},
    {"latent": 3, "share": 0.25, "is_in": True, "of": [2, 3]},
]


def test_parquet_has_a_row_group_a_part(tmp_path: Path) -> None:
    types = {"latent": pyarrow.int32(), "share": pyarrow.float64(), "is_in": pyarrow.bool_(),
             "of": pyarrow.list_(pyarrow.int8())}  # fmt: skip
    assert write_table(tmp_path / "t.parquet", PARTS, lambda arrow: arrow.schema(types)) == 3
    file = parquet.ParquetFile(tmp_path / "t.parquet")
    assert file.num_row_groups == 2
    assert file.schema_arrow == pyarrow.schema(types)
    rows = file.read().to_pylist()
    assert np.isnan(rows[1].pop("share"))
    assert rows == [row if i != 1 else {k: v for k, v in row.items() if k != "share"} for i, row in enumerate(ROWS)]


def test_jsonl_and_csv_have_a_line_a_row(tmp_path: Path) -> None:
    assert write_table(tmp_path / "new" / "t.jsonl", PARTS) == 3
    assert [json.loads(line) for line in (tmp_path / "new" / "t.jsonl").read_text().splitlines()] == ROWS
    write_table(tmp_path / "t.csv", PARTS)
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["latent"] for row in rows] == ["1", "2", "3"]
    assert [row["share"] for row in rows] == ["0.5", "", "0.25"]
    assert [json.loads(row["of"]) for row in rows] == [[1], [], [2, 3]]
    assert rows[0]["is_in"] == "true"


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet", "t.csv"])
def test_a_table_that_fails_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    def parts() -> Iterator[dict[str, Any]]:
        yield PARTS[0]
        raise MissingArtefactError("index", expected="a row", got="none", fix="-")

    write_table(tmp_path / name, PARTS)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(MissingArtefactError):
        write_table(tmp_path / name, parts())
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_names_and_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\.parquet, \.jsonl, \.csv"):
        write_table(tmp_path / "t.xlsx", PARTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_table(tmp_path / "file" / "t.csv", PARTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"saekit\[parquet\]"):
        write_table(tmp_path / "t.parquet", PARTS)

"""An exported index holds what the database does, in row groups of a fixed size."""

import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from activations.errors import CorruptArtefactError, MissingArtefactError
from sae import index_export
from sae.contexts import Context
from sae.index_db import FILE_NAME, FeatureIndex, LatentRow, write_index
from sae.index_export import export_index

D_SAE, INFO = 7, {"d_sae": 7, "hook_point": "resid_post.1", "sae_sha256": "beef"}
LISTS = {"top_logits": 2, "bottom_logits": 2, "neighbours": 2, "coactivations": 3}


def row(i: int) -> LatentRow:
    """A latent; of every third nothing but the least is known."""
    rng, known = np.random.default_rng(i), i % 3 > 0

    def context(j: int) -> Context:
        tokens = rng.integers(0, 99, 3 + j).astype(np.int32)
        return Context(j, 1, tokens, rng.random(3 + j).astype(np.float16), j % 2, 0.5 * j, math.nan if j else 0.25)

    kinds = {name: [context(j) for j in range(n * known)] for name, n in (("contexts", 3), ("sampled", 2))}
    figures = {"logit_entropy": 1.5, "output_score": 0.25, "confidence_change": -0.5, "stability": 0.5} if known else {}
    return LatentRow(
        latent=i, density=i / 8, max_activation=0.5 * i, mean_activation=0.25 * i, histogram=[i, 1],
        histogram_start=i, top_logits=[(f'"{i}\n\u0627', 0.5)], bottom_logits=[], neighbours=[(i + 1, 0.5)],
        coactivations=[(i + 2, 0.25, 8.0)] * known, **kinds, **figures,
    )  # fmt: skip


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(index_export, "ROWS", 3)
    write_index(tmp_path / "index", INFO, [row(i) for i in range(D_SAE)])
    return tmp_path / "index"


def expected(row: LatentRow) -> dict[str, Any]:
    """What an exported row says, with lists in place of structs."""
    values = vars(row) | {name: [list(each) for each in getattr(row, name)] for name in LISTS}
    for name in ("contexts", "sampled", "near_misses"):
        values[name] = [
            [
                c.document, c.peak, c.tokens.tolist(), c.activations.tolist(), c.source, c.score,
                None if math.isnan(c.effect) else c.effect,
            ]
            for c in getattr(row, name)
        ]  # fmt: skip
    return values


def unnamed(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [list(each.values()) if isinstance(each, dict) else each for each in value]
        if isinstance(value, list)
        else value
        for name, value in row.items()
    }


def test_a_parquet_is_read_back_by_pyarrow(index: Path, tmp_path: Path) -> None:
    out = tmp_path / "index.parquet"
    assert export_index(index, out) == {"index": str(index), "out": str(out), "rows": D_SAE}
    file = parquet.ParquetFile(out)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [3, 3, 1]
    stored = FeatureIndex.open(index)
    rows = [unnamed(each) for each in file.read().to_pylist()]
    assert rows == [expected(stored.latent(i)) for i in range(D_SAE)]
    assert rows[1]["contexts"][0][-1] == 0.25
    assert rows[0]["logit_entropy"] is None
    assert json.loads(file.schema_arrow.metadata[b"saekit"])["sae_sha256"] == "beef"
    structs = {name: file.schema_arrow.field(name).type.value_type for name in LISTS}
    assert {name: struct.num_fields for name, struct in structs.items()} == LISTS
    stored.close()


def test_jsonl_says_the_same(index: Path, tmp_path: Path) -> None:
    export_index(index, tmp_path / "index.jsonl")
    export_index(index, tmp_path / "index.parquet")
    lines = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert lines == parquet.read_table(tmp_path / "index.parquet").to_pylist()


@pytest.mark.parametrize("column", ["histogram", "neighbours", "top_logits"])
def test_a_damaged_row_is_refused(index: Path, tmp_path: Path, column: str) -> None:
    with closing(sqlite3.connect(index / FILE_NAME)) as database, database:
        database.execute(f'UPDATE latents SET {column} = \'[["x", "y"]]\' WHERE latent = 4')
    with pytest.raises(CorruptArtefactError, match="a damaged row"):
        export_index(index, tmp_path / "index.parquet")
    assert not (tmp_path / "index.parquet").exists()


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match="feature index"):
        export_index(tmp_path, tmp_path / "index.parquet")
    assert list(tmp_path.iterdir()) == []

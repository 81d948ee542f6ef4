"""A feature index as one table for other programs: a row a latent, in parts, so that memory does not grow with d_sae.

Left out: labels, and the state that more text is added to.
"""

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from activations.errors import CorruptArtefactError, SaekitError
from activations.progress import progress
from sae.contexts import Context
from sae.index_db import BLOBS, FeatureIndex, LatentRow
from sae.tables import Part, write_table

ROWS = 256
"""latents a part, and so a row group of a Parquet file"""
_LISTS = {
    "top_logits": ("token", "change"),
    "bottom_logits": ("token", "change"),
    "neighbours": ("latent", "cosine"),
    "coactivations": ("latent", "jaccard", "lift"),
}
"""column -> names of what a thing in its list has"""


def export_index(path: str | Path, out: Path) -> dict[str, Any]:
    """Write the index in directory `path` to `out`, a .parquet, .jsonl or .csv; docs/formats.md lists the columns.

    Returns: path and rows, JSON-ready.
    Raises: MissingArtefactError, CorruptArtefactError, ConfigError for another name or where pyarrow is not installed.
    """
    index = FeatureIndex.open(path)
    info = {"saekit": json.dumps(index.info)}

    def parts() -> Iterator[Part]:
        latents = index.each()
        with progress("export", index.info["d_sae"], "latents") as advance:
            while rows := list(islice(latents, ROWS)):
                yield _part(rows)
                advance(len(rows))

    try:
        return {"index": str(path), "out": str(out), "rows": write_table(out, parts(), lambda a: _schema(a, info))}
    except SaekitError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        fix = "Build it again with: saekit index"
        raise CorruptArtefactError(path, expected="a feature index", got="a damaged row", fix=fix) from error
    finally:
        index.close()


def _part(rows: list[LatentRow]) -> Part:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in vars(rows[0])}
    for name, keys in _LISTS.items():
        columns[name] = [[dict(zip(keys, each, strict=True)) for each in value] for value in columns[name]]
    for name in BLOBS:
        columns[name] = [[_context(context) for context in value] for value in columns[name]]
    return columns


def _context(context: Context) -> dict[str, Any]:
    figures = {name: None if math.isnan(value := getattr(context, name)) else value for name in ("score", "effect")}
    return context._asdict() | figures


def _schema(arrow: Any, info: dict[str, str]) -> Any:
    def structs(**fields: Any) -> Any:
        return arrow.list_(arrow.struct(fields))

    number, real = arrow.int32(), arrow.float32()
    context = structs(
        document=number, peak=number, tokens=arrow.list_(number), activations=arrow.list_(real), source=number,
        score=real, effect=real,
    )  # fmt: skip
    logits = structs(token=arrow.string(), change=real)
    types = {
        "latent": number,
        "density": arrow.float64(),
        "max_activation": real,
        "mean_activation": real,
        "histogram_start": number,
        "histogram": arrow.list_(arrow.int64()),
        "top_logits": logits,
        "bottom_logits": logits,
        "logit_entropy": real,
        "neighbours": structs(latent=number, cosine=real),
        "coactivations": structs(latent=number, jaccard=real, lift=real),
        "output_score": real,
        "confidence_change": real,
        "stability": real,
        **dict.fromkeys(BLOBS, context),
    }
    return arrow.schema(types, metadata=info)

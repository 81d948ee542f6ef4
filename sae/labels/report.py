"""Scores of many latents as one table, beside what keeps them honest.

A row is the mean over latents, with a bootstrap 95% interval over them. Beside the explanation of each latent stand
another latent's explanation (shuffled), the latent's tokens as a label (tokens), what one answer for all or guessing
gets (chance), and what the explanation is better by than either, latent by latent. Left out: computing scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sae.labels.embedding import MEMBERS
from sae.labels.tables import Score
from sae.labels.words import one_line
from sae.metrics import means

CHANCE = {
    "detection": ("always no", 0.5),
    "fuzzing": ("always no", 0.5),
    "intervention": ("always B", 0.5),
    "embedding": ("guessing", 0.5),
    "intruder": ("guessing", 1 / (MEMBERS + 1)),
}
"""method -> what needs no label, and what it gets"""
SHOWN_LABELS, SHOWN_LETTERS = 12, 90


def summarise(scores: Mapping[int, Sequence[Score]], methods: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Rows of the table by name.

    Args:
      scores: those of each latent.
      methods: in the order of the rows.
    Returns: value, low, high, measure, latents, texts and failed_parses of each row; None where there is nothing.
    """
    rows: dict[str, dict[str, Any]] = {}
    for method in methods:
        found: dict[str, dict[int, Score]] = {}
        for latent, each in scores.items():
            for one in each:
                if one.method == method:
                    found.setdefault(one.control, {})[latent] = one
        for control, by_latent in sorted(found.items(), key=lambda pair: pair[0] not in ("explanation", "contexts")):
            name = method if control in ("explanation", "contexts") else f"{method}, {control}"
            rows[name] = _row([one.value for one in by_latent.values()], list(by_latent.values()), seed)
        if found:
            name, value = CHANCE[method]
            rows[f"{method}, {name}"] = {**_row([], [], seed), "value": value}
        for control in ("shuffled", "tokens"):
            both = sorted(found.get("explanation", {}).keys() & found.get(control, {}).keys())
            if both:
                gains = [found["explanation"][latent].value - found[control][latent].value for latent in both]
                rows[f"{method}, gain over {control}"] = _row(gains, [], seed)
    return rows


def _row(values: list[float], scores: list[Score], seed: int) -> dict[str, Any]:
    mean = means({"value": np.array(values)}, seed) if values else {}
    low, high = mean.get("value_ci95", (None, None))
    return {
        "value": mean.get("value"),
        "low": low,
        "high": high,
        "measure": scores[0].measure if scores else None,
        "latents": len(values) or None,
        "texts": sum(score.n for score in scores) or None,
        "failed_parses": sum(score.n_failed for score in scores) if scores else None,
    }


def tables(result: Mapping[str, Any]) -> dict[str, Any]:
    """A run's result for the terminal: the same figures as text, and the first of the labels."""
    shown = {key: value for key, value in result.items() if key not in ("scores", "labels")}
    rows = {
        name: {key: _cell(value) for key, value in row.items()} | {"95%": _interval(row)}
        for name, row in result["scores"].items()
    }
    columns = ("value", "95%", "measure", "latents", "texts", "failed_parses")
    scores = {name: {column: row[column] for column in columns} for name, row in rows.items()}
    labels = {
        str(each["latent"]): {name: one_line(each[name] or "–", SHOWN_LETTERS) for name in ("explanation", "tokens")}
        for each in result["labels"][:SHOWN_LABELS]
    }
    return {**shown, **({"scores": scores} if scores else {}), **({"latent": labels} if len(labels) > 1 else {})}


def _interval(row: Mapping[str, Any]) -> str:
    return "–" if row["low"] is None else f"[{row['low']:.3f}, {row['high']:.3f}]"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

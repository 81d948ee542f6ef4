"""One HTML file that shows a run: curves, densities, features in context, steering before and after.

Flow: 1. read the run's artefacts; 2. draw charts as inline SVG; 3. fill the template, which escapes every text.
The file opens offline and loads nothing. Left out: interaction (the browser's job).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae.charts import BLUE, ORANGE, figure, svg, template
from sae.contexts import Context
from sae.histogram import edges
from sae.index_db import FeatureIndex, LatentRow
from steer.vectors import SteeringVector


class Token(NamedTuple):
    """A token as it is shown."""

    text: str
    """with visible whitespace"""
    shade: float
    """activation over the latent's maximum, 0 to 1"""
    is_peak: bool


class Feature(NamedTuple):
    """A latent as it is shown."""

    row: LatentRow
    contexts: list[list[Token]]
    histogram: str
    """inline SVG"""


def write_report(
    path: Path,
    *,
    summary: dict[str, Any],
    log: Path,
    index: FeatureIndex,
    tokenizer: Any,
    features: Sequence[int],
    vectors: Sequence[SteeringVector],
) -> Path:
    """Write the report of a run to `path`.

    Args:
      summary: what summary.json holds.
      log: train.jsonl of the training run.
      features: latents to show, best first.
      vectors: vectors whose newest receipts to show.
    """
    rows = index.rows()
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    page = template("steer", "report.html").render(
        summary=summary,
        curves=_curves(steps),
        density=_density(np.array([row.density for row in rows])),
        features=[show_feature(index.latent(latent), tokenizer) for latent in features],
        vectors=[(vector, vector.receipts[-1], _sweep(vector.receipts[-1])) for vector in vectors],
    )
    path.write_text(page)
    return path


def show_feature(row: LatentRow, tokenizer: Any, n_contexts: int = 6) -> Feature:
    """A latent with its contexts as shaded tokens."""
    contexts = [show_context(context, row.max_activation, tokenizer) for context in row.contexts[:n_contexts]]
    return Feature(row, contexts, _histogram(row))


def show_context(context: Context, max_activation: float, tokenizer: Any) -> list[Token]:
    """The tokens of a context with shades."""
    texts = [tokenizer.decode([token]).replace("\n", "↵") for token in context.tokens.tolist()]
    shades = np.clip(context.activations / max(max_activation, 1e-9), 0, 1).tolist()
    return [Token(t, round(s, 3), i == context.peak) for i, (t, s) in enumerate(zip(texts, shades, strict=True))]


def _curves(steps: Sequence[dict[str, Any]]) -> str:
    drawn, axes = figure(1, 3, (11.0, 2.6))
    titles = {"loss": "training loss", "holdout_fvu": "FVU, held out", "holdout_l0": "L0, held out"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        points = [(step["tokens"] / 1e3, step[key]) for step in steps if step.get(key) is not None]
        axis.plot(*zip(*points, strict=True), color=BLUE, marker="." if len(points) < 40 else None)
        axis.set(title=title, xlabel="thousand tokens")
    if all(step.get("loss") is None or step["loss"] > 0 for step in steps):
        axes[0].set_yscale("log")
    return svg(drawn)


def _density(density: np.ndarray) -> str:
    drawn, (axis,) = figure(1, 1, (5.4, 2.6))
    live = density[density > 0]
    axis.hist(np.log10(live), bins=40, color=BLUE)
    dead = len(density) - len(live)
    axis.set(title=f"density of latents ({dead} of {len(density)} never active)", xlabel="log10 share of tokens")
    return svg(drawn)


def _histogram(row: LatentRow) -> str:
    drawn, (axis,) = figure(1, 1, (2.4, 1.0))
    axis.stairs(row.histogram, edges(row.histogram_start, len(row.histogram)), fill=True, color=BLUE)
    axis.set_xscale("log")
    axis.set_yscale("symlog")
    axis.set_yticks([])
    return svg(drawn)


def _sweep(receipt: dict[str, Any]) -> str:
    trials = receipt["sweep"]
    if not trials:
        return ""
    drawn, axes = figure(1, 2, (7.2, 2.3))
    doses = [trial["dose"] for trial in trials]
    for axis, key, title in ((axes[0], "rate", "concept rate"), (axes[1], "nll", "cost of the text, nats a token")):
        axis.plot(doses, [trial[key] for trial in trials], color=BLUE, marker="o")
        axis.axvline(receipt["dose"], color=ORANGE, linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="dose (dashed: chosen)")
    return svg(drawn)

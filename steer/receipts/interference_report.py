"""One HTML file of what `steer.receipts.interference` measured: the curves, who is like whom, every axis, and texts.

The file opens offline and loads nothing. Left out: measuring.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae.charts import BLUE, GREY, INK, ORANGE, figure, svg, template

GREEN = "#3a9d6e"
LOOKS = {
    "as_is": ("as they are", BLUE, "o", "-"),
    "orthogonalised": ("orthogonalised", GREEN, "s", "-"),
    "within_budget": ("within budget", ORANGE, "^", "-"),
    "random_company": ("random company", GREY, ".", "--"),
}
"""arm -> what a chart calls it, and how it is drawn"""
PANELS = {
    "retention": ("share of the effect alone that is kept", 1),
    "kl": ("KL from unsteered, nats a token", -1),
    "nll_rise": ("rise in the text's cost, nats a token", -1),
    "crosstalk": ("effect on axes not stacked, share of theirs", 0),
}
"""key of a curve -> its title, and on which side of its bound it should be: 1 above, -1 below, 0 it has none"""


def write_report(path: Path, result: Mapping[str, Any]) -> Path:
    """Write the page of a result to `path`."""
    names = {arm: LOOKS[arm][0] for arm in result["arms"]}
    page = template("steer", "interference.html").render(
        result=result,
        names=names,
        curves=_curves(result),
        axes={names[arm]: _axes(arm, found["axes"]) for arm, found in result["arms"].items()},
        cosines={point: _cosines(found) for point, found in result["composition"]["points"].items()},
    )
    path.write_text(page)
    return path


def _curves(result: Mapping[str, Any]) -> str:
    drawn, axes = figure(2, 2, (9.6, 6.0))
    bounds = {"retention": result["bounds"]["retention"], **result["bounds"]}
    for axis, (key, (title, side)) in zip(axes, PANELS.items(), strict=True):
        for arm, found in result["arms"].items():
            label, colour, marker, line = LOOKS[arm]
            rows = [(int(k), row) for k, row in found["curve"].items() if row[key] is not None]
            ks, values = [k for k, _ in rows], [row[key] for _, row in rows]
            axis.plot(ks, values, line, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
            band = [(row["retention_low"], row["retention_high"]) for _, row in rows if key == "retention"]
            if band and arm != "random_company" and all(None not in pair for pair in band):
                axis.fill_between(ks, *zip(*band, strict=True), color=colour, alpha=0.1, linewidth=0)
        if side:
            axis.axhline(bounds[key], color=INK, linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="axes stacked" + (" (dotted: bound)" if side else ""))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(*_limits(axis, result, key))
    axes[0].legend(fontsize=8, frameon=False)
    return svg(drawn)


def _limits(axis: Any, result: Mapping[str, Any], key: str) -> tuple[float, float]:
    """Room for the curves and 0, and for the bound unless it is far away; not for all of a wide interval."""
    rows = [row[key] for found in result["arms"].values() for row in found["curve"].values() if row[key] is not None]
    low, high = min(0.0, *rows), max(rows)
    bound = result["bounds"].get(key)
    if bound is not None and bound < 2 * high:
        high = max(high, bound)
    room = 0.08 * max(high - low, 1e-3)
    return low - (room if low < 0 else 0), high + room


def _axes(arm: str, by_axis: Mapping[str, Mapping[str, float]]) -> str:
    drawn, (axis,) = figure(1, 1, (4.6, 2.8))
    label, *_ = LOOKS[arm]
    shades = np.linspace(0.45, 1.0, max(len(by_axis), 1))
    for shade, (name, by_k) in zip(shades, by_axis.items(), strict=True):
        ks = [int(k) for k in by_k]
        axis.plot(ks, list(by_k.values()), color=LOOKS[arm][1], alpha=float(shade), marker=".", linewidth=1)
        axis.annotate(
            name, (ks[-1], by_k[str(ks[-1])]), xytext=(4, 0), textcoords="offset points", fontsize=7, va="center"
        )
    axis.axhline(1, color=INK, linestyle=":", linewidth=0.8)
    axis.set(title=f"{label}: retention of each axis", xlabel="axes stacked")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return svg(drawn)


def _cosines(point: Mapping[str, Sequence[Any]]) -> str:
    names, values = point["names"], np.array(point["cosines"])
    drawn, (axis,) = figure(1, 1, (1.6 + 0.62 * len(names), 1.2 + 0.42 * len(names)))
    axis.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 else INK
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return svg(drawn)

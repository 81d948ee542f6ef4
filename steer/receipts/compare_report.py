"""One HTML file that shows a comparison: a table and a chart an axis, and what was written.

The file opens offline and loads nothing, and the template escapes every text. Left out: measuring
(`steer.receipts.compare`).
"""

from pathlib import Path
from typing import Any

from sae.charts import BLUE, GREY, ORANGE, figure, svg, template


def write_report(path: Path, results: dict[str, Any]) -> Path:
    """Write the report of some axes, as `steer.receipts.compare` measured them."""
    charts = {name: chart(result) for name, result in results.items()}
    path.write_text(template("steer", "compare.html").render(results=results, charts=charts))
    return path


def chart(result: dict[str, Any]) -> str:
    """Effect with its interval, and effect over KL."""
    rows = {name: row for name, row in result["conditions"].items() if name != "unsteered"}
    drawn, axes = figure(1, 2, (9.0, 2.4))
    colours = [BLUE if name == "vector" else GREY if name == "random" else ORANGE for name in rows]
    for i, (row, colour) in enumerate(zip(rows.values(), colours, strict=True)):
        low, high = row["effect_ci95"] or (row["effect"], row["effect"])
        axes[0].plot([low, high], [i, i], color=colour, linewidth=3, alpha=0.5)
        axes[0].plot(row["effect"], i, "o", color=colour)
        axes[1].plot(row["kl"], row["effect"], "o", color=colour)
    for name, row in rows.items():
        axes[1].annotate(name, (row["kl"], row["effect"]), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    axes[0].axvline(0, color=GREY, linewidth=1)
    better = "up" if result["wanted"] > 0 else "down"
    axes[0].set(title=f"effect on {result['measure']} ({better} is wanted)", xlabel="with 95% intervals")
    axes[1].set(title="effect over KL on unrelated text", xlabel="nats a token")
    return svg(drawn)

"""evaluation.json as tables, for the terminal and for one HTML page with charts.

Flow: 1. each family of measures becomes one or more tables, a row for the SAE and for each thing it has to beat;
2. histograms become inline SVG; 3. the template, which escapes every text, is filled. The page opens offline and loads
nothing. Left out: computing anything.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae.charts import BLUE, GREY, ORANGE, figure, svg, template

Row = Mapping[str, Any]
INTERVAL = "_ci95"
_SCORES = (
    "fvu", "explained_variance_token", "l0", "dead_fraction", "dense_fraction", "cosine", "shrinkage",
    "ce_loss_recovered", "ce_loss_recovered_zero", "kl_recovered", "directed_error_share",
)  # fmt: skip
_RECONSTRUCTION = ("fvu", "explained_variance_token", "l0", "dead_fraction", "dense_fraction", "cosine", "shrinkage")
_NOTES = {
    "scores": "Intervals are 95% bootstraps over documents. FVU is the share of the variance around the dataset mean "
    "that is left unexplained. CE loss recovered is 1 for a model that loses nothing and 0 for one that gets the mean "
    "(or zeros) in place of what the SAE writes. The directed error share is the part of the added loss that an error "
    "of the same length in a random direction would not cause.",
    "reconstruction": "The random SAE is as wide and as sparse, with random directions; PCA has as many components as "
    "the SAE has active latents.",
    "inside the model": "Nats a token, with the residual stream replaced at every token but masked ones. The random "
    "error is as long as the SAE's at each token.",
    "quantiles": "Over held-out tokens, and over the dimensions of what is written.",
    "probing": "A logistic regression reads k features of a text's mean, those whose class means differ most in "
    "training; one class against as many texts of the others, mean over classes. The dense probe reads all.",
    "concepts": "The largest activation in a text says whether the concept is there. Mean over concepts, with "
    "intervals over them. Features are chosen on other texts.",
    "absorption": "First letters of words. Full absorption: the latents for a letter are silent, and one other latent "
    "carries most of the letter's direction. Words that the dense probe gets right.",
    "stability": "Decoder rows against those of another SAE. Shared: mutual nearest, decoder and encoder cosine above "
    "0.7. Random directions show what that many rows reach by chance.",
}


class TableOf(NamedTuple):
    """A table with text in its cells."""

    title: str
    note: str
    rows: dict[str, dict[str, str]]
    """row -> column -> what stands there"""


def tables(result: Mapping[str, Any]) -> list[TableOf]:
    """The tables of an evaluation."""
    found = [
        TableOf("scores", _NOTES["scores"], {name: _alone(result, name) for name in _SCORES}),
        TableOf(
            "reconstruction",
            _NOTES["reconstruction"],
            {name: _cells(row, _RECONSTRUCTION) for name, row in {"sae": result, **result["baselines"]}.items()},
        ),
        TableOf("inside the model", _NOTES["inside the model"], dict(_spliced(result))),
        TableOf(
            "quantiles",
            _NOTES["quantiles"],
            {name: {q: number(value) for q, value in row.items()} for name, row in result["quantiles"].items()},
        ),
    ]
    for family in ("probing", "concepts", "absorption", "stability"):
        for name, block in _blocks(result.get(family) or {}):
            rows = {row: _cells(values, _measures(values)) for row, values in block["rows"].items()}
            found.append(TableOf(f"{family}{name and ': '}{name}", _NOTES[family], rows))
    return found


def write_report(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page of an evaluation to `path`."""
    page = template("sae", "evaluation.html").render(
        about=result["about"],
        n_tokens=f"{result['n_tokens']:,}",
        ce_tokens=f"{result['ce_tokens']:,}",
        tables=tables(result),
        histograms=_histograms(result["histograms"]),
        probing=[(name, _probing(block["rows"])) for name, block in _blocks(result.get("probing") or {})],
        concepts=[_bars(block["rows"], "auroc") for _, block in _blocks(result.get("concepts") or {})],
    )
    path.write_text(page)


def number(value: Any) -> str:
    """A number as people read it; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _blocks(family: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts of a family that have rows, by name; a family that is such a part itself has no name."""
    if "rows" in family:
        yield "", family
    else:
        yield from family.items()


def _measures(row: Row) -> tuple[str, ...]:
    return tuple(name for name in row if not name.endswith(INTERVAL))


def _cells(row: Row, measures: tuple[str, ...]) -> dict[str, str]:
    return {name: " ".join(filter(None, _alone(row, name).values())) for name in measures}


def _alone(row: Row, name: str) -> dict[str, str]:
    both = row.get(f"{name}{INTERVAL}")
    return {"value": number(row.get(name)), "95%": f"[{number(both[0])}, {number(both[1])}]" if both else ""}


def _spliced(result: Row) -> Iterator[tuple[str, dict[str, str]]]:
    """Cross-entropy and KL of each variant, first of which is the untouched model."""
    for name in ("clean", *(key[3:] for key in result if key.startswith("kl_") and f"ce_{key[3:]}" in result)):
        if not name.endswith(INTERVAL):
            measures = [f"{measure}_{name}" for measure in ("ce", "kl")]
            yield name, dict(zip(("ce", "kl"), _cells(result, tuple(measures)).values(), strict=True))


def _histograms(histograms: Mapping[str, Any]) -> Any:
    drawn, (density, activation, explained, cosine) = figure(2, 2, (10.0, 5.2))
    counts = histograms["density"]["counts"]
    density.stairs(counts[1:], histograms["density"]["log10_edges"], fill=True, color=BLUE)
    density.set(title=f"density of latents ({counts[0]:,} never active)", xlabel="log10 share of tokens")
    counts, edges = (np.array(histograms["activation"][key]) for key in ("counts", "log10_edges"))
    used = np.flatnonzero(counts)
    first, last = (used[0], used[-1] + 1) if len(used) else (0, len(counts))
    activation.stairs(counts[first:last], edges[first : last + 1], fill=True, color=BLUE)
    activation.set(title="activations of active latents", xlabel="log10 activation")
    tokens = histograms["explained_variance_token"]
    explained.stairs(tokens["counts"], tokens["edges"], fill=True, color=BLUE)
    explained.set(title="explained variance of tokens", xlabel="1 - squared error / squared distance from the mean")
    rows = histograms["decoder_cosine"]
    cosine.stairs(rows["counts"], rows["edges"], fill=True, color=BLUE, label="SAE")
    cosine.stairs(rows["random_counts"], rows["edges"], color=ORANGE, label="random directions")
    cosine.set(title="nearest other decoder row", xlabel="cosine")
    cosine.legend(fontsize=8, frameon=False)
    return svg(drawn)


def _probing(rows: Mapping[str, Row]) -> Any:
    """Accuracy against k, and what does not depend on k as level lines."""
    drawn, (axis,) = figure(1, 1, (6.4, 3.2))
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, row in rows.items():
        features, _, k = name.partition(" k=")
        if k:
            lines.setdefault(features, []).append((int(k), row["accuracy"]))
        else:
            axis.axhline(row["accuracy"], color=GREY, linestyle="--" if name == "dense" else ":", label=name)
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, linewidth=2 if name == "sae" else 1)
    axis.set_xscale("log")
    axis.set(title="accuracy of k-sparse probes on held-out texts", xlabel="k")
    axis.legend(fontsize=7, frameon=False, ncols=2)
    return svg(drawn)


def _bars(rows: Mapping[str, Row], measure: str) -> Any:
    drawn, (axis,) = figure(1, 1, (6.4, 0.6 + 0.3 * len(rows)))
    values = np.array([row[measure] for row in rows.values()])
    both = np.array([row.get(f"{measure}{INTERVAL}") or [row[measure]] * 2 for row in rows.values()])
    colors = [BLUE if name == "sae" else GREY for name in rows]
    axis.barh(list(rows), values, color=colors, xerr=np.abs(both.T - values), error_kw={"linewidth": 1})
    axis.invert_yaxis()
    axis.set(title=f"{measure.upper()}, 95% intervals", xlim=(0, 1))
    return svg(drawn)

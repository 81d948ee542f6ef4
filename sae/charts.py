"""Small charts as inline SVG, and pages from templates, for reports that open offline and load nothing.

Left out: what is drawn, which is in `sae.evaluation.report` and `steer.report`.
"""

import io
from importlib import resources
from typing import Any

from jinja2 import Environment

INK, BLUE, ORANGE, GREY = "#1f2933", "#2f6fde", "#e07b39", "#9aa5b1"


def template(package: str, name: str) -> Any:
    """A template of a package's folder `templates`; it escapes every text."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((resources.files(package) / "templates" / name).read_text())


def figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    """A matplotlib figure of so many inches, and its axes in one row."""
    # The object interface keeps matplotlib's global state, and with it any window system, out of the process.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(drawn)
    axes = drawn.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
        axis.title.set_fontsize(9)
        axis.xaxis.label.set_fontsize(8)
    return drawn, axes


def svg(drawn: Any) -> Any:
    """A figure as markup."""
    from markupsafe import Markup

    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])

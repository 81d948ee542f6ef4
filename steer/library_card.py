"""The README of a library, and its plot, made of what the library holds and of nothing else.

Text and SVG are written by hand so that the same library gives the same bytes on every machine. Left out: files
(`steer.library`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from steer.gates import gates_of

if TYPE_CHECKING:
    from steer.library import Library
    from steer.pack import Feature, Kit
    from steer.vectors import SteeringVector

PLOT = "plots/effects.svg"
FIGURES: dict[str, tuple[str, ...]] = {
    "effect": ("effect",),
    "random control": ("random_control_effect",),
    "KL": ("kl",),
    "capability": ("capability", "steered", "accuracy_change"),
    "refusal of harmful": ("refusal", "steered", "harmful_change"),
    "refusal of harmless": ("refusal", "steered", "harmless_change"),
}
"""column of the card -> where it is in a receipt"""
NOTES = (
    "Effect: rise in the share of generated tokens on which the concept shows. Window: coefficients at which the "
    "vector was found to work and to do no harm. Capability and refusal: change in the share of questions answered "
    "rightly, and of prompts refused. All are of the newest receipt that has them, at this coefficient."
)
LEGEND = (
    "Blue: effect with its 95% interval. Grey: random directions of that length. Orange: asked for in words instead."
)
_WIDTH, _ROW, _LEFT, _TOP = 760, 22, 250, 34
_BLUE, _GREY, _ORANGE = "#2563eb", "#94a3b8", "#d97706"


class Shown(NamedTuple):
    """A vector's line in the plot."""

    name: str
    effect: float
    low: float
    high: float
    random: float | None
    asked: float | None


def card(library: Library) -> str:
    """The README."""
    about = library.about
    title = about.name or "Steering vectors"
    lines = [f"# {title} {about.version}" if about.version else f"# {title}", ""]
    lines += [_plain(about.summary), ""] if about.summary else []
    facts = [f"Licence: {about.licence}."] if about.licence else []
    facts += [f"By {', '.join(map(_plain, about.authors))}."] if about.authors else []
    models = sorted({f"{each.model.id} ({each.model.fingerprint[:12]})" for each in library.vectors.values()})
    facts += [f"For {', '.join(map(_plain, models))}."] if models else []
    lines += [" ".join(facts), ""] if facts else []
    lines += _vectors([*library.vectors.values()])
    if shown_of(library):
        lines += [f"![effects]({PLOT})", "", LEGEND, ""]
    lines += _kits(library.kits) + _features(library)
    return "\n".join(lines)


def plots(library: Library) -> dict[str, bytes]:
    """Name to content of the plots; none without a measured effect."""
    shown = shown_of(library)
    return {PLOT: _svg(shown).encode()} if shown else {}


def shown_of(library: Library) -> list[Shown]:
    """The vectors and kits whose newest receipt of an effect has an interval, the largest effect first."""
    named: dict[str, Sequence[Mapping[str, Any]]] = {name: vector.receipts for name, vector in library.vectors.items()}
    named |= {f"kit {kit.name}": kit.receipts for kit in library.kits}
    found = []
    for name, receipts in named.items():
        with_interval = [each for each in receipts if _is_interval(each.get("effect_ci95"))]
        if with_interval:
            newest = with_interval[-1]
            low, high = newest["effect_ci95"]
            asked, random = (newest.get(key) for key in ("prompt_baseline_effect", "random_control_effect"))
            found.append(Shown(name, newest["effect"], low, high, random, asked))
    return sorted(found, key=lambda each: (-each.effect, each.name))


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(end, float) for end in value)


def _vectors(vectors: Sequence[SteeringVector]) -> list[str]:
    if not vectors:
        return []
    columns = ["vector", "model", "hook point", "operation", "scope", "gate", "coefficient", "window", "dose", *FIGURES]
    lines = ["## Vectors", "", "Each is used at its hook point, on the tokens of its scope.", "", *_head(columns)]
    for vector in vectors:
        cells = [vector.name, vector.model.id, vector.hook_point, vector.operation, vector.scope]
        cells.append(", ".join(gate.name for gate in gates_of(vector.gate)) or "-")
        cells.append(f"{vector.coefficient:.3g}")
        cells.append("-" if vector.window is None else " to ".join(f"{end:.3g}" for end in vector.window))
        cells.append(f"{vector.dose(vector.coefficient):.2f}")
        lines.append(_row([*cells, *(_figure(vector, path) for path in FIGURES.values())]))
    return [*lines, "", NOTES, ""]


def _kits(kits: Sequence[Kit]) -> list[str]:
    if not kits:
        return []
    lines = [
        "## Kits",
        "",
        "Vectors that are used together.",
        "",
        *_head(["kit", "what for", "vectors", "effect", "KL"]),
    ]
    for kit in sorted(kits, key=lambda each: each.name):
        parts = ", ".join(name if factor == 1 else f"{name} x {factor:g}" for name, factor in kit.vectors.items())
        newest: Mapping[str, Any] = kit.receipts[-1] if kit.receipts else {}
        figures = [f"{value:+.3f}" if isinstance(value := newest.get(key), float) else "-" for key in ("effect", "kl")]
        lines.append(_row([kit.name, kit.summary, parts, *figures]))
    return [*lines, ""]


def _features(library: Library) -> list[str]:
    if not library.features:
        return []
    sae = library.sae
    lines = ["## Features", ""]
    if sae is not None:
        lines += [f"Latents of a {sae.architecture} SAE with {sae.d_sae} latents at {sae.hook_point}.", ""]
    lines += _head(["latent", "label", "by", "density", "strongest on", "vector"])
    for feature in sorted(library.features, key=lambda each: each.latent):
        lines.append(_row(_cells(feature)))
    return [*lines, ""]


def _cells(feature: Feature) -> list[str]:
    peaks = (each.tokens[max(range(len(each.tokens)), key=each.activations.__getitem__)] for each in feature.examples)
    strongest = " ".join(dict.fromkeys(f"`{token.strip()}`" for token in peaks if token.strip() and "`" not in token))
    share = f"{100 * feature.density:.2g}%"
    return [str(feature.latent), feature.label, feature.author, share, strongest, feature.vector or "-"]


def _figure(vector: SteeringVector, path: Sequence[str]) -> str:
    """A figure of the newest receipt that has it, at the vector's own coefficient."""
    for receipt in reversed(vector.receipts):
        found: Any = receipt
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, float) and receipt.get("coefficient", vector.coefficient) == vector.coefficient:
            return f"{found:+.3f}"
    return "-"


def _head(columns: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_plain, cells)) + " |"


def _plain(text: str) -> str:
    """On one line, and without what would end a cell or begin HTML."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _svg(shown: Sequence[Shown]) -> str:
    ends = [0.0, *(value for each in shown for value in each[1:] if value is not None)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def x(value: float) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT - 30) * (value - low) / span:.1f}"

    height = _TOP + _ROW * len(shown) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<path d="M{x(0.0)} {_TOP - 12}V{height - 8}" stroke="{_GREY}"/>',
        *(
            f'<text x="{x(value)}" y="16" text-anchor="middle" fill="#475569">{value:+.2f}</text>'
            for value in sorted({low if low < -0.1 * span else 0.0, 0.0, high if high > 0.1 * span else 0.0})
        ),
    ]
    for i, each in enumerate(shown):
        y = _TOP + _ROW * i
        parts.append(f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(each.name[:34])}</text>')
        parts.append(f'<path d="M{x(each.low)} {y}H{x(each.high)}" stroke="{_BLUE}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(each.effect)}" cy="{y}" r="4" fill="{_BLUE}"/>')
        for value, colour in ((each.random, _GREY), (each.asked, _ORANGE)):
            if value is not None:
                parts.append(
                    f'<circle cx="{x(value)}" cy="{y}" r="3.5" fill="none" stroke="{colour}" stroke-width="2"/>'
                )
    return "".join([*parts, "</svg>\n"])

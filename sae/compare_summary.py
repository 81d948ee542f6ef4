"""What a comparison of two SAEs found (`sae.matching`), as counts, quantiles, examples, and a table of all pairs.

Left out: finding it; laying it out on a terminal.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sae.matching import Found, Latents
from sae.metrics import QUANTILES

SIDES = ("one", "other")
DIGITS = 4
ROWS = 1 << 14

Words = Callable[[int, int], list[str]]
"""from 0 or 1, which is the SAE, and a latent"""


def counts(found: Found, chance: Found, widths: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Latents of either SAE by class, as numbers and as shares of those that were compared."""
    rows: dict[str, dict[str, Any]] = {}
    own, random = members(found), members(chance)
    for name, latents in own.items():
        rows[name] = {}
        for side, key in enumerate(SIDES):
            shares = [_share(part[side]) for part in (latents, random[name])]
            rows[name] |= {key: int(latents[side].sum()), f"{key}_share": shares[0], f"{key}_by_chance": shares[1]}
    compared = [len(part) for part in own["alone"]]
    silent = [width - n for width, n in zip(widths, compared, strict=True)]
    for name, numbers in (("compared", compared), ("silent", silent)):
        rows[name] = dict.fromkeys(rows["alone"]) | dict(zip(SIDES, numbers, strict=True))
    return rows


def nearest(found: Found, chance: Found) -> dict[str, dict[str, float]]:
    """Mean and quantiles, over latents of either SAE, of the largest cosine or correlation with one of the other."""
    rows = {}
    for kind in found.nearest:
        for side, key in enumerate(SIDES):
            for end, source in (("", found), (", by chance", chance)):
                values = source.nearest[kind][side]
                if len(values):
                    figures = np.quantile(values, QUANTILES).round(DIGITS).tolist()
                    row = {"mean": round(float(values.mean()), DIGITS)}
                    rows[f"{kind} of {key}{end}"] = row | dict(
                        zip(map("{:.0%}".format, QUANTILES), figures, strict=True)
                    )
    return rows


def examples(
    found: Found, kept: Sequence[Int[np.ndarray, " _"]], words: Words, n: int
) -> dict[str, list[dict[str, Any]]]:
    """The n clearest of each class: of the largest cosine or correlation; of alone those that are nearest to nothing.

    Args:
      kept: numbers in the SAE of the latents that were compared.
    """

    def said(side: int, latents: Int[np.ndarray, " n"]) -> list[dict[str, Any]]:
        numbers = kept[side][latents].tolist()
        return [{"latent": number, "words": words(side, number)} for number in dict.fromkeys(numbers)]

    result = {}
    for name, chosen in found.classes.items():
        pairs = found.pairs
        head = pairs.other if name == "merged" else pairs.one
        weight = pairs.correlation if name == "correlated" else pairs.decoder_cosine
        where = np.flatnonzero(chosen)
        where = where[np.argsort(-weight[where], kind="stable")]
        groups = [where[head[where] == latent] for latent in list(dict.fromkeys(head[where].tolist()))[:n]]
        result[name] = [
            {
                "one": said(0, pairs.one[group]),
                "other": said(1, pairs.other[group]),
                "decoder_cosine": _rounded(pairs.decoder_cosine[group]),
                "correlation": _rounded(pairs.correlation[group]),
            }
            for group in groups
        ]
    return result | {"alone": _alone(found, said, n)}


def table(found: Found, kept: Sequence[Int[np.ndarray, " _"]]) -> Iterator[dict[str, np.ndarray]]:
    """All pairs, with the latents' numbers in their SAEs and a column of truth values for each class; in parts."""
    columns = found.pairs._asdict() | found.classes
    for start in range(0, max(len(found.pairs.one), 1), ROWS):
        part = {name: values[start : start + ROWS] for name, values in columns.items()}
        yield part | {key: kept[side][part[key]] for side, key in enumerate(SIDES)}


def members(found: Found) -> dict[str, list[Bool[np.ndarray, " _"]]]:
    """Which latents of the one and of the other are in a pair of each class, and which in none."""
    sizes = [len(values) for values in found.nearest["decoder_cosine"]]
    pairs = found.pairs.one, found.pairs.other
    members = {
        name: [np.bincount(part[chosen], minlength=size) > 0 for part, size in zip(pairs, sizes, strict=True)]
        for name, chosen in found.classes.items()
    }
    return members | {"alone": [~np.any([parts[side] for parts in members.values()], axis=0) for side in (0, 1)]}


def _alone(found: Found, said: Callable[[int, Latents], Any], n: int) -> list[dict[str, Any]]:
    rows = []
    for side, key in enumerate(SIDES):
        alone, cosines = np.flatnonzero(members(found)["alone"][side]), found.nearest["decoder_cosine"][side]
        for latent in alone[np.argsort(cosines[alone], kind="stable")[:n]]:
            row = {"one": [], "other": [], "decoder_cosine": _rounded(cosines[[latent]]), "correlation": []}
            rows.append(row | {key: said(side, np.array([latent]))})
    return rows


def _share(members: Bool[np.ndarray, " n"]) -> float | None:
    return round(float(members.mean()), DIGITS) if len(members) else None


def _rounded(values: np.ndarray) -> list[float]:
    """Without those that are not known."""
    return [round(float(value), DIGITS) for value in values if not np.isnan(value)]

"""Which latents a list shows and in which order, from the columns of an index: all of them at once, in memory.

Flow: 1. a mask of the latents that are asked for; 2. one sort of 64-bit keys, the figure's bits above the latent's
number, so that equals are in order of their numbers whichever way it goes, and what was not measured is last.

Left out: where columns come from (`sae.index_db`), and finding latents by words (`FeatureIndex.search`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, UInt32

from activations.errors import UnknownNameError

Columns = Mapping[str, Float[np.ndarray, " d_sae"]]
"""by name, a figure of all latents in order of their numbers, float32, NaN where not measured"""
NUMBER, GIVEN = "latent", "given"
"""to sort by the latents' numbers, or to keep the order in which they were given"""


class Range(NamedTuple):
    """Bounds of a column, both included; latents of which it was not measured are outside any bounds."""

    column: str
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class LatentQuery:
    """What a list shows; hashable."""

    sort: str = NUMBER
    """a column, NUMBER, or GIVEN: the order of the latents that the list is restricted to, such as that of a search"""
    descending: bool = False
    """largest first; of GIVEN, last first"""
    ranges: tuple[Range, ...] = ()
    """all of which must hold"""
    live_only: bool = False
    """leave out latents that were never active"""


def order_of(
    columns: Columns,
    query: LatentQuery,
    within: Int[np.ndarray, " some"] | None = None,
    without: Int[np.ndarray, " other"] | None = None,
) -> Int32[np.ndarray, " matching"]:
    """The latents that match, in order; equals by number, and what was not measured last, either way.

    Args:
      within: latents to choose from, such as those that a search found; all, if not given.
      without: latents to leave out.
    Raises: UnknownNameError for a column or a latent that is not there.
    """
    n = len(next(iter(columns.values())))
    is_shown = _matching(columns, query, n)
    for latents, is_kept in ((within, True), (without, False)):
        if latents is not None:
            is_shown &= _mask(latents, n) == is_kept
    if query.sort == GIVEN and within is not None:
        kept = within[np.sort(np.unique(within, return_index=True)[1])]
        found = kept[is_shown[kept]].astype(np.int32)
    else:
        found = np.flatnonzero(is_shown).astype(np.int32)
    if query.sort in (NUMBER, GIVEN):
        return found[::-1] if query.descending else found
    return _sorted(_column(columns, query.sort), found, query.descending)


def rank_of(order: Int32[np.ndarray, " matching"], latent: int) -> int | None:
    """Place of a latent in an order, from 0; None if it is not in it."""
    places = np.flatnonzero(order == latent)
    return int(places[0]) if len(places) else None


def _matching(columns: Columns, query: LatentQuery, n: int) -> Bool[np.ndarray, " d_sae"]:
    is_shown = ~np.isnan(columns["density"]) if "density" in columns else np.ones(n, bool)  # NaN: not in this index
    for name, low, high in query.ranges:
        values = _column(columns, name)
        is_shown &= (values >= low) & (values <= high)  # False for NaN
    if query.live_only:
        is_shown &= _column(columns, "density") > 0
    return is_shown


def _mask(latents: Int[np.ndarray, " n"], d_sae: int) -> Bool[np.ndarray, " d_sae"]:
    outside = latents[(latents < 0) | (latents >= d_sae)]
    if len(outside):
        fix = "Choose latents of this SAE."
        raise UnknownNameError("latents", expected=f"numbers from 0 to {d_sae - 1}", got=outside[0], fix=fix)
    mask = np.zeros(d_sae, bool)
    mask[latents] = True
    return mask


def _column(columns: Columns, name: str) -> Float[np.ndarray, " d_sae"]:
    if name not in columns:
        known = ", ".join(columns)
        raise UnknownNameError("column", expected=f"one of {known}", got=repr(name), fix="Choose one.")
    return columns[name]


def _sorted(
    values: Float[np.ndarray, " d_sae"], latents: Int32[np.ndarray, " n"], descending: bool
) -> Int32[np.ndarray, " n"]:
    parts = np.empty((len(latents), 2), "<u4")  # a number's low half and its high half
    parts[:, 0], parts[:, 1] = latents, _keys(values[latents], descending)
    parts.view("<u8")[:, 0].sort()
    return parts[:, 0].astype(np.int32)


def _keys(values: Float[np.ndarray, " n"], descending: bool) -> UInt32[np.ndarray, " n"]:
    """Numbers in the order of float32 values, or in the reverse; of NaN the last of all, which no value has."""
    bits = (np.asarray(values, np.float32) + np.float32(0)).view(np.int32)  # -0 becomes 0, which it equals
    keys = (bits ^ ((bits >> 31) | np.int32(-(1 << 31)))).view(np.uint32)
    if descending:
        np.invert(keys, out=keys)
    keys[np.isnan(values)] = 0xFFFFFFFF
    return keys

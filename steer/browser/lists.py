"""Lists of latents: which of them a list shows and in which order, a page of it, and where a latent is in it.

Flow: 1. figures of all latents are read once a source, those of labels again when labels change; 2. what is asked for
becomes an order of all latents that match (`sae.latent_query`), of which the newest few are kept; 3. rows of a page are
read from the database. Left out: one latent (`steer.browser.features`).

What people decided is one more column, made for each question, since not everybody may see all of it while a session
is blind (`sae.annotation.standing`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query
from jaxtyping import Float, Int, Int32
from pydantic import BaseModel

from activations.errors import ConfigError, SaekitError
from sae.annotation.standing import Standings, bits_of
from sae.histogram import STEPS
from sae.index_db import FeatureIndex
from sae.latent_query import GIVEN, NUMBER, LatentQuery, Range, order_of, rank_of
from sae.vocabulary import visible
from steer.browser.guard import Viewer
from steer.browser.sources import Opened, Source

if TYPE_CHECKING:
    from sae.labels.meaning import Meanings

DENSE = 0.1
"""share of tokens from which on a latent is called dense"""
SCORE, EXPLAINED = "score", "explained"
"""columns that come from labels: of the best explanation, and whether there is one"""
FOUND = 2000
"""latents that a search may find"""
CUT_FROM = 3
"""bytes of a word from which on it may be cut short"""
KEPT_ORDERS = 8
PAGE = 100
MAX_LATENT = 2**31 - 1
WORDS, FEW_WORDS = 6, 3
Show = Literal["all", "live", "dead", "dense"]
Status = Literal["undecided", "decided", "accepted", "rejected", "flagged", "skipped", "adjudicated"]
How = Literal["words", "meaning"]
MEANING = "meaning"
"""a column of one question: cosine of a latent's label and the text that is asked for"""
HAS_STATUS = "has_status"
"""a column of one question: whether a latent has the status that is asked for"""
SHOWN: dict[Show, tuple[Range, ...]] = {
    "all": (), "live": (), "dead": (Range("density", 0, 0),), "dense": (Range("density", DENSE),)
}  # fmt: skip

SourceName = Annotated[str, Query(max_length=200, description="name of an index, as /api/about has it")]
Latent = Annotated[int, Query(ge=0, le=MAX_LATENT)]
Offset = Annotated[int, Query(ge=0, le=MAX_LATENT)]


class ListQuery(BaseModel):
    """What a list shows."""

    source: str = Query(max_length=200)
    q: str = Query("", max_length=200, description="words of labels and logits, all of which must be there")
    how: How = Query("words", description="meaning: q is what labels are to be like, once they are read: /api/meaning")
    sort: str = Query("", max_length=40, description="a column, latent, or given: as a search found them")
    descending: bool = False
    show: Show = "all"
    explained: bool | None = None
    status: Status | None = Query(None, description="what people decided, as far as whoever asks may see it")
    by: str = Query("", max_length=100, description="whose decision; nothing: anybody's")
    where: str = Query("", max_length=400, description="bounds of columns, such as density:0.001:0.1,score:0.8:")

    def latent_query(self) -> LatentQuery:
        """The same for `order_of`. Raises: ConfigError for bounds that cannot be read."""
        ranges = [*SHOWN[self.show], *(_range(part) for part in self.where.split(",") if part)]
        if self.explained is not None:
            ranges.append(Range(EXPLAINED, float(self.explained), float(self.explained)))
        if self.status is not None:
            ranges.append(Range(HAS_STATUS, 1, 1))
        if self.is_by_meaning:
            ranges.append(Range(MEANING))
        sort = self.sort or (GIVEN if self.q.strip() else NUMBER)
        is_likest_first = self.is_by_meaning and sort == GIVEN
        return LatentQuery(
            MEANING if is_likest_first else sort, self.descending != is_likest_first, tuple(ranges),
            live_only=self.show == "live",
        )  # fmt: skip

    @property
    def is_by_meaning(self) -> bool:
        """Whether labels are compared with a text, and not searched for its words."""
        return self.how == "meaning" and bool(self.q.strip())


class Named(BaseModel):
    """A latent, and what it is called."""

    latent: int
    label: str | None
    words: list[str]
    """what its decoder row raises most"""


class Row(Named):
    """A latent in a list."""

    explained: bool
    density: float | None
    max_activation: float | None
    logit_entropy: float | None
    output_score: float | None
    confidence_change: float | None
    score: float | None
    spark: list[int]
    """active tokens by octave of activation"""
    cosine: float | None = None
    """of its label and the text, in a search by meaning"""


class Page(BaseModel):
    """A part of a list."""

    total: int
    offset: int
    rows: list[Row]


class Around(BaseModel):
    """Latents of a list before and behind one."""

    total: int
    place: int | None
    """from 0; none if the list does not show it"""
    offset: int
    latents: list[int]


class Density(BaseModel):
    """How often latents are active: a histogram of the decimal logarithm."""

    low: float
    high: float
    counts: list[int]


class About(BaseModel):
    """A source as a whole."""

    source: str
    d_sae: int
    n_tokens: int
    n_dead: int
    n_dense: int
    n_explained: int
    density: Density | None
    columns: dict[str, tuple[float, float] | None]
    """smallest and largest figure; none where nothing was measured"""


class Listing:
    """Lists of one source."""

    def __init__(
        self,
        index: FeatureIndex,
        standings: Callable[[], Standings] | None = None,
        meaning: Callable[[], Meanings] | None = None,
    ):
        """Args:
        standings: what people decided; none: a list by status is empty.
        meaning: labels by meaning; none: there is no such search.
        """
        self.index, self._standings, self._meaning = index, standings, meaning
        self._cosines: OrderedDict[tuple[Any, ...], Float[np.ndarray, " d_sae"]] = OrderedDict()
        self._lock = threading.Lock()
        self._columns: dict[str, Float[np.ndarray, " d_sae"]] = {}
        self._revision: tuple[int, int] | None = None
        self._orders: OrderedDict[tuple[Any, ...], Int32[np.ndarray, " n"]] = OrderedDict()

    def columns(self) -> dict[str, Float[np.ndarray, " d_sae"]]:
        """Figures of all latents by name."""
        with self._lock:
            revision = self.index.labels_revision()
            if revision != self._revision:
                self._columns, self._revision = self._figures(), revision
                self._orders.clear()
            return self._columns

    def order(self, asked: ListQuery, viewer: str = "") -> Int32[np.ndarray, " n"]:
        """All latents of a list, by what the viewer may see. Raises: as `order_of` and `latent_query` do."""
        query, columns = asked.latent_query(), self.columns()
        key: tuple[Any, ...] = query, asked.q
        own: dict[str, Float[np.ndarray, " d_sae"]] = {}  # columns of this question
        if asked.is_by_meaning:
            own[MEANING], revision = self._cosines_of(asked.q)
            key = *key, revision
        if asked.status is not None:
            own[HAS_STATUS], revision = self._with_status(asked.status, asked.by, viewer)
            key = *key, asked.status, asked.by, viewer, revision
        with self._lock:
            if key in self._orders:
                self._orders.move_to_end(key)
                return self._orders[key]
        order = order_of({**columns, **own}, query, None if asked.is_by_meaning else self._found(asked.q))
        with self._lock:
            if columns is self._columns:
                self._orders[key] = order
            if len(self._orders) > KEPT_ORDERS:
                self._orders.popitem(last=False)
        return order

    def rows(self, latents: Int[np.ndarray, " n"], asked: ListQuery) -> list[Row]:
        """What a list shows of some latents."""
        columns = self.columns()
        cosines = self._cosines_of(asked.q)[0] if asked.is_by_meaning else None
        names = [name for name in Row.model_fields if name in columns and name != EXPLAINED]

        def figures(latent: int) -> dict[str, Any]:
            return {name: number(columns[name][latent]) for name in names}

        stored = self.index.rows_of(latents, ("label", "top_logits", "histogram", "histogram_start"))
        return [
            Row(
                **_called(row, WORDS),
                explained=bool(columns[EXPLAINED][row["latent"]]),
                spark=octaves(row["histogram"], row["histogram_start"]),
                cosine=None if cosines is None else number(cosines[row["latent"]]),
                **figures(row["latent"]),
            )
            for row in stored
        ]

    def _cosines_of(self, text: str) -> tuple[Float[np.ndarray, " d_sae"], Any]:
        if self._meaning is None:
            fix = "Start saekit browse with --set embedding=…"
            raise ConfigError("how", expected="words, without an embedding model", got="meaning", fix=fix)
        meanings = self._meaning()
        key = text, meanings.revision
        with self._lock:
            known = self._cosines.get(key)
        if known is None:
            known = meanings.cosines(text.strip())
            with self._lock:
                self._cosines[key] = known
                if len(self._cosines) > KEPT_ORDERS:
                    self._cosines.popitem(last=False)
        return known, meanings.revision

    def _with_status(self, status: Status, by: str, viewer: str) -> tuple[Float[np.ndarray, " d_sae"], Any]:
        if self._standings is None:
            return np.zeros(self.index.info["d_sae"], np.float32), None
        marks, revision = self._standings().marks(viewer, by)
        has = marks == 0 if status == "undecided" else (marks & bits_of(status)) > 0
        return has.astype(np.float32), revision

    def _figures(self) -> dict[str, Float[np.ndarray, " d_sae"]]:
        d_sae, of_labels = self.index.info["d_sae"], (SCORE, EXPLAINED)
        stored = {name: column for name, column in self._columns.items() if name not in of_labels}
        score, explained = np.full(d_sae, np.nan, np.float32), np.zeros(d_sae, np.float32)
        for latent, value in self.index.explained().items():
            if 0 <= latent < d_sae:
                explained[latent], score[latent] = 1, np.nan if value is None else value
        return {**(stored or self.index.columns()), SCORE: score, EXPLAINED: explained}

    def _found(self, text: str) -> Int[np.ndarray, " n"] | None:
        words = "".join(letter if letter.isprintable() else " " for letter in text).strip()
        if not words:
            return None
        d_sae = self.index.info["d_sae"]
        return np.array([i for i in self.index.search(words, FOUND, CUT_FROM) if 0 <= i < d_sae], dtype=np.int64)


class Listings:
    """Lists of every source that is open."""

    def __init__(
        self, opened: Opened, standings: Callable[[str], Standings], meaning: Callable[[str], Meanings] | None = None
    ):
        """Args:
        standings: what people decided of the latents of a source.
        meaning: labels of a source by meaning; none: there is no such search.
        """
        self._opened = opened
        self._listings = {
            name: Listing(source.index, partial(standings, name), None if meaning is None else partial(meaning, name))
            for name, source in opened.sources.items()
        }

    def source(self, name: str) -> Source:
        """A source by name. Raises: UnknownNameError."""
        return self._opened.source(name)

    def warm(self) -> None:
        """Read what the first page shows, so that it is there when the page asks; what fails is told then."""
        for name, listing in islice(self._listings.items(), 1):
            with suppress(SaekitError):
                asked = ListQuery(source=name)
                listing.rows(listing.order(asked)[:PAGE], asked)

    def of(self, name: str) -> Listing:
        """Lists of a source. Raises: UnknownNameError."""
        return self._listings[self.source(name).name]


def lists_router(listings: Listings) -> APIRouter:
    """Routes of lists."""
    router = APIRouter(prefix="/api")

    @router.get("/latents")
    def page(
        account: Viewer, asked: Annotated[ListQuery, Query()], offset: Offset = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = PAGE,
    ) -> Page:  # fmt: skip
        listing = listings.of(asked.source)
        order = listing.order(asked, account.name)
        return Page(total=len(order), offset=offset, rows=listing.rows(order[offset : offset + limit], asked))

    @router.get("/latents/around")
    def around(
        account: Viewer, asked: Annotated[ListQuery, Query()], latent: Latent,
        reach: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Around:  # fmt: skip
        order = listings.of(asked.source).order(asked, account.name)
        place = rank_of(order, latent)
        first = max((place or 0) - reach, 0)
        latents = order[first : (place or 0) + reach + 1].tolist()
        return Around(total=len(order), place=place, offset=first, latents=latents)

    @router.get("/source")
    def about(account: Viewer, source: SourceName) -> About:
        listing = listings.of(source)
        columns, info = listing.columns(), listing.index.info
        density = columns["density"]
        return About(
            source=source, d_sae=info["d_sae"], n_tokens=info.get("n_tokens") or 0, n_dead=int((density == 0).sum()),
            n_dense=int((density >= DENSE).sum()), n_explained=int(columns[EXPLAINED].sum()),
            density=density_histogram(density), columns={name: _bounds(values) for name, values in columns.items()},
        )  # fmt: skip

    return router


def named(index: FeatureIndex, latents: Iterable[int], n_words: int = FEW_WORDS) -> dict[int, dict[str, Any]]:
    """What latents are called, as parts of a Named; those that the SAE does not have are left out."""
    inside = [latent for latent in dict.fromkeys(latents) if 0 <= latent < index.info["d_sae"]]
    return {row["latent"]: _called(row, n_words) for row in index.rows_of(inside, ("label", "top_logits"))}


def _called(row: Mapping[str, Any], n_words: int) -> dict[str, Any]:
    label, words = row["label"], [visible(text) for text, _ in row["top_logits"][:n_words]]
    return {"latent": row["latent"], "label": None if label is None else visible(label), "words": words}


def octaves(counts: list[int], start: int) -> list[int]:
    """A histogram of `sae.histogram` with all bins of an octave as one.

    >>> octaves([1, 2, 3], 3)
    [1, 5]
    """
    found = [0] * (-(-(start % STEPS + len(counts)) // STEPS))
    for i, n in enumerate(counts):
        found[(start % STEPS + i) // STEPS] += n
    return found


def density_histogram(density: Float[np.ndarray, " d_sae"], a_decade: int = 8) -> Density | None:
    """Of the latents that are active at all; none if there are none."""
    logs = np.log10(density[density > 0])
    if not len(logs):
        return None
    low, high = float(np.floor(logs.min())), float(max(np.ceil(logs.max()), np.floor(logs.min()) + 1))
    counts, _ = np.histogram(logs, bins=round(a_decade * (high - low)), range=(low, high))
    return Density(low=low, high=high, counts=counts.tolist())


def number(value: Any) -> float | None:
    """A figure as JSON has it: None for what is not finite; float32 without its spurious digits."""
    return float(f"{value:.7g}") if value is not None and np.isfinite(value) else None


def _bounds(values: Float[np.ndarray, " d_sae"]) -> tuple[float, float] | None:
    finite = values[np.isfinite(values)]
    return (float(f"{finite.min():.7g}"), float(f"{finite.max():.7g}")) if len(finite) else None


def _range(part: str) -> Range:
    """Bounds such as `density:0.001:0.1`, either of which may be left out."""
    try:
        column, low, high = part.split(":")
        return Range(column, float(low or "-inf"), float(high or "inf"))
    except ValueError as error:
        expected = "bounds such as density:0.001:0.1"
        raise ConfigError("where", expected=expected, got=repr(part[:60]), fix="Correct it.") from error

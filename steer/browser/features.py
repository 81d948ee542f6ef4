"""One latent: where it is active and where it almost is, what it says and does, who is like it, and its explanations.

Token texts come from the index, and so no tokenizer is needed. Left out: lists (`steer.browser.lists`).
"""

from fastapi import APIRouter
from pydantic import BaseModel

from sae.contexts import Context
from sae.histogram import edges
from sae.index_db import FeatureIndex, LatentRow
from sae.labels.report import CHANCE
from sae.labels.tables import KINDS, Label, Score
from sae.vocabulary import visible
from steer.browser.guard import Viewer
from steer.browser.lists import Latent, Listings, Named, SourceName, named, number

N_BINS = 5
"""of equal shares of the latent's active tokens"""


class Window(BaseModel):
    """A stretch of text around a place."""

    tokens: list[str]
    values: list[float]
    """activation at each token"""
    peak: int
    score: float | None
    """pre-activation at the peak"""
    effect: float | None
    """nats a token that the text costs more without the latent"""
    source: int
    document: int


class Bin(BaseModel):
    """Contexts of a range of activations."""

    share_low: float
    """of its active tokens, below the range"""
    share_high: float
    low: float
    high: float
    contexts: list[Window]


class Token(BaseModel):
    """A token, and how much the latent changes its logit by, a unit of activation."""

    text: str
    value: float


class Other(Named):
    """A latent that this one is like, or is active with."""

    cosine: float | None = None
    jaccard: float | None = None
    lift: float | None = None


class Scored(BaseModel):
    """A score of a label, or of what stood in its place."""

    method: str
    control: str
    measure: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    n_failed: int
    judge: str
    chance: float | None
    """what needs no label at all gets"""


class Said(BaseModel):
    """What somebody says the latent stands for."""

    kind: str
    text: str
    author: str
    created: str
    scores: list[Scored]


class Histogram(BaseModel):
    """Active tokens by activation."""

    counts: list[int]
    edges: list[float]
    """one more than counts"""


class Feature(BaseModel):
    """All that the index has of a latent."""

    source: str
    latent: int
    d_sae: int
    n_tokens: int
    density: float
    denser_than: float | None
    """share of the latents that are ever active which are so less often"""
    max_activation: float
    mean_activation: float
    logit_entropy: float | None
    output_score: float | None
    confidence_change: float | None
    stability: float | None
    histogram: Histogram
    raised: list[Token]
    lowered: list[Token]
    neighbours: list[Other]
    coactive: list[Other]
    contexts: list[Window]
    bins: list[Bin]
    """weakest first; empty ones left out"""
    near_misses: list[Window]
    said: list[Said]
    """explanations first"""


def features_router(listings: Listings) -> APIRouter:
    """The route of a latent."""
    router = APIRouter(prefix="/api")

    @router.get("/feature")
    def feature(account: Viewer, source: SourceName, latent: Latent) -> Feature:
        listing = listings.of(source)
        index, density = listing.index, listing.columns()["density"]
        row = index.latent(latent)
        is_live = density > 0
        below = float((density[is_live] < density[latent]).mean()) if row.density > 0 and is_live.any() else None
        return as_feature(source, index, row, below)

    return router


def as_feature(source: str, index: FeatureIndex, row: LatentRow, denser_than: float | None) -> Feature:
    """A row of the index, with all that it names by number in words."""
    called = named(index, [other for other, *_ in (*row.neighbours, *row.coactivations)])
    figures = {
        name: number(getattr(row, name)) for name in ("logit_entropy", "output_score", "confidence_change", "stability")
    }
    return Feature(
        source=source, latent=row.latent, d_sae=index.info["d_sae"], n_tokens=index.info.get("n_tokens") or 0,
        density=number(row.density) or 0, denser_than=denser_than, max_activation=number(row.max_activation) or 0,
        mean_activation=number(row.mean_activation) or 0, **figures,
        histogram=Histogram(counts=row.histogram, edges=edges(row.histogram_start, len(row.histogram)).tolist()),
        raised=_tokens(row.top_logits), lowered=_tokens(row.bottom_logits),
        neighbours=[Other(**called[i], cosine=number(cosine)) for i, cosine in row.neighbours if i in called],
        coactive=[Other(**called[i], jaccard=number(jaccard), lift=number(lift))
                  for i, jaccard, lift in row.coactivations if i in called],
        contexts=_windows(index, row.contexts), bins=_bins(index, row), near_misses=_windows(index, row.near_misses),
        said=_said(index.labels(row.latent)),
    )  # fmt: skip


def _windows(index: FeatureIndex, contexts: list[Context]) -> list[Window]:
    return [
        Window(
            tokens=index.token_texts(context.tokens), values=[number(value) or 0 for value in context.activations],
            peak=context.peak, score=number(context.score), effect=number(context.effect), source=context.source,
            document=context.document,
        )
        for context in contexts
    ]  # fmt: skip


def _bins(index: FeatureIndex, row: LatentRow) -> list[Bin]:
    bins = row.quantile_bins(N_BINS)
    return [
        Bin(
            share_low=i / N_BINS, share_high=(i + 1) / N_BINS, low=row.quantile(i / N_BINS),
            high=row.quantile((i + 1) / N_BINS), contexts=_windows(index, contexts[::-1]),
        )
        for i, contexts in enumerate(bins)
        if contexts
    ]  # fmt: skip


def _tokens(pairs: list[tuple[str, float]]) -> list[Token]:
    return [Token(text=visible(text), value=number(value) or 0) for text, value in pairs]


def _said(labels: list[Label]) -> list[Said]:
    place = {kind: i for i, kind in enumerate(KINDS)}
    return [
        Said(kind=label.kind, text=visible(label.text), author=visible(label.author), created=label.created,
             scores=[_scored(score) for score in label.scores])
        for label in sorted(labels, key=lambda label: (place.get(label.kind, len(KINDS)), -label.id))
    ]  # fmt: skip


def _scored(score: Score) -> Scored:
    return Scored(
        method=score.method, control=score.control, measure=score.measure, value=number(score.value),
        low=number(score.low), high=number(score.high), n=score.n, n_failed=score.n_failed, judge=score.judge,
        chance=CHANCE.get(score.method, ("", None))[1],
    )  # fmt: skip

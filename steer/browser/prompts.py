"""Search by running a text: which latents are active on which of its tokens.

Flow: 1. the text runs through the browser's model, as `saekit vector find` runs it; 2. a few tokens at a time are
encoded, so that no more than ROWS times d_sae latents are in memory; 3. of each token the strongest latents are told,
and of the whole text those that are strong here and rare elsewhere, by the score of `steer.making.find`.

Left out: steering.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from fastapi import APIRouter
from jaxtyping import Float, Int
from pydantic import AfterValidator, BaseModel, Field

from steer.browser.guard import Viewer
from steer.browser.lists import Listing, Listings, Named, named, number
from steer.browser.model import SharedModel
from steer.browser.saes import Saes
from steer.browser.sources import Source
from steer.items import Body

if TYPE_CHECKING:
    from torch import Tensor

    from sae.torch_view import TorchSae

ROWS = 16
"""tokens that are encoded together"""
MAX_TOKENS = 512
MAX_LETTERS = 8000
LEAST_SHARE = 1e-12


def _whole(text: str) -> str:
    """Refuse halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text that is valid Unicode") from error
    return text


class Prompt(Body):
    """What is run."""

    source: str = Field(max_length=200)
    text: Annotated[str, Field(min_length=1, max_length=MAX_LETTERS), AfterValidator(_whole)]
    chat: bool = Field(False, description="as what a user says, in the chat template; its tokens alone count")
    a_token: int = Field(12, ge=1, le=64, description="strongest latents told of each token")
    n: int = Field(50, ge=1, le=200, description="latents told of the whole text")
    max_density: float = Field(0.05, gt=0, le=1, description="leave out of these what is more often active")


class Active(BaseModel):
    """A latent on a token."""

    latent: int
    value: float


class Piece(BaseModel):
    """A token."""

    text: str
    counts: bool
    """whether it was looked at: not the first, special ones, or what the chat template adds"""
    active: list[Active]
    """strongest first"""
    n_active: int


class Firing(Named):
    """A latent on the text."""

    score: float
    peak: float
    n_tokens: int
    density: float


class Ran(BaseModel):
    """What a text makes active."""

    source: str
    tokens: list[Piece]
    latents: list[Firing]
    """best score first; all that are told of a token are named in `names`"""
    names: dict[int, str]
    """label or words of every latent that is told of a token"""


class Encoded(NamedTuple):
    """A text in an SAE."""

    strongest: list[list[tuple[int, float]]]
    """of each token"""
    n_active: list[int]
    peak: Float[np.ndarray, " d_sae"]
    n_tokens: Int[np.ndarray, " d_sae"]


def prompts_router(listings: Listings, model: SharedModel, saes: Saes) -> APIRouter:
    """The route that runs a text."""
    router = APIRouter(prefix="/api")

    @router.post("/prompt")
    def run(account: Viewer, asked: Prompt) -> Ran:
        source = listings.source(asked.source)
        return run_prompt(listings.of(asked.source), source, model, saes, asked)

    return router


def run_prompt(listing: Listing, source: Source, model: SharedModel, saes: Saes, asked: Prompt) -> Ran:
    """Run a text. Raises: ModelError, MismatchError, TextError, MissingArtefactError as the parts do."""
    from sae.belongs import check_index
    from steer.latents import places_of
    from steer.making.find import place_text

    artefact, view = saes.get(source)
    with model.using() as loaded:
        check_index(source.index, loaded, artefact)
        placed = place_text(loaded, places_of(artefact).reads, asked.text, asked.chat, MAX_TOKENS)
    encoded = encode(view, placed.x, asked.a_token)
    told = iter(zip(encoded.strongest, encoded.n_active, strict=True))
    tokens = []
    for text, counts in zip(source.index.token_texts(placed.ids), placed.counts.tolist(), strict=True):
        strongest, n_active = next(told) if counts else ([], 0)
        active = [Active(latent=latent, value=number(value) or 0) for latent, value in strongest]
        tokens.append(Piece(text=text, counts=counts, active=active, n_active=n_active))
    best = firing(listing, encoded, asked)
    called = named(source.index, (latent for each in encoded.strongest for latent, _ in each))
    names = {latent: each["label"] or " ".join(each["words"]) for latent, each in called.items()}
    return Ran(source=source.name, tokens=tokens, latents=best, names=names)


def encode(view: TorchSae, x: Tensor, n: int) -> Encoded:
    """Latents of a text, with the n strongest of each token."""
    import torch

    peak, n_tokens = torch.zeros(view.d_sae), torch.zeros(view.d_sae, dtype=torch.long)
    strongest: list[list[tuple[int, float]]] = []
    n_active: list[int] = []
    with torch.inference_mode():
        for rows in x.split(ROWS):
            latents = view.encode(rows)
            peak = torch.maximum(peak, latents.max(0).values)
            n_tokens += (latents > 0).sum(0)
            n_active += (latents > 0).sum(1).tolist()
            values, indices = latents.topk(min(n, view.d_sae), dim=1)
            for row, each in zip(indices.tolist(), values.tolist(), strict=True):
                strongest.append([(i, value) for i, value in zip(row, each, strict=True) if value > 0])
    return Encoded(strongest, n_active, peak.numpy(), n_tokens.numpy())


def firing(listing: Listing, encoded: Encoded, asked: Prompt) -> list[Firing]:
    """Latents of the whole text, best first: peak activation / usual activation * -ln(density)."""
    columns, d_sae = listing.columns(), len(encoded.peak)
    seen = 1 / max(listing.index.info.get("n_tokens") or 1, 1)
    density = np.maximum(columns["density"][:d_sae], seen).astype(np.float64)
    usual = columns["mean_activation"][:d_sae].astype(np.float64)
    typical = float(usual[usual > 0].mean()) if (usual > 0).any() else 1.0
    score = encoded.peak / np.where(usual > 0, usual, typical) * -np.log(np.maximum(density, LEAST_SHARE))
    candidates = np.flatnonzero((encoded.n_tokens > 0) & (density <= asked.max_density))
    best = candidates[np.lexsort((candidates, -score[candidates]))][: asked.n]
    called = named(listing.index, best.tolist())
    return [
        Firing(
            **called[i], score=number(score[i]) or 0, peak=number(encoded.peak[i]) or 0,
            n_tokens=int(encoded.n_tokens[i]), density=number(density[i]) or 0,
        )
        for i in best.tolist()
    ]  # fmt: skip

"""What a request says that it is steered with."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from steer.items import MOST_ITEMS, Body, Level, Ref, Use


class Item(Use):
    """One thing that steers: a vector, the vectors NAME@… of a group, a kit, or a latent of a library's SAE."""

    vector: Ref | None = Field(
        default=None, description="name of a vector, a group or a kit; LIBRARY/NAME where several have it"
    )
    latent: Ref | int | None = Field(
        default=None, description="index of a latent of a library's SAE; LIBRARY/N where several have one"
    )
    clamp: Level | None = Field(default=None, description="of a latent: the activation that it is set to")
    scale: Level | None = Field(
        default=None, description="of a latent: the factor of its activation where it is active; 0 switches it off"
    )


class Asked(Body):
    """All that a request is steered with."""

    steer: list[Item] = Field(default=[], max_length=MOST_ITEMS, description="what steers, all of it at once")
    budget: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = Field(
        default=None, description="joint dose at a hook point to which all that steers is scaled down; none: not"
    )

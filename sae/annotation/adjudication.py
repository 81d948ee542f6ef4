"""Latents on which annotators differ, with all that they say; and what an adjudicator decided.

A decision is an event like others (`sae.annotation.events.ADJUDICATE`), by whoever decides, and may be undone by them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sae.annotation.agreement import normalised
from sae.annotation.events import Event
from sae.annotation.state import ACCEPTED, VERDICTS, LatentState, decisions, states


@dataclass(frozen=True)
class Case:
    """A latent on which annotators differ."""

    latent: int
    differ_in: str
    """verdicts, or texts where all accepted"""
    opinions: list[LatentState]
    """of all who gave a verdict, by name"""
    decision: LatentState | None
    """the newest adjudication; None: it waits for one"""


def cases(events: Iterable[Event]) -> list[Case]:
    """Of a session's events, or of all; those that wait for a decision first, then by latent."""
    known = list(events)
    decided = decisions(known)
    found: list[Case] = []
    for latent, by_author in states(known).items():
        opinions = [state for _, state in sorted(by_author.items()) if state.status in VERDICTS]
        differ_in = difference(opinions)
        if differ_in is not None:
            found.append(Case(latent, differ_in, opinions, decided.get(latent)))
    return sorted(found, key=lambda case: (case.decision is not None, case.latent))


def difference(opinions: list[LatentState]) -> str | None:
    """In what annotators differ: verdicts, texts or, None, in nothing."""
    if len({opinion.status for opinion in opinions}) > 1:
        return "verdicts"
    labels = {normalised(opinion.text) for opinion in opinions if opinion.status == ACCEPTED}
    return "texts" if len(labels) > 1 else None

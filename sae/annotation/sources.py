"""What queues are made from, read from the labels and scores of an index and from events.

Left out: densities, which the index has, and the orders (`sae.annotation.queues`).
"""

import sqlalchemy as sql
from sqlalchemy import orm

from sae.annotation.connect import connect_index, reading, told
from sae.annotation.queues import margin
from sae.annotation.state import states
from sae.annotation.store import AnnotationStore
from sae.labels.tables import EXPLANATION, LabelRow, check_tables, scores_of

_AT_ONCE = 500


def labelled(store: AnnotationStore, *, by_people: bool = False) -> set[int]:
    """Latents that have an explanation by anybody, or by a person."""
    said = states(store.events())
    found = {latent for latent, by_author in said.items() if any(state.label for state in by_author.values())}
    return found if by_people else found | {latent for _, latent in _newest(store)}


def margins(store: AnnotationStore) -> dict[int, float]:
    """By latent, the largest margin of its explanations that were scored (`sae.annotation.queues.margin`)."""
    newest = _newest(store)
    latent_of = dict(newest)
    found: dict[int, float] = {}
    engine = connect_index(store.index)
    try:
        with told(engine), reading(engine) as connection, orm.Session(connection) as session:
            numbers = sorted(latent_of)
            for start in range(0, len(numbers), _AT_ONCE):
                for label, scores in scores_of(session, numbers[start : start + _AT_ONCE]).items():
                    value = margin(scores)
                    if value is not None:
                        found[latent_of[label]] = max(value, found.get(latent_of[label], value))
    finally:
        engine.dispose()
    return found


def _newest(store: AnnotationStore) -> list[tuple[int, int]]:
    """Number and latent of the newest explanation of each latent and author that was not taken back."""
    engine = connect_index(store.index)
    newest = (
        sql.select(sql.func.max(LabelRow.id))
        .where(LabelRow.sae_sha256 == store.sae_sha256, LabelRow.kind == EXPLANATION)
        .group_by(LabelRow.latent, LabelRow.author)
    )
    query = sql.select(LabelRow.id, LabelRow.latent).where(LabelRow.id.in_(newest), LabelRow.text != "")
    try:
        with told(engine), reading(engine) as connection:
            if not check_tables(orm.Session(connection)):
                return []
            return [(row.id, row.latent) for row in connection.execute(query)]
    finally:
        engine.dispose()

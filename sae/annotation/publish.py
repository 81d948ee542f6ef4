"""People's labels among the labels of an index, where `FeatureIndex.labels()` and its full-text search read them.

The text that a person stands behind is a row of `labels` of kind `explanation` with them as author. A change appends a
row, and taking it back an empty one, which readers leave out. The search holds the newest text only.
"""

from collections.abc import Iterable
from typing import NamedTuple

import sqlalchemy as sql

from activations.errors import ConfigError
from sae.labels.tables import EXPLANATION, LabelRow


class Said(NamedTuple):
    """The text that somebody stands behind now; "" is none."""

    latent: int
    author: str
    text: str


def publish(connection: sql.Connection, sae_sha256: str, said: Iterable[Said], now: str) -> int:
    """Append labels that differ from the newest of their latent and author; returns how many."""
    n = 0
    for each in said:
        query = (
            sql.select(LabelRow.text)
            .where(LabelRow.latent == each.latent, LabelRow.kind == EXPLANATION, LabelRow.author == each.author)
            .where(LabelRow.sae_sha256 == sae_sha256)
            .order_by(LabelRow.id.desc())
        )
        before = connection.execute(query).scalars().first() or ""
        if before == each.text:
            continue
        row = {"kind": EXPLANATION, "created": now, "sae_sha256": sae_sha256, **each._asdict()}
        connection.execute(sql.insert(LabelRow), row)
        _replace(connection, each, before)
        n += 1
    return n


def check_person(connection: sql.Connection, author: str) -> None:
    """Raise ConfigError if labels under this name are a machine's, which a person's would stand in for."""
    of_machine = sql.select(LabelRow.id).where(
        LabelRow.author == author, (LabelRow.kind != EXPLANATION) | LabelRow.prompt_sha256.is_not(None)
    )
    if connection.execute(of_machine.limit(1)).first():
        raise ConfigError(
            "label event: author", expected="a person's name", got=f"{author}, who is no person", fix="Choose another."
        )


def _replace(connection: sql.Connection, said: Said, before: str) -> None:
    values = {"kind": EXPLANATION, "latent": said.latent}
    if before:
        old = {**values, "body": before, "words": '"' + before.replace('"', '""') + '"'}
        connection.execute(
            sql.text(
                "DELETE FROM search WHERE rowid = (SELECT rowid FROM search WHERE search MATCH :words "
                "AND latent = :latent AND kind = :kind AND body = :body LIMIT 1)"
            ),
            old,
        )
    if said.text:
        connection.execute(sql.text("INSERT INTO search VALUES (:body, :kind, :latent)"), {**values, "body": said.text})

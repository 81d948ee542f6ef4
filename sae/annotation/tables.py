"""Tables of what people say of latents, in the database of a feature index or in one that a team shares.

    annotation_sessions   what is to be labelled, by how many annotators, and whether they see each other
    session_latents       a session's latents in the order in which they are handed out
    leases                who has or had a latent of a session, until when, and what became of it
    label_events          append-only: everything that annotators did
    drafts                what was typed and not yet decided on, a row for each browser tab

`label_events` is what counts. `leases.status` and `drafts.is_open` follow from it, are written in the same transaction,
and save reading all events for a count. Only what SQLite and PostgreSQL have in common is used. Left out: reading and
writing (`sae.annotation.store`).
"""

from typing import Any

import sqlalchemy as sql
from sqlalchemy import orm

_CLUSTERED = {"sqlite_with_rowid": False}  # rows lie in the order of the key, in which they are read
_ID = sql.BigInteger().with_variant(sql.Integer, "sqlite")  # SQLite numbers rows by itself in INTEGER only


class AnnotationBase(orm.DeclarativeBase):
    """Of every table of annotations."""


class SessionRow(AnnotationBase):
    """A labelling session; only `unblinded` ever changes, once."""

    __tablename__ = "annotation_sessions"
    id: orm.Mapped[int] = orm.mapped_column(_ID, primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(unique=True)
    sae_sha256: orm.Mapped[str]
    queue: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    seed: orm.Mapped[int] = orm.mapped_column(sql.BigInteger)
    annotators_per_latent: orm.Mapped[int]
    blind: orm.Mapped[bool]
    created: orm.Mapped[str]
    unblinded: orm.Mapped[str | None]


class QueueRow(AnnotationBase):
    """Place of a latent in a session's queue; never changed."""

    __tablename__ = "session_latents"
    session: orm.Mapped[int] = orm.mapped_column(_ID, sql.ForeignKey("annotation_sessions.id"), primary_key=True)
    position: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    latent: orm.Mapped[int]
    __table_args__ = (sql.UniqueConstraint("session", "latent"), _CLUSTERED)


class LeaseRow(AnnotationBase):
    """A latent in the hands of an annotator, or what became of it there."""

    __tablename__ = "leases"
    session: orm.Mapped[int] = orm.mapped_column(_ID, sql.ForeignKey("annotation_sessions.id"), primary_key=True)
    latent: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    author: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    expires: orm.Mapped[float] = orm.mapped_column(sql.Double)
    status: orm.Mapped[str]
    __table_args__ = (sql.Index("leases_author", "session", "author", "status"), _CLUSTERED)


class EventRow(AnnotationBase):
    """Something an annotator did; rows are never changed."""

    __tablename__ = "label_events"
    id: orm.Mapped[int] = orm.mapped_column(_ID, primary_key=True)
    key: orm.Mapped[str] = orm.mapped_column(unique=True)
    sae_sha256: orm.Mapped[str]
    session: orm.Mapped[int | None] = orm.mapped_column(_ID, sql.ForeignKey("annotation_sessions.id"))
    latent: orm.Mapped[int]
    author: orm.Mapped[str]
    created: orm.Mapped[str]
    action: orm.Mapped[str]
    text: orm.Mapped[str]
    note: orm.Mapped[str]
    seen_label: orm.Mapped[int | None] = orm.mapped_column(sql.BigInteger)
    seen_text: orm.Mapped[str | None]
    undoes: orm.Mapped[int | None] = orm.mapped_column(_ID, sql.ForeignKey("label_events.id"))
    tab: orm.Mapped[str]
    revision: orm.Mapped[int] = orm.mapped_column(sql.BigInteger)
    __table_args__ = (
        sql.Index("label_events_latent", "sae_sha256", "latent"),
        sql.Index("label_events_author", "author", "id"),
        sql.Index("label_events_session", "session"),
    )


class DraftRow(AnnotationBase):
    """The newest text of a browser tab; session 0 is none, since a primary key has no nulls."""

    __tablename__ = "drafts"
    sae_sha256: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    latent: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    author: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    session: orm.Mapped[int] = orm.mapped_column(_ID, primary_key=True, autoincrement=False)
    tab: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    revision: orm.Mapped[int] = orm.mapped_column(sql.BigInteger)
    text: orm.Mapped[str]
    note: orm.Mapped[str]
    updated: orm.Mapped[str]
    closed_by: orm.Mapped[int | None] = orm.mapped_column(_ID, sql.ForeignKey("label_events.id"))
    is_open: orm.Mapped[bool]
    __table_args__ = (sql.Index("drafts_open", "session", "is_open"),)

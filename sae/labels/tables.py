"""Tables of labels, scores and requests in the database of a feature index, and how they are read.

    labels     append-only: what somebody says a latent stands for, with who and when
    scores     append-only: how well a label does, or a control beside it
    requests   prompts and raw answers, by a hash of all that decides an answer

They have a metadata of their own, so that an index that is built anew leaves them alone. A label belongs to the SAE
whose hash it carries; those of another SAE are not read. Left out: writing (`sae.labels.store`).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import sqlalchemy as sql
from sqlalchemy import orm

from activations.errors import CorruptArtefactError

TOKENS, LOGITS, EXPLANATION = "tokens", "logits", "explanation"
"""kinds of labels: what it is active on, what it raises, and what a model says of it"""
KINDS = (EXPLANATION, TOKENS, LOGITS)
"""the same, by how much each says; others come last"""
DETECTING = ("detection", "fuzzing")
"""methods that ask whether texts fit an explanation, 0.5 by chance; their mean stands for it in lists"""


_CHECKED: WeakKeyDictionary[sql.Engine, set[type[orm.DeclarativeBase]]] = WeakKeyDictionary()


class LabelBase(orm.DeclarativeBase):
    """Of every table of labels."""


class LabelRow(LabelBase):
    """A label; rows are never changed."""

    __tablename__ = "labels"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    latent: orm.Mapped[int] = orm.mapped_column(index=True)
    kind: orm.Mapped[str]
    text: orm.Mapped[str]
    author: orm.Mapped[str]
    created: orm.Mapped[str]
    sae_sha256: orm.Mapped[str]
    prompt_sha256: orm.Mapped[str | None]
    request: orm.Mapped[str | None]


class ScoreRow(LabelBase):
    """A score; rows are never changed."""

    __tablename__ = "scores"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    label: orm.Mapped[int] = orm.mapped_column(index=True)
    latent: orm.Mapped[int]
    method: orm.Mapped[str]
    control: orm.Mapped[str]
    measure: orm.Mapped[str]
    value: orm.Mapped[float]
    low: orm.Mapped[float | None]
    high: orm.Mapped[float | None]
    n: orm.Mapped[int]
    n_failed: orm.Mapped[int]
    judge: orm.Mapped[str]
    created: orm.Mapped[str]
    requests: orm.Mapped[Any] = orm.mapped_column(sql.JSON)


class RequestRow(LabelBase):
    """A request with its answer, or with what went wrong at the last try."""

    __tablename__ = "requests"
    key: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    model: orm.Mapped[str] = orm.mapped_column(index=True)
    purpose: orm.Mapped[str]
    latent: orm.Mapped[int]
    messages: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    settings: orm.Mapped[Any] = orm.mapped_column(sql.JSON)
    answer: orm.Mapped[str | None]
    error: orm.Mapped[str | None]
    tokens_in: orm.Mapped[int]
    tokens_out: orm.Mapped[int]
    cost: orm.Mapped[float]
    tries: orm.Mapped[int]
    created: orm.Mapped[str]


@dataclass(frozen=True)
class Score:
    """How well a label does by one method, or what stands beside it in its place."""

    method: str
    """detection, fuzzing, intervention, embedding or intruder"""
    control: str
    """explanation; or shuffled or tokens: what was scored in its place"""
    measure: str
    """balanced_accuracy, auroc or accuracy"""
    value: float
    """0..1"""
    low: float | None
    """end of the 95% interval over texts; none for too few of them"""
    high: float | None
    n: int
    """texts, pairs or trials"""
    n_failed: int
    """of those, how many answers could not be read; each counts as half right"""
    judge: str = ""
    """model that answered, or the embedding"""
    requests: list[str] = field(default_factory=list)
    """keys of the requests that it was computed from"""


@dataclass(frozen=True)
class Label:
    """What somebody says a latent stands for."""

    id: int
    latent: int
    kind: str
    """tokens, logits or explanation"""
    text: str
    author: str
    """a model's name, or saekit where no model was asked"""
    created: str
    """UTC, ISO 8601"""
    scores: list[Score] = field(default_factory=list)


def labels_of(session: orm.Session, latent: int, sae_sha256: str) -> list[Label]:
    """The newest label of each kind and author, with its scores, oldest first; without those that were taken back."""
    if not check_tables(session):
        return []
    rows = session.scalars(
        sql.select(LabelRow).where(LabelRow.latent == latent, LabelRow.sae_sha256 == sae_sha256).order_by(LabelRow.id)
    )
    newest = {(row.kind, row.author): row for row in rows}
    return [
        Label(row.id, latent, row.kind, row.text, row.author, row.created, scores_of(session, [row.id])[row.id])
        for row in sorted(newest.values(), key=lambda row: row.id)
        if row.text  # a person who takes a label back leaves an empty one
    ]


def newest_labels(
    session: orm.Session, sae_sha256: str, latents: Iterable[int | np.integer] | None = None
) -> dict[int, str]:
    """By latent, the text of its newest label of the first of KINDS that it has one of; of some latents, or of all."""
    if not check_tables(session):
        return {}
    place = sql.case({kind: place for place, kind in enumerate(KINDS)}, value=LabelRow.kind, else_=len(KINDS))
    query = sql.select(LabelRow.latent, LabelRow.text).where(LabelRow.sae_sha256 == sae_sha256)
    if latents is not None:
        query = query.where(LabelRow.latent.in_(listed(latents)))
    rows = session.execute(query.order_by(place.desc(), LabelRow.id))
    return {latent: text for latent, text in rows}  # the last of a latent stays


def revision(session: orm.Session) -> tuple[int, int]:
    """Numbers of the newest label and score, which grow with each; (0, 0) without any."""
    if not check_tables(session):
        return 0, 0
    newest = (session.scalar(sql.select(sql.func.max(row.id))) or 0 for row in (LabelRow, ScoreRow))
    return next(newest), next(newest)


def listed(numbers: Iterable[int | np.integer]) -> sql.Select[Any]:
    """Numbers as a query, since a statement takes only so many parameters."""
    return sql.select(sql.func.json_each(json.dumps([int(number) for number in numbers])).table_valued("value").c.value)


def scores_of(session: orm.Session, labels: Iterable[int]) -> dict[int, list[Score]]:
    """By label, the newest score of each method, control and judge."""
    ids = list(labels)
    found: dict[int, dict[tuple[str, str, str], Score]] = {label: {} for label in ids}
    for row in session.scalars(sql.select(ScoreRow).where(ScoreRow.label.in_(ids)).order_by(ScoreRow.id)):
        values = {name: getattr(row, name) for name in Score.__dataclass_fields__}
        found[row.label][row.method, row.control, row.judge] = Score(**values)
    return {label: list(scores.values()) for label, scores in found.items()}


def check_tables(session: orm.Session, base: type[orm.DeclarativeBase] = LabelBase) -> bool:
    """Whether the tables, of labels unless said, are there. Raises: CorruptArtefactError if one lacks a column.

    Tables do not go away again, so a database that has them is looked at once: it takes longer than reading a label.
    """
    checked = _CHECKED.setdefault(session.get_bind().engine, set())
    if base in checked:
        return True
    inspector = sql.inspect(session.connection())
    there = set(inspector.get_table_names())
    for table in base.metadata.sorted_tables:
        if table.name in there:
            missing = {column.name for column in table.columns} - {
                column["name"] for column in inspector.get_columns(table.name)
            }
            if missing:
                raise CorruptArtefactError(
                    f"{session.get_bind().engine.url.database}: table {table.name}",
                    expected=f"the columns {', '.join(column.name for column in table.columns)}",
                    got=f"none named {', '.join(sorted(missing))}",
                    fix="It was made by something else or by another version: rename the table, and a new one is made.",
                )
    if not all(table.name in there for table in base.metadata.sorted_tables):
        return False
    checked.add(base)
    return True

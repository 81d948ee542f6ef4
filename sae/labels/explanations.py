"""How good the best explanation of each latent is, kept up to date: only labels and scores that are new are read.

Flow: 1. scores up to the newest one now, and before that all labels, since a label is written before its scores; 2. of
each latent that something is new of, the best is taken anew. All is read again where numbers went back, as in a
database that was replaced. Left out: a latent's labels themselves (`sae.labels.tables`).
"""

import threading

import sqlalchemy as sql
from sqlalchemy import orm

from sae.labels.tables import DETECTING, EXPLANATION, LabelRow, ScoreRow, check_tables, revision


class Explanations:
    """Scores of the explanations of one SAE's latents. May be shared by threads."""

    def __init__(self, sae_sha256: str):
        self._sae_sha256, self._lock = sae_sha256, threading.Lock()
        self._forget()

    def best(self, session: orm.Session) -> dict[int, float | None]:
        """By latent that has an explanation, its best one's score: the mean balanced accuracy over DETECTING methods.

        Only the newest explanation of each author counts, if it was not taken back, and the newest score of each method
        and judge; None without scores.
        """
        if not check_tables(session):
            return {}
        with self._lock:
            newest = revision(session)
            if any(now < before for now, before in zip(newest, self._read, strict=True)):
                self._forget()
            try:
                for latent in self._take_labels(session) | self._take_scores(session, newest[1]):
                    self._choose(latent)
            except BaseException:
                self._forget()
                raise
            self._read = max(self._read[0], newest[0]), newest[1]
            return dict(self._best)

    def _forget(self) -> None:
        self._read = (0, 0)
        self._newest: dict[int, dict[str, tuple[int, bool]]] = {}
        """by latent and author, the newest label, and whether it says something"""
        self._latent_of: dict[int, int] = {}
        """of the newest labels"""
        self._values: dict[int, dict[tuple[str, str], float]] = {}
        """by label, then method and judge"""
        self._best: dict[int, float | None] = {}

    def _take_labels(self, session: orm.Session) -> set[int]:
        query = sql.select(LabelRow.id, LabelRow.latent, LabelRow.author, LabelRow.text != "")
        query = query.where(LabelRow.sae_sha256 == self._sae_sha256, LabelRow.kind == EXPLANATION)
        changed: set[int] = set()
        new = query.where(LabelRow.id > self._read[0]).order_by(LabelRow.id)
        for label, latent, author, is_one in session.execute(new):
            by_author = self._newest.setdefault(latent, {})
            if (old := by_author.get(author)) is not None:
                del self._latent_of[old[0]]
                self._values.pop(old[0], None)
            by_author[author] = label, bool(is_one)
            self._latent_of[label] = latent
            changed.add(latent)
            self._read = max(self._read[0], label), self._read[1]
        return changed

    def _take_scores(self, session: orm.Session, newest: int) -> set[int]:
        query = sql.select(ScoreRow.label, ScoreRow.method, ScoreRow.judge, ScoreRow.value).where(
            ScoreRow.control == EXPLANATION, ScoreRow.method.in_(DETECTING)
        )
        new = query.where(ScoreRow.id > self._read[1], ScoreRow.id <= newest).order_by(ScoreRow.id)
        changed: set[int] = set()
        for label, method, judge, value in session.execute(new):
            if (latent := self._latent_of.get(label)) is not None:
                self._values.setdefault(label, {})[method, judge] = value
                changed.add(latent)
        return changed

    def _choose(self, latent: int) -> None:
        labels = [label for label, is_one in self._newest[latent].values() if is_one]
        if not labels:
            self._best.pop(latent, None)
            return
        means = [sum(values.values()) / len(values) for label in labels if (values := self._values.get(label))]
        self._best[latent] = max(means, default=None)

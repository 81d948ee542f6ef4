"""Labels that people gave, for other programs: a row a latent in a table, or Neuronpedia's explanations.

A latent's final label is the adjudicator's; without one, what its annotators agree on, in the words of who decided
last; where they differ the status is `disputed` and there is no text. Every event is in the history, undone ones too.

Spreadsheets run what begins like a formula. In a .csv a text that begins with = + - @, their full-width forms, a tab or
a line break (after any spaces and apostrophes) has an apostrophe in front; `unprefixed` takes it away again. Other
formats have texts as they are.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from activations.errors import ConfigError
from sae.annotation.adjudication import difference
from sae.annotation.agreement import normalised
from sae.annotation.events import Event
from sae.annotation.queues import unequal_pairs
from sae.annotation.state import ACCEPTED, ADJUDICATED, PENDING, SKIPPED, VERDICTS, LatentState, decisions, states
from sae.annotation.store import AnnotationStore
from sae.parts import parts
from sae.tables import Part, check_table, write_table

DISPUTED = "disputed"
ROWS = 1000
"""rows that are written at once"""
_FORMULA = tuple("=+-@＝＋－＠\t\r\n")


@dataclass(frozen=True)
class FinalLabel:
    """What people say of a latent, all told."""

    latent: int
    status: str
    """accepted, rejected, flagged, skipped, pending (all undone), disputed or adjudicated"""
    text: str
    """the label; "" where there is none"""
    decided: str | None
    """when, UTC, ISO 8601"""
    authors: list[str]
    """who gave a verdict, and last the adjudicator if there is one"""
    verdicts: dict[str, str]
    """by annotator"""
    texts: dict[str, str]
    """by annotator who stands behind one"""
    verdict_agreement: float | None
    """share of pairs of annotators with the same verdict; None for fewer than two"""
    text_agreement: float | None
    """the same of normalised texts, among annotators who have one"""
    history: list[dict[str, Any]]
    """all events, in order"""


def final_labels(events: Iterable[Event]) -> list[FinalLabel]:
    """By latent, what follows from events."""
    known = list(events)
    said, decided = states(known), decisions(known)
    by_latent: dict[int, list[Event]] = {}
    for event in known:
        by_latent.setdefault(event.latent, []).append(event)
    return [
        _final(latent, said.get(latent, {}), decided.get(latent), history)
        for latent, history in sorted(by_latent.items())
    ]


def export_labels(store: AnnotationStore, out: Path, *, session: int | None = None) -> dict[str, Any]:
    """Write final labels of a session, or of all, to a .csv, .jsonl or .parquet.

    Returns: out and rows, JSON-ready.
    Raises: ConfigError for another name or where pyarrow is not installed, StorageError.
    """
    check_table(out)
    rows = final_labels(store.events(session=session))
    columns = _csv if out.suffix == ".csv" else _columns
    parts = (columns(part, store.sae_sha256) for part in _tables(rows))
    return {"out": str(out), "rows": write_table(out, parts, _schema)}


def export_neuronpedia(
    store: AnnotationStore, out: Path, *, model_id: str, source: str, author_id: str, session: int | None = None
) -> dict[str, Any]:
    """Write final labels that have a text as explanations of Neuronpedia's export, one JSON object a line.

    Args:
      out: a .jsonl.
      model_id: the model as Neuronpedia names it, such as gemma-2-2b.
      source: the SAE as Neuronpedia names it, such as 12-gemmascope-res-16k.
      author_id: the user there to whom they are attributed; who gave them here is in `notes`.
    Returns: out and rows, JSON-ready.
    Raises: ConfigError for another name, StorageError.
    """
    if out.suffix != ".jsonl":
        raise ConfigError(out, expected="a name that ends in .jsonl", got=out.name, fix="Rename it.")
    labels = [label for label in final_labels(store.events(session=session)) if label.text]
    records = (explanation(label, store.sae_sha256, model_id, source, author_id) for label in labels)
    columns = ({name: [record[name] for record in part] for name in part[0]} for part in parts(records, ROWS))
    return {"out": str(out), "rows": write_table(out, columns)}


def explanation(label: FinalLabel, sae_sha256: str, model_id: str, source: str, author_id: str) -> dict[str, Any]:
    """A record of Neuronpedia's explanations; the same label has the same id whenever it is exported.

    No embedding: their server computes it. No type, model or trigger: a person wrote it.
    """
    told = "\x00".join((sae_sha256, model_id, source, str(label.latent), label.text))
    return {
        "id": "c" + hashlib.sha256(told.encode()).hexdigest()[:24],
        "modelId": model_id,
        "layer": source,
        "index": str(label.latent),
        "description": label.text,
        "authorId": author_id,
        "embedding": None,
        "triggeredById": None,
        "typeName": None,
        "explanationModelName": None,
        "notes": f"{label.status} by {', '.join(label.authors)}",
        "createdAt": label.decided,
    }


def prefixed(text: str) -> str:
    """A text that no spreadsheet takes for a formula.

    >>> prefixed("=1+1"), prefixed("'=1+1"), prefixed("a=1"), prefixed("it's")
    ("'=1+1", "''=1+1", 'a=1', "it's")
    """
    return "'" + text if text.lstrip(" '").startswith(_FORMULA) else text


def unprefixed(text: str) -> str:
    """What `prefixed` was given.

    >>> unprefixed("''=1+1")
    "'=1+1"
    """
    return text[1:] if text.startswith("'") and text.lstrip(" '").startswith(_FORMULA) else text


def _final(
    latent: int, by_author: Mapping[str, LatentState], decision: LatentState | None, history: list[Event]
) -> FinalLabel:
    opinions = [state for _, state in sorted(by_author.items()) if state.status in VERDICTS]
    status, text, decided = _outcome(opinions, decision, is_skipped=bool(by_author))
    unequal = unequal_pairs([state.status for state in opinions])
    differing = unequal_pairs([normalised(state.label) for state in opinions if state.label])
    return FinalLabel(
        latent=latent,
        status=status,
        text=text,
        decided=decided,
        authors=[state.author for state in opinions] + ([decision.author] if decision else []),
        verdicts={state.author: state.status for state in opinions},
        texts={state.author: state.label for state in opinions if state.label},
        verdict_agreement=None if unequal is None else 1 - unequal,
        text_agreement=None if differing is None else 1 - differing,
        history=[asdict(event) for event in history],
    )


def _outcome(
    opinions: list[LatentState], decision: LatentState | None, *, is_skipped: bool
) -> tuple[str, str, str | None]:
    """Status, text and time."""
    if decision is not None:
        return ADJUDICATED, decision.text, decision.decided
    if not opinions:
        return SKIPPED if is_skipped else PENDING, "", None
    last = max(opinions, key=lambda state: state.event or 0)
    if difference(opinions) is not None:
        return DISPUTED, "", last.decided
    return last.status, last.text if last.status == ACCEPTED else "", last.decided


def _tables(labels: list[FinalLabel]) -> Iterable[list[FinalLabel]]:
    return parts(labels, ROWS) if labels else [[]]  # an empty table has columns too


def _columns(labels: list[FinalLabel], sae_sha256: str) -> Part:
    columns: dict[str, list[Any]] = {
        field.name: [getattr(label, field.name) for label in labels] for field in fields(FinalLabel)
    }
    for name, value in (("verdicts", "verdict"), ("texts", "text")):
        columns[name] = [[{"author": who, value: what} for who, what in each.items()] for each in columns[name]]
    return {**columns, "sae_sha256": [sae_sha256] * len(labels)}


def _csv(labels: list[FinalLabel], sae_sha256: str) -> Part:
    columns = _columns(labels, sae_sha256)
    return {
        name: [prefixed(value) if isinstance(value, str) else value for value in column]
        for name, column in columns.items()
    }


def _schema(arrow: Any) -> Any:
    text, number, share = arrow.string(), arrow.int64(), arrow.float64()
    history = {
        **dict.fromkeys(("key", "author", "action", "text", "note", "seen_text", "tab", "created"), text),
        **dict.fromkeys(("id", "latent", "session", "seen_label", "undoes", "revision"), number),
    }
    return arrow.schema(
        {
            "latent": arrow.int32(),
            **dict.fromkeys(("status", "text", "decided"), text),
            "authors": arrow.list_(text),
            "verdicts": arrow.list_(arrow.struct({"author": text, "verdict": text})),
            "texts": arrow.list_(arrow.struct({"author": text, "text": text})),
            "verdict_agreement": share,
            "text_agreement": share,
            "history": arrow.list_(arrow.struct(history)),
            "sae_sha256": text,
        }
    )

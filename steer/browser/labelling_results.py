"""What came of a labelling session, over HTTP: how far people agree, where they differ, and their labels as a file.

All of it waits until a session is no longer blind, but for admins.
"""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from fastapi import APIRouter, Response

from activations.errors import ConfigError
from sae.annotation.adjudication import cases
from sae.annotation.agreement import agreement
from sae.annotation.export import export_labels
from sae.annotation.sessions import LabellingSession
from sae.annotation.state import states
from steer.browser.guard import Account, Admin, Viewer
from steer.browser.labelling import Labelling, Session, SessionNumber, SessionOf, session_out
from steer.browser.lists import SourceName

FORMS = {"csv": "text/csv", "jsonl": "application/jsonl", "parquet": "application/vnd.apache.parquet"}


def results_router(labelling: Labelling) -> APIRouter:
    """Routes for whoever wants to know what came of it."""
    router = APIRouter(prefix="/api/label")

    @router.get("/agreement")
    def agreed(account: Viewer, source: SourceName, session: SessionNumber) -> dict[str, Any]:
        store = labelling.of(source)[1]
        _check_open(store.session(session), account)
        return agreement(states(store.events(session=session)))

    @router.get("/cases")
    def differing(account: Viewer, source: SourceName, session: SessionNumber) -> list[dict[str, Any]]:
        store = labelling.of(source)[1]
        _check_open(store.session(session), account)
        return [asdict(case) for case in cases(store.events(session=session))]

    @router.post("/unblind")
    def unblind(account: Admin, given: SessionOf) -> Session:
        store = labelling.of(given.source)[1]
        return session_out(store, store.unblind(given.session))

    @router.get("/export", response_class=Response)
    def export(
        account: Viewer, source: SourceName, session: SessionNumber, form: Literal["csv", "jsonl", "parquet"] = "csv"
    ) -> Response:
        store = labelling.of(source)[1]
        _check_open(store.session(session), account)
        with TemporaryDirectory() as folder:
            file = Path(folder) / f"labels.{form}"
            export_labels(store, file, session=session)
            data = file.read_bytes()
        name = f'attachment; filename="labels-{session}.{form}"'
        return Response(data, media_type=FORMS[form], headers={"content-disposition": name})

    return router


def _check_open(session: LabellingSession, account: Account) -> None:
    if session.is_blind_now and not account.may("admin"):
        fix = "Wait until an admin ends it."
        raise ConfigError(session.name, expected="a session that is blind no longer", got="a blind one", fix=fix)

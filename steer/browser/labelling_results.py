"""What came of a labelling session, over HTTP: how far people agree, where they differ, and their labels as a file.

All of it waits until a session is no longer blind, but for admins.
"""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response

from activations.errors import ConfigError
from sae.annotation.adjudication import cases
from sae.annotation.agreement import agreement
from sae.annotation.export import export_labels, export_neuronpedia
from sae.annotation.sessions import LabellingSession
from sae.annotation.state import states
from steer.browser.guard import Account, Admin, Viewer
from steer.browser.labelling import Labelling, Session, SessionNumber, SessionOf, session_out
from steer.browser.lists import SourceName

FORMS = {"csv": "text/csv", "jsonl": "application/jsonl", "parquet": "application/vnd.apache.parquet"}
NEURONPEDIA = "neuronpedia"
There = Annotated[str, Query(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""a name that something has at Neuronpedia"""


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
        account: Viewer, source: SourceName, session: SessionNumber,
        form: Literal["csv", "jsonl", "parquet", "neuronpedia"] = "csv",
        model_id: There = "", sae_id: There = "", author_id: There = "",
    ) -> Response:  # fmt: skip
        """Final labels; for Neuronpedia, its explanations, of the model, SAE and author as it names them."""
        store = labelling.of(source)[1]
        _check_open(store.session(session), account)
        suffix = "jsonl" if form == NEURONPEDIA else form
        with TemporaryDirectory() as folder:
            file = Path(folder) / f"labels.{suffix}"
            if form == NEURONPEDIA:
                _check_named(model_id=model_id, sae_id=sae_id, author_id=author_id)
                export_neuronpedia(store, file, model_id=model_id, source=sae_id, author_id=author_id, session=session)
            else:
                export_labels(store, file, session=session)
            data = file.read_bytes()
        name = f'attachment; filename="{"explanations" if form == NEURONPEDIA else "labels"}-{session}.{suffix}"'
        return Response(data, media_type=FORMS[suffix], headers={"content-disposition": name})

    return router


def _check_named(**names: str) -> None:
    for field, name in names.items():
        if not name.strip():
            fix = "Look it up there, such as gemma-2-2b and 12-gemmascope-res-16k."
            raise ConfigError(field, expected="a name as Neuronpedia has it", got="none", fix=fix)


def _check_open(session: LabellingSession, account: Account) -> None:
    if session.is_blind_now and not account.may("admin"):
        fix = "Wait until an admin ends it."
        raise ConfigError(session.name, expected="a session that is blind no longer", got="a blind one", fix=fix)

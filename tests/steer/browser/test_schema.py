"""Every operation of the API's own schema, with what fits it and what does not, made up by schemathesis."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from schemathesis.config import SchemathesisConfig

from activations.models import LoadedModel
from sae.annotation.events import ACTIONS
from steer.browser.app import create_app
from steer.browser.guard import Account, Pace
from steer.browser.meaning import Meaning
from steer.browser.model import SharedModel
from steer.browser.sources import Opened, open_paths
from steer.browser.team import Team, sqlite_url
from steer.library import save_library
from steer.listening import LOOPBACK
from steer.vectors import SteeringVector

from .conftest import N_LATENTS, TOKEN, serving

EXAMPLES = 8
"""made up for an operation, beside some that are at the edges of its schema"""
HEADERS = {"authorization": f"Bearer {TOKEN}"}
ADA = Account("ada", "admin")


REAL: dict[str, tuple[int, tuple[Any, ...]]] = {
    "source": (200, ("resid_post.1",)), "one": (200, ("resid_post.1",)), "other": (200, ("resid_post.1",)),
    "session": (2**31, (1, 2)), "latent": (2**31 - 1, tuple(range(0, N_LATENTS, 7))), "action": (20, ACTIONS),
    "kind": (20, ("random", "density", "unlabelled", "one_to_one")), "sort": (40, ("", "given", "density", "score")),
    "vector": (200, ("0/push",)), "library": (10_000, (0,)), "max_new_tokens": (1024, (1, 4)), "token": (20, (TOKEN,)),
}  # fmt: skip
"""by name, the most that the schema allows, in letters or as a number, and what is there; what is made up would be
refused before anything is done"""
CONFIG = {
    "checks": {
        "positive_data_acceptance": {"expected-statuses": ["2xx", 400, 401, 404, 409]}  # 400: what no schema can say
    }
}


def schema_of_all() -> Any:
    """The schema of an app with every route; nothing has to be open for it."""
    with closing(Team("sqlite://", ADA, TOKEN)) as team:
        opened = Opened({}, ())
        meaning = Meaning(opened, "none")
        return create_app(opened, team.account_of, (), SharedModel(None), team, meaning=meaning).openapi()


schema = schemathesis.openapi.from_dict(schema_of_all(), config=SchemathesisConfig.from_dict(CONFIG))


def real(part: Any) -> Any:
    """The same with values of REAL in place of others that the schema allows as well."""
    if isinstance(part, list):
        return [real(each) for each in part]
    if not isinstance(part, dict):
        return part
    return {name: _real(value, *REAL[name]) if name in REAL else real(value) for name, value in part.items()}


def _real(value: Any, most: int, values: tuple[Any, ...]) -> Any:
    if isinstance(value, str) and isinstance(values[0], str) and len(value) <= most:
        return values[len(value) % len(values)]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(values[0], int) and 1 <= value <= most:
        return values[int(value) % len(values)]
    return value


@pytest.fixture(scope="module")
def where_all(
    index_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny: LoadedModel, pushing: SteeringVector
) -> Iterator[str]:
    """A browser with all that it can open, and two sessions."""
    folder = tmp_path_factory.mktemp("schema")
    shutil.copytree(index_path, folder / "index")
    save_library(folder / "library", [pushing])
    team = Team(sqlite_url(folder / "state" / "accounts.sqlite"), ADA, TOKEN)
    with closing(team), closing(open_paths([folder / "index", folder / "library"])) as opened:
        model, meaning = SharedModel(tiny.id, "cpu", tiny), Meaning(opened, "none")
        app = create_app(opened, team.account_of, LOOPBACK, model, team, meaning=meaning)
        app.state.pace = Pace(10**9, 10**9)
        with serving(app) as where, httpx.Client(base_url=where, headers=HEADERS) as client:
            for name in ("first", "second"):
                session = {"source": "resid_post.1", "name": name, "n": 50, "blind": name == "second"}
                assert client.post("/api/label/sessions", json=session).status_code == 201
            yield where


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # the server, which is a thread here, does
@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    phases=(Phase.explicit, Phase.generate),
)
def test_every_operation_answers_as_its_schema_says(case: Case, where_all: str) -> None:
    case.query, case.body = real(case.query), real(case.body)
    response = case.call(where_all, headers=HEADERS)
    case.validate_response(response)

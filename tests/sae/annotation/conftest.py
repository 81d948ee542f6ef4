"""A small index, and stores of annotations in it and in PostgreSQL."""

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sql

from sae.annotation.events import Event, NewEvent
from sae.annotation.store import AnnotationStore
from sae.index_db import LatentRow, write_index
from tests.sae.annotation.postgres import server

D_SAE, SAE = 40, "5ae"
Do = Callable[..., Event]


def row(latent: int) -> LatentRow:
    """A latent of which little is known."""
    return LatentRow(
        latent=latent, density=latent / 100, max_activation=1.0, mean_activation=0.5, histogram=[1],
        top_logits=[(" sea", 2.0)], bottom_logits=[], neighbours=[], contexts=[],
    )  # fmt: skip


@pytest.fixture
def index(tmp_path: Path) -> Path:
    write_index(tmp_path / "index", {"sae_sha256": SAE, "d_sae": D_SAE}, [row(latent) for latent in range(D_SAE)])
    return tmp_path / "index"


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.fixture
def team(postgres: str) -> Iterator[str]:
    """The URL of an empty database of a team."""
    engine = sql.create_engine(postgres.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    name = f"t{uuid4().hex[:12]}"
    with engine.connect() as connection:
        connection.execute(sql.text(f"CREATE DATABASE {name}"))
    yield postgres.replace("/postgres?", f"/{name}?")
    with engine.connect() as connection:
        connection.execute(sql.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(params=["own", pytest.param("team", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest) -> str | None:
    """None: the index's own database; else PostgreSQL."""
    return request.getfixturevalue("team") if request.param == "team" else None


@pytest.fixture
def store(index: Path, url: str | None) -> Iterator[AnnotationStore]:
    with AnnotationStore.open(index, url=url) as store:
        yield store


@pytest.fixture
def own(index: Path) -> Iterator[AnnotationStore]:
    with AnnotationStore.open(index) as store:
        yield store


@pytest.fixture
def do(store: AnnotationStore) -> Do:
    return doing(store)


def doing(store: AnnotationStore) -> Do:
    """Record an event under a new key."""

    def do(latent: int, author: str, action: str, text: str = "", **more: object) -> Event:
        return store.record(NewEvent(uuid4().hex, latent, author, action, text=text, **more))  # type: ignore[arg-type]

    return do

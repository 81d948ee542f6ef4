"""What `saekit browse` opens, and for whom."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from activations.config import Config


def _several(value: object) -> object:
    return (value,) if isinstance(value, str | Path) else value


class BrowseConfig(Config):
    """A feature browser over indexes and libraries."""

    paths: Annotated[tuple[Path, ...], BeforeValidator(_several)] = Field(
        default=(Path("runs/demo"),), description="feature indexes, libraries, or folders that hold some"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on; other than loopback needs team")
    port: int = Field(default=8765, ge=0, le=65535, description="port; 0: any that is free")
    open: bool = Field(default=True, description="open the page in the machine's web browser, if it has one")
    author: str | None = Field(default=None, description="your name beside labels; none: your login name")
    team: bool = Field(default=False, description="several people, each with an account and a token of their own")
    hosts: tuple[str, ...] = Field(
        default=(), description="names under which a proxy reaches the browser, beside the address itself"
    )
    database: str | None = Field(
        default=None,
        description="SQLAlchemy URL of the database that keeps what people write; none: a file in the first index",
    )
    model: str | None = Field(
        default=None, description="model spec for prompts and steering; none: the index's own, or a library's"
    )
    embedding: str | None = Field(
        default=None,
        description="sentence-embedding model to search labels by meaning with: wheel:NAME, a folder or ORG/NAME; "
        "none: labels are searched by words alone",
    )
    device: str = Field(default="auto", description="torch device of the models")
    export: Path | None = Field(
        default=None, description="write a folder of pages that need no server, and stop; none: serve"
    )
    latents: tuple[int, ...] = Field(
        default=(),
        description="export: which; none: those that are explained, else those that steer best, 200 of each index",
    )

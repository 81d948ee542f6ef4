"""The index of a catalogue: which packs are there, what is in them, and what their files have to be.

    index.json   format "saekit-catalogue-1", packs by name and then version

It is plain JSON beside the archives, so that any folder or web server is a catalogue, without a program behind it. It
says enough to search packs and to refuse one that is for another model before it is downloaded. It is not signed; the
packs are. What it says of a pack is compared with the pack when that is there. Left out: reading and writing packs
(`steer.packs.catalogue`, `steer.packs.install`).
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from activations.errors import CorruptArtefactError
from steer.packs.archive import FRAME_BYTES
from steer.packs.contents import damaged
from steer.packs.names import (
    ARCHIVE_SUFFIX,
    file_name_problem,
    is_pack_name,
    is_version,
    named_version,
    printable,
    version_order,
)

FORMAT = "saekit-catalogue-1"
INDEX = "index.json"
INDEX_BYTES = 64 << 20
LINE_CHARACTERS = 1000
"""of one text"""


def _checked(is_right: Any, what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not is_right(value):
            raise ValueError(what)
        return value

    return AfterValidator(check)


Line = Annotated[str, StringConstraints(max_length=LINE_CHARACTERS), _checked(str.isprintable, "a line of plain text")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ArchiveName = Annotated[
    str,
    _checked(lambda name: name.endswith(ARCHIVE_SUFFIX) and "/" not in name, f"a name that ends in {ARCHIVE_SUFFIX}"),
    _checked(lambda name: file_name_problem(name) is None, "a name that is safe on any disk"),
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class IndexedModel(_Part):
    """A model that a pack has vectors or features for."""

    id: Line
    fingerprint: Line


class IndexedPack(_Part):
    """A pack as the index of a catalogue tells of it."""

    name: Annotated[str, _checked(is_pack_name, "the name of a pack")]
    version: Annotated[str, _checked(is_version, "a version such as 1.0.0")]
    file: ArchiveName
    bytes: int = Field(gt=0, le=2 * FRAME_BYTES)
    sha256: Sha256
    content_sha256: Sha256
    summary: Line
    licence: Line
    models: list[IndexedModel]
    vectors: list[Line]
    features: list[Line]
    kits: list[Line]
    signer: Line | None


class _Index(_Part):
    format: Literal["saekit-catalogue-1"]
    packs: list[IndexedPack]


def parse_index(where: object, content: bytes) -> list[IndexedPack]:
    """The packs of an index. Raises: CorruptArtefactError naming what is wrong with it."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(where, "the index of a catalogue", "no JSON") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise damaged(where, f"an index of the format {FORMAT}", "another")
    try:
        packs = _Index.model_validate(data).packs
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])[:200]
        raise damaged(where, f"key '{key}': {first['msg']}", repr(first["input"])[:80]) from error
    if len({(pack.name, pack.version) for pack in packs}) < len(packs):
        raise damaged(where, "each version of a pack once", "one twice")
    return packs


def index_bytes(packs: list[IndexedPack]) -> bytes:
    """The content of index.json: the same for the same packs."""
    ordered = sorted(packs, key=lambda pack: (pack.name, version_order(pack.version)))
    data = {"format": FORMAT, "packs": [pack.model_dump(mode="json") for pack in ordered]}
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def index_entry(
    where: object, manifest: Mapping[str, Any], *, file: str, n_bytes: int, sha256: str, signer: str | None
) -> IndexedPack:
    """What an index says of a pack. Raises: CorruptArtefactError if its manifest does not say enough."""
    name, version = named_version(where, dict(manifest))
    try:
        models = {(each["model"]["id"], each["model"]["fingerprint"]) for each in manifest["vectors"]}
        return IndexedPack(
            name=name,
            version=version,
            file=file,
            bytes=n_bytes,
            sha256=sha256,
            content_sha256=manifest["content_sha256"],
            summary=_line(manifest["summary"]),
            licence=_line(manifest["licence"]),
            models=[IndexedModel(id=_line(each), fingerprint=of) for each, of in sorted(models)],
            vectors=[_line(each["name"]) for each in manifest["vectors"]],
            features=[_line(each["label"]) for each in manifest["features"]],
            kits=[_line(each["name"]) for each in manifest["kits"]],
            signer=signer,
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise _incomplete(where, error) from error


def _line(text: str | None) -> str:
    return printable(" ".join((text or "").split()))[:LINE_CHARACTERS]


def _incomplete(where: object, error: Exception) -> CorruptArtefactError:
    said = f"{error.errors()[0]['loc']}" if isinstance(error, ValidationError) else str(error)
    return damaged(where, "a manifest with vectors, features and kits", f"one without, or with another: {said}"[:200])

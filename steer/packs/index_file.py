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
from steer.pack import NAME, VERSION
from steer.packs.archive import FRAME_BYTES
from steer.packs.contents import damaged, models_of
from steer.packs.names import ARCHIVE_NAME, about_of, name_of, printable, version_order

FORMAT = "saekit-catalogue-1"
INDEX = "index.json"
INDEX_BYTES = 64 << 20
LINE_CHARACTERS = 1000
"""of one text"""


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a line of plain text")
    return text


Line = Annotated[str, StringConstraints(max_length=LINE_CHARACTERS), AfterValidator(_one_line)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ArchiveName = Annotated[str, StringConstraints(pattern=ARCHIVE_NAME)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class IndexedModel(_Part):
    """A model that a pack has vectors or features for."""

    id: Line
    fingerprint: Line


class IndexedPack(_Part):
    """A pack as the index of a catalogue tells of it."""

    name: Annotated[str, StringConstraints(pattern=NAME)]
    version: Annotated[str, StringConstraints(pattern=VERSION)]
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
    (name, version), about = name_of(where, manifest), about_of(where, manifest)
    models = models_of(where, manifest)
    try:
        return IndexedPack(
            name=name,
            version=version,
            file=file,
            bytes=n_bytes,
            sha256=sha256,
            content_sha256=manifest["content_sha256"],
            summary=_line(about.summary),
            licence=_line(about.licence),
            models=[IndexedModel(id=_line(models[of]), fingerprint=of) for of in sorted(models)],
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

"""The index of a catalogue: which packs are there, what is in them, and what their files have to be.

    index.json   format "saekit-catalogue-1", packs by name and then version, and a signature or null

It is plain JSON beside the archives, so that any folder or web server is a catalogue, without a program behind it. It
says enough to search packs and to refuse one that is for another model before it is downloaded. What it says of a pack
is compared with the pack when that is there. Packs are signed on their own; who signs the index vouches for the list:
that nobody put a pack in or left one out. What is signed is b"saekit-catalogue\\n" and the SHA-256 of the index as it
is without a signature; it is in the same file, so that nobody reads one without the other. An index that is old is
signed as well as a new one. Left out: reading and writing packs (`steer.packs.catalogue`, `steer.packs.install`).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from activations.errors import CorruptArtefactError
from steer.pack import NAME, VERSION
from steer.packs.archive import FRAME_BYTES
from steer.packs.contents import damaged, models_of
from steer.packs.names import ARCHIVE_NAME, about_of, name_of, printable, version_order
from steer.packs.signature import Signed, judged, signature_of

FORMAT = "saekit-catalogue-1"
INDEX = "index.json"
INDEX_BYTES = 64 << 20
DOMAIN = b"saekit-catalogue\n"
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
    signature: dict[str, Any] | None = None


class Catalogue(NamedTuple):
    """What an index says, and who says so."""

    packs: list[IndexedPack]
    signed: Signed


UNSIGNED = Signed("unsigned", None, None)


def parse_index(where: object, content: bytes, trusted: Mapping[str, Ed25519PublicKey]) -> Catalogue:
    """The packs of an index. Raises: CorruptArtefactError naming what is wrong with it, its signature too."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(where, "the index of a catalogue", "no JSON") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise damaged(where, f"an index of the format {FORMAT}", "another")
    try:
        index = _Index.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])[:200]
        raise damaged(where, f"key '{key}': {first['msg']}", repr(first["input"])[:80]) from error
    packs = index.packs
    if len({(pack.name, pack.version) for pack in packs}) < len(packs):
        raise damaged(where, "each version of a pack once", "one twice")
    if index.signature is None:
        return Catalogue(packs, UNSIGNED)
    return Catalogue(packs, judged(where, index.signature, _sha256(packs), DOMAIN, trusted))


def index_bytes(packs: list[IndexedPack], key: Ed25519PrivateKey | None = None) -> bytes:
    """The content of index.json, signed if there is a key: the same for the same packs and key."""
    signature = None if key is None else signature_of(_sha256(packs), key, DOMAIN)
    return _content(packs, signature)


def _sha256(packs: list[IndexedPack]) -> str:
    return hashlib.sha256(_content(packs, None)).hexdigest()


def _content(packs: list[IndexedPack], signature: dict[str, str] | None) -> bytes:
    ordered = sorted(packs, key=lambda pack: (pack.name, version_order(pack.version)))
    data = {"format": FORMAT, "packs": [pack.model_dump(mode="json") for pack in ordered], "signature": signature}
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

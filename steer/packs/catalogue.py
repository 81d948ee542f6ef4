"""A catalogue of packs: any folder or web server with an index.json.

Publishing: 1. the archive is written into a hidden folder of the catalogue, and read back as a stranger would; 2. under
a lock the index is read, the archive renamed into place, and the index replaced, in this order, so that the index never
names a file that is not there, and two publishers at once lose nothing. A version that is there stays what it is: other
content is refused, the same content changes nothing, but a signature that was missing or another one is taken over.
With a key the index is signed, and one that is signed is not written without.

Searching reads the index alone: every word has to be in a name, label or summary; what is found in a name comes before
what is found in a vector, a label, the summary. Left out: taking packs out of one, for which the file is removed by
hand, with its entry.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from activations.disk import sync
from activations.errors import ConfigError, MismatchError, UnknownNameError
from steer.packs.archive import unpack_archive, write_archive
from steer.packs.config import SearchConfig
from steer.packs.contents import sha256_of
from steer.packs.disk import explained, locked, staging, write_whole
from steer.packs.index_file import (
    INDEX,
    INDEX_BYTES,
    UNSIGNED,
    Catalogue,
    IndexedPack,
    index_bytes,
    index_entry,
    parse_index,
)
from steer.packs.keys import fingerprint as fingerprint_of
from steer.packs.keys import trusted_keys
from steer.packs.names import ARCHIVE_SUFFIX, PackName, name_of, newest, version_order
from steer.packs.signature import check_signature
from steer.packs.web import inside, read_place, shown

_DIGITS = re.compile(r"[0-9a-f]{6,64}")
RANKS = {"name": 8, "kit": 4, "vector": 4, "label": 2, "summary": 1}
"""what a word that is found there counts"""


class Published(NamedTuple):
    """What `publish_to_catalogue` did."""

    pack: IndexedPack
    is_new: bool
    """False: this content was there"""


class Match(NamedTuple):
    """A pack that was found."""

    pack: IndexedPack
    rank: int
    versions: list[str]
    """all that match, newest first"""


def read_catalogue(place: str) -> Catalogue:
    """The packs of the catalogue at a path or an address, as its index tells of them, and who signed that.

    Raises: MissingArtefactError, EndpointError, CorruptArtefactError, also for an index that was tampered with.
    """
    index = inside(place, INDEX)
    return parse_index(shown(index), read_place(index, INDEX_BYTES), trusted_keys())


def find_pack(place: str, packs: Sequence[IndexedPack], wanted: PackName) -> IndexedPack:
    """The pack of that name and version, or its newest version. Raises: UnknownNameError listing what there is."""
    found = {pack.version: pack for pack in packs if pack.name == wanted.name}
    if found and wanted.version in (None, *found):
        return found[wanted.version or newest(found)]
    there = sorted(found, key=version_order) or sorted({pack.name for pack in packs})
    expected = f"one of {', '.join(there[:20])}" if there else "packs in it"
    what = f"version of {wanted.name}" if found else "pack"
    fix = "Correct the name, or look for it with: saekit library search"
    raise UnknownNameError(f"{shown(place)}: {what}", expected=expected, got=f"'{wanted}'", fix=fix)


def search(packs: Sequence[IndexedPack], words: Sequence[str], fingerprint: str | None = None) -> list[Match]:
    """Packs in which all words are found, best first, each in its newest version that matches.

    Args:
      words: looked for as they are, without regard to case; none: all packs match.
      fingerprint: of the model that a pack has to have something for, or how it begins; none: any.
    """
    ranks: dict[str, dict[str, int]] = {}
    by_version = {(pack.name, pack.version): pack for pack in packs}
    for pack in packs:
        fits = fingerprint is None or any(model.fingerprint.startswith(fingerprint) for model in pack.models)
        rank = _rank(pack, [word.casefold() for word in words])
        if fits and rank is not None:
            ranks.setdefault(pack.name, {})[pack.version] = rank
    found = []
    for name, versions in ranks.items():
        best = newest(versions)
        ordered = sorted(versions, key=version_order, reverse=True)
        found.append(Match(by_version[name, best], versions[best], ordered))
    return sorted(found, key=lambda match: (-match.rank, match.pack.name))


def search_catalogue(settings: SearchConfig, on_status: Callable[[str], None]) -> dict[str, Any]:
    """What a search finds, as it is shown: under `found`, name to version, rank, and what the index says of it."""
    fingerprint = settings.model
    if fingerprint is not None and not _DIGITS.fullmatch(fingerprint):
        from activations.models import weight_fingerprint  # imports torch

        fingerprint = weight_fingerprint(fingerprint, on_status)
    catalogue = read_catalogue(settings.catalogue)
    found = search(catalogue.packs, settings.words.split(), fingerprint)
    rows = {match.pack.name: _row(match.pack) | {"rank": match.rank} for match in found}
    return {"catalogue": shown(settings.catalogue), "index": str(catalogue.signed), "found": rows}


def describe_catalogue(place: str) -> dict[str, Any]:
    """All packs of a catalogue, as they are shown: under `packs`, NAME@VERSION to what the index says of it."""
    packs, signed = read_catalogue(place)
    rows = {f"{pack.name}@{pack.version}": _row(pack) for pack in packs}
    return {"catalogue": shown(place), "index": str(signed), "packs": rows}


def publish_to_catalogue(
    directory: Path, catalogue: Path, signature: bytes | None = None, key: Ed25519PrivateKey | None = None
) -> Published:
    """Put the pack in `directory` into the catalogue in the folder `catalogue`, which is made if need be.

    Args:
      signature: content of its signature.json; None: that of the directory, if it has one.
      key: signs the index.
    Raises: ConfigError for a library without name or version, and for no key where the index is signed;
      CorruptArtefactError for a damaged library, or an index that was tampered with; MismatchError if this version is
      there with other content.
    """
    with explained(catalogue), staging(catalogue) as staged:
        archive = staged / f"new{ARCHIVE_SUFFIX}"
        write_archive(directory, archive, signature)
        manifest = unpack_archive(archive, staged / "read")
        signed = check_signature(directory, staged / "read", manifest, trusted_keys())
        name, version = name_of(directory, manifest)
        entry = index_entry(
            directory,
            manifest,
            file=f"{name}-{version}{ARCHIVE_SUFFIX}",
            n_bytes=archive.stat().st_size,
            sha256=sha256_of(archive),
            signer=signed.fingerprint,
        )
        with locked(catalogue):
            return _enter(catalogue, entry, archive, key)


def _enter(catalogue: Path, entry: IndexedPack, archive: Path, key: Ed25519PrivateKey | None) -> Published:
    """Under the lock: the archive into place, then the index."""
    packs, signed = read_catalogue(str(catalogue)) if (catalogue / INDEX).exists() else Catalogue([], UNSIGNED)
    known = next((pack for pack in packs if (pack.name, pack.version) == (entry.name, entry.version)), None)
    if known is not None and known.content_sha256 != entry.content_sha256:
        where, fix = f"{catalogue}: {entry.name} {entry.version}", "Give the library a higher version."
        raise MismatchError(where, expected="the content that this version has there", got="other content", fix=fix)
    if known is not None and entry.signer in (None, known.signer) and _is_intact(catalogue, known):
        if key is not None and fingerprint_of(key.public_key()) != signed.fingerprint:
            write_whole(catalogue / INDEX, index_bytes(packs, key))
        return Published(known, is_new=False)
    if key is None and signed.fingerprint is not None:
        got, fix = f"none, and an index {signed}", "Say --set key=FILE, or publish into another folder."
        raise ConfigError(f"{catalogue}: {INDEX}", expected="a key to sign it again with", got=got, fix=fix)
    if known is not None and known.file == entry.file:  # both are read until the index says which
        entry = entry.model_copy(update={"file": f"{entry.name}-{entry.version}-{entry.sha256[:12]}{ARCHIVE_SUFFIX}"})
    archive.rename(catalogue / entry.file)
    sync(catalogue)
    write_whole(catalogue / INDEX, index_bytes([*(pack for pack in packs if pack is not known), entry], key))
    if known is not None:
        (catalogue / known.file).unlink(missing_ok=True)
    return Published(entry, is_new=known is None)


def _is_intact(catalogue: Path, pack: IndexedPack) -> bool:
    """Whether the archive is what the index says; one that was damaged or lost may be published again."""
    archive = catalogue / pack.file
    return archive.is_file() and archive.stat().st_size == pack.bytes and sha256_of(archive) == pack.sha256


def _row(pack: IndexedPack) -> dict[str, Any]:
    return {
        "version": pack.version,
        "summary": pack.summary,
        "licence": pack.licence,
        "models": ", ".join(f"{model.id} {model.fingerprint[:12]}" for model in pack.models),
        "vectors": len(pack.vectors),
        "features": len(pack.features),
        "bytes": pack.bytes,
        "signer": pack.signer,
    }


def _rank(pack: IndexedPack, words: Sequence[str]) -> int | None:
    """The sum over words of what the best place counts that it is found in; None if one is found nowhere."""
    places = [(RANKS[kind], text.casefold()) for kind, text in _texts(pack)]
    ranks = [max((rank for rank, text in places if word in text), default=None) for word in words]
    return None if None in ranks else sum(rank for rank in ranks if rank is not None)


def _texts(pack: IndexedPack) -> Iterator[tuple[str, str]]:
    yield "name", pack.name
    yield "summary", pack.summary
    for kind, texts in (("kit", pack.kits), ("vector", pack.vectors), ("label", pack.features)):
        yield from ((kind, text) for text in texts)

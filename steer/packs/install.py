"""Getting a pack from wherever it is into the store of installed ones, and checking one where it lies.

A pack is asked for as NAME or NAME@VERSION of a catalogue, as the path or address of an archive, as a directory, or as
hub:ORG/NAME[@REVISION]. Flow, in a hidden folder of the store: 1. of a catalogue, the index is read with its signature,
and a pack for another model is refused before it is downloaded; 2. the archive arrives, and its size and hash are
compared with the index; 3. it is unpacked, or the directory copied, with all that `steer.packs.archive` and `contents`
check; 4. name, version and content hash are compared with the index, the signature with the trusted keys, the model's
fingerprint with what was asked for; 5. one rename puts it in place. Nothing is loaded: not a tensor is read before all
this holds.

What is installed stays what it is: the same version with other content is refused, and one that was damaged meanwhile
is replaced. Left out: packs that need other packs, and removing one (`steer.packs.remove`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from activations.errors import ArtefactError, ConfigError, MismatchError
from activations.progress import Advance, progress
from steer.manifest import SIGNATURE, read_manifest, verify_files
from steer.packs.archive import FRAME_BYTES, unpack_archive
from steer.packs.catalogue import find_pack, read_catalogue
from steer.packs.contents import SIGNATURE_BYTES, copy_pack, damaged, declared_files, models_of, read_small
from steer.packs.disk import check_room, explained, locked, place, staging, write_hashed, write_whole
from steer.packs.hub import HUB, pull
from steer.packs.index_file import IndexedPack
from steer.packs.installed import resolve, store
from steer.packs.keys import trusted_keys
from steer.packs.names import ARCHIVE_SUFFIX, name_of, parse_pack_name, printable
from steer.packs.signature import Signed, check_signature, require_trusted
from steer.packs.web import inside, is_web, local_path, parts_of, shown

Status = Callable[[str], None]


class Checked(NamedTuple):
    """A pack all of whose files are what its manifest says."""

    manifest: dict[str, Any]
    signed: Signed


class Installed(NamedTuple):
    """What `install` did."""

    path: Path
    name: str
    version: str
    content_sha256: str
    signed: Signed
    is_new: bool
    """False: this content was there"""
    index_signed: Signed | None
    """what is to be thought of the index that it was found in, if it was"""


def install(
    pack: str,
    *,
    catalogue: str | None = None,
    model: str | None = None,
    require_signature: bool = False,
    on_status: Status = lambda line: None,
) -> Installed:
    """Install a pack; see the module docstring.

    Args:
      pack: what is asked for.
      catalogue: path or address of the catalogue that NAME is looked up in.
      model: spec of the model that it has to be for; None: any.
      require_signature: refuse what no trusted key has signed.
    Raises: ArtefactError of the kind that fits, EndpointError, ConfigError, UnknownNameError, StorageError.
    """
    fingerprint = None if model is None else _fingerprint_of(model, on_status)
    folder = store()
    with explained(folder), staging(folder) as staged:
        checked, index = _fetch(pack, catalogue, fingerprint, staged, on_status)
        where = shown(pack)
        if require_signature:
            require_trusted(where, checked.signed)
        if fingerprint is not None:
            _check_model(where, models_of(where, checked.manifest), fingerprint)
        name, version = name_of(where, checked.manifest)
        with locked(folder):
            is_new = _put(staged / "pack", folder / name / version, checked.manifest["content_sha256"])
        sha256 = checked.manifest["content_sha256"]
        return Installed(folder / name / version, name, version, sha256, checked.signed, is_new, index)


def verify(
    pack: str, *, model: str | None = None, require_signature: bool = False, on_status: Status = lambda line: None
) -> Checked:
    """Check every file and the signature of a pack: a directory, an archive, or NAME[@VERSION] of an installed one.

    Args and errors as of `install`.
    """
    path = resolve(pack)
    if path.name.endswith(ARCHIVE_SUFFIX):
        with TemporaryDirectory(prefix="saekit-") as folder:
            manifest = unpack_archive(path, Path(folder, "pack"))
            signed = check_signature(path, Path(folder, "pack"), manifest, trusted_keys())
    else:
        with explained(path):
            manifest = read_manifest(path)
            declared_files(path, manifest)
            verify_files(path, manifest)
        signed = check_signature(path, path, manifest, trusted_keys())
    if require_signature:
        require_trusted(path, signed)
    if model is not None:
        _check_model(path, models_of(path, manifest), _fingerprint_of(model, on_status))
    return Checked(manifest, signed)


def _fetch(
    pack: str, catalogue: str | None, fingerprint: str | None, staged: Path, on_status: Status
) -> tuple[Checked, Signed | None]:
    """Get a pack from wherever it is into the folder `pack` of `staged`, and check it; and who signed its index."""
    target, where, index = staged / "pack", shown(pack), None
    if pack.startswith(HUB):
        manifest = pull(pack, target, on_status)
    elif is_web(pack) or pack.endswith(ARCHIVE_SUFFIX):
        manifest = unpack_archive(_archive(pack, staged, on_status), target, where)
    elif (path := local_path(pack)).is_dir():
        manifest = copy_pack(path, target)
    else:
        where, manifest, index = _from_catalogue(pack, catalogue, fingerprint, staged, on_status)
    return Checked(manifest, check_signature(where, target, manifest, trusted_keys())), index


def _from_catalogue(
    pack: str, catalogue: str | None, fingerprint: str | None, staged: Path, on_status: Status
) -> tuple[str, dict[str, Any], Signed]:
    wanted = parse_pack_name(pack)
    if wanted is None or catalogue is None:
        expected = f"NAME[@VERSION] with a catalogue, a directory, {HUB}ORG/NAME, or an archive {ARCHIVE_SUFFIX}"
        fix = "Check the path, or say --set catalogue=PATH."
        raise ConfigError(f"pack '{shown(pack)}'", expected=expected, got="nothing there", fix=fix)
    packs, signed = read_catalogue(catalogue)
    entry = find_pack(catalogue, packs, wanted)
    where = f"{shown(catalogue)}: {entry.name} {entry.version}"
    if fingerprint is not None:
        _check_model(where, {model.fingerprint: model.id for model in entry.models}, fingerprint)
    archive = _archive(inside(catalogue, entry.file), staged, on_status, entry)
    manifest = unpack_archive(archive, staged / "pack", where)
    found = (*name_of(where, manifest), manifest["content_sha256"])
    if found != (entry.name, entry.version, entry.content_sha256):
        got = f"{found[0]} {found[1]} of content {found[2][:12]}"
        raise damaged(where, f"the pack that the index names, of content {entry.content_sha256[:12]}", got)
    return where, manifest, signed


def _archive(place: str, staged: Path, on_status: Status, entry: IndexedPack | None = None) -> Path:
    """The archive at a path or an address, on this disk; of an index's entry, of the size and the hash that it says."""
    path = staged / f"archive{ARCHIVE_SUFFIX}"
    if entry is None:
        if not is_web(place):
            return local_path(place)
        on_status(f"downloading {shown(place)}")
        write_hashed(path, parts_of(place, FRAME_BYTES))
        return path
    check_room(staged, entry.bytes)
    bar = progress(entry.file, entry.bytes, "bytes") if is_web(place) else nullcontext(lambda n_bytes: None)
    with bar as advance:
        sha256 = write_hashed(path, _told(parts_of(place, entry.bytes), advance))
    if sha256 != entry.sha256:
        raise damaged(shown(place), f"the archive that the index names, {entry.sha256[:12]}", sha256[:12])
    return path


def _told(parts: Iterable[bytes], advance: Advance) -> Iterator[bytes]:
    for part in parts:
        yield part
        advance(len(part))


def _put(staged: Path, target: Path, content_sha256: str) -> bool:
    """Under the store's lock: the pack in place, unless it is there. Returns whether it is new."""
    try:
        known = read_manifest(target)
        verify_files(target, known)
    except ArtefactError:  # not there, or damaged: nothing that is worth keeping
        place(staged, target)
        return True
    if known["content_sha256"] != content_sha256:
        expected, fix = "the content that is installed as this version", f"Remove {target} first, if you mean it."
        raise MismatchError(f"{target.parent.name} {target.name}", expected=expected, got="other content", fix=fix)
    signature = read_small(staged / SIGNATURE, SIGNATURE_BYTES)
    if signature is not None:
        write_whole(target / SIGNATURE, signature)
    return False


def _check_model(where: object, models: Mapping[str, str], fingerprint: str) -> None:
    """Raise MismatchError unless a pack has something for these weights; steering checks it again, of each vector."""
    if fingerprint not in models:
        expected = f"a pack for the weights {fingerprint[:12]}"
        got = printable(", ".join(f"{name} {of[:12]}" for of, name in models.items()))[:300] or "one for no model"
        fix = "Get the pack for this model, or name the model that it is for."
        raise MismatchError(where, expected=expected, got=got, fix=fix)


def _fingerprint_of(model: str, on_status: Status) -> str:
    from activations.models import weight_fingerprint  # imports torch

    return weight_fingerprint(model, on_status)

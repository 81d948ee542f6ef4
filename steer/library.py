"""A library: steering vectors, labelled features and kits in one directory that can be checked, read and passed on.

    manifest.json        what the library is, its vectors, features and kits, and size and hash of every other file
    vectors.safetensors  one float32 unit direction a vector, by name, those of readers, and the weights of gates
    README.md, plots/    the same for people
    sae/                 optional: the SAE that the features are latents of

Flow of saving: 1. what is written is put together in memory; 2. each file is written beside its place and synced, the
manifest last; 3. all are renamed into place. What was stopped in between is finished by whoever opens it next. Loading
trusts nothing: sizes are compared before files are read, hashes before they are believed.

The content hash is that of the manifest, which has the hashes of all files, so that it covers everything; the same
content has the same bytes. Vectors that belong together, one a layer, are named NAME@HOOK_POINT, and found by NAME, as
those of a kit are by its name. Left out: signatures, archives and catalogues (`steer.packs`).
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from activations.errors import (
    ConfigError,
    CorruptArtefactError,
    MissingArtefactError,
    SaekitError,
    StorageError,
    UnknownNameError,
)
from activations.hook_points import HookPoint
from sae.artefact import file_sha256
from sae.checked_files import JSON_BYTES
from steer.library_card import card, plots
from steer.library_entries import entry_of_vector, vector_of_entry
from steer.pack import About, Feature, FileRef, Kit, SaeRef, as_json
from steer.packs.installed import check_own, resolve
from steer.vectors import SteeringVector

FORMAT = "saekit-library-4"
MANIFEST, VECTORS, CARD, SIGNATURE = "manifest.json", "vectors.safetensors", "README.md", "signature.json"
SAE = "sae"
"""directory of the SAE in a library"""
PARTIAL = ".partial"
FILE_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]{0,63}/){0,2}[A-Za-z0-9_][A-Za-z0-9_-]{0,63}\.[a-z0-9]{1,16}")
"""what files of a library may be called: at most two directories deep, and nothing that a system takes specially"""


@dataclass(frozen=True)
class Library:
    """What a library holds."""

    vectors: dict[str, SteeringVector] = field(default_factory=dict)
    about: About = field(default_factory=About)
    features: list[Feature] = field(default_factory=list)
    kits: list[Kit] = field(default_factory=list)
    sae: SaeRef | None = None
    attached: dict[str, FileRef] = field(default_factory=dict)
    """files that are kept as they are, by relative path: those of the SAE"""

    @classmethod
    def open(cls, path: str | Path) -> "Library":
        """Read the library at `path`, or the installed one of that name; of attached files only that they are named.

        Raises: MissingArtefactError if there is none, StorageError if it cannot be read, CorruptArtefactError if it is
          damaged or was changed by hand.
        """
        path = resolve(path)
        manifest = read_manifest(path)
        arrays = _read_arrays(path, manifest)
        gates: dict[Any, Any] = {}
        try:
            if not all(isinstance(manifest[key], list) for key in ("vectors", "features", "kits")):
                raise TypeError("vectors, features and kits are lists")
            return cls(
                vectors={entry["name"]: vector_of_entry(entry, arrays, gates) for entry in manifest["vectors"]},
                about=About.model_validate(manifest["about"]),
                features=[Feature.model_validate(each) for each in manifest["features"]],
                kits=[Kit.model_validate(each) for each in manifest["kits"]],
                sae=None if manifest["sae"] is None else SaeRef.model_validate(manifest["sae"]),
                attached={
                    name: FileRef.model_validate(each)
                    for name, each in manifest["files"].items()
                    if name.startswith(f"{SAE}/")
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise damaged(path, _first_problem(error)) from error

    def save(self, path: Path) -> str:
        """Write the library to `path` and return its content hash; attached files must be there already.

        Raises: ConfigError for names that do not fit together, a gate that cannot be kept, or a library that is
          installed, before anything is written; StorageError.
        """
        self.check()
        check_own(path)
        arrays: dict[str, np.ndarray] = {}
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "about": as_json(self.about),
            "sae": None if self.sae is None else as_json(self.sae),
            "features": [as_json(each) for each in sorted(self.features, key=lambda each: each.latent)],
            "kits": [as_json(each) for each in sorted(self.kits, key=lambda each: each.name)],
            "vectors": [entry_of_vector(vector, arrays) for vector in self.vectors.values()],
        }
        files = {VECTORS: save_tensors(arrays), CARD: card(self).encode()} | plots(self)
        refs = {name: as_json(FileRef(bytes=len(data), sha256=_sha256(data))) for name, data in files.items()}
        refs |= {name: as_json(ref) for name, ref in self.attached.items()}
        manifest["files"] = {name: refs[name] for name in sorted(refs)}
        manifest["content_sha256"] = content_hash(manifest)
        _remove_signature(path)
        _write(path, files | {MANIFEST: _by_lines(manifest).encode()})
        return manifest["content_sha256"]

    def check(self) -> None:
        """Raise ConfigError if a kit or a feature names what is not there, or two things have one name."""
        known = {*self.vectors, *(group_name(name) for name in self.vectors)}
        for kit in self.kits:
            for name in kit.vectors.keys() - known:
                fix = "Add it, or leave it out."
                raise ConfigError(f"kit '{kit.name}'", expected="vectors of this library", got=f"'{name}'", fix=fix)
        names = [*known, *(kit.name for kit in self.kits)]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"'{name}'", expected="one thing of this name", got="several", fix="Rename one.")
        latents = [feature.latent for feature in self.features]
        if len(set(latents)) < len(latents) or (latents and self.sae is None):
            fix = "Add features with saekit library add."
            raise ConfigError("features", expected="one a latent, of one SAE", got="others", fix=fix)

    def find(self, path: str | Path, name: str | None) -> list[SteeringVector]:
        """The vector of this name, or those of NAME@HOOK_POINT in the order of a pass, or those of a kit at its
        coefficients; the first if there is no name.

        Raises: UnknownNameError listing the names there are.
        """
        if name is None:
            name = group_name(next(iter(self.vectors), ""))
        for kit in self.kits:
            if kit.name == name:
                return [
                    replace(vector, coefficient=factor * vector.coefficient)
                    for each, factor in kit.vectors.items()
                    for vector in self.find(path, each)
                ]
        return _of_name(self.vectors, name) or [named(self.vectors, path, name)]


def save_library(path: Path, vectors: Sequence[SteeringVector]) -> str:
    """Write `vectors` as those of the library at `path`, and return its content hash; the rest of it is kept.

    Raises: as `Library.save` does.
    """
    library = Library.open(path) if (path / MANIFEST).exists() else Library()
    return replace(library, vectors={vector.name: vector for vector in vectors}).save(path)


def load_library(path: str | Path) -> dict[str, SteeringVector]:
    """The vectors of the library at `path`, by name. Raises: as `Library.open` does."""
    return Library.open(path).vectors


def find_vector(path: str | Path, name: str | None) -> SteeringVector:
    """One vector of a library, its first if no name is given. Raises: UnknownNameError listing the names there are."""
    vectors = load_library(path)
    return named(vectors, path, next(iter(vectors), "") if name is None else name)


def find_vectors(path: str | Path, name: str | None) -> list[SteeringVector]:
    """As `Library.find` in the library at `path`."""
    return Library.open(path).find(path, name)


def named(vectors: Mapping[str, SteeringVector], path: str | Path, name: str) -> SteeringVector:
    """One of the vectors that were read from `path`. Raises: UnknownNameError listing the names there are."""
    if name not in vectors:
        expected = f"one of {', '.join(vectors)}"
        raise UnknownNameError(f"{path}: vector '{name}'", expected=expected, got=f"'{name}'", fix="Correct the name.")
    return vectors[name]


def group_name(name: str) -> str:
    """What vectors NAME@HOOK_POINT that belong together are called; of any other name, itself."""
    return name.partition("@")[0]


def grouped(vectors: Mapping[str, SteeringVector]) -> dict[str, list[SteeringVector]]:
    """By name, what `Library.find` finds of it: vectors NAME@HOOK_POINT under NAME, unless another is called so."""
    names = dict.fromkeys(name if group_name(name) in vectors else group_name(name) for name in vectors)
    return {name: _of_name(vectors, name) for name in names}


def _of_name(vectors: Mapping[str, SteeringVector], name: str) -> list[SteeringVector]:
    if name in vectors:
        return [vectors[name]]
    parts = [vector for each, vector in vectors.items() if each.startswith(f"{name}@")]
    return sorted(parts, key=lambda vector: HookPoint.parse(vector.hook_point).depth)


# --- files -----------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the library at `path`, whose format and hash are right and whose files are named as files may be.

    Raises: as `Library.open` does.
    """
    try:
        return _checked(path, _read(path / MANIFEST, JSON_BYTES))
    except CorruptArtefactError:
        if not _finish(path):
            raise
        return _checked(path, _read(path / MANIFEST, JSON_BYTES))


def parse_manifest(where: str | Path, content: bytes) -> dict[str, Any]:
    """The same from the bytes of one. Raises: CorruptArtefactError."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(where, "a manifest that is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise damaged(where, "another format")
    if manifest.get("content_sha256") != content_hash(manifest):
        raise damaged(where, "content that does not match its hash")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_may_be_called, files)):
        raise damaged(where, "files with names that files may not have")
    try:
        for each in files.values():
            FileRef.model_validate(each)
    except ValidationError as error:
        raise damaged(where, _first_problem(error)) from error
    return manifest


def content_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without it, as JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in manifest.items() if key != "content_sha256"}
    return _sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def verify_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file that a manifest names with its size and hash.

    Raises: CorruptArtefactError for the first that is missing, no regular file, or another.
    """
    for name, ref in manifest["files"].items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise damaged(path, f"no file {name}")
        if file.stat().st_size != ref["bytes"] or file_sha256(file) != ref["sha256"]:
            raise damaged(path, f"a file {name} that does not match its hash")


def damaged(path: str | Path, got: str) -> CorruptArtefactError:
    """The error for a library that is not what it should be."""
    return CorruptArtefactError(path, expected="an intact library", got=got, fix="Get it again from where it came.")


def _may_be_called(name: str) -> bool:
    """Whether it is a path of plain words that means the same on every system, and stays in its directory."""
    return bool(FILE_NAME.fullmatch(name)) and name not in (MANIFEST, SIGNATURE)


def _checked(path: Path, content: bytes) -> dict[str, Any]:
    manifest = parse_manifest(path, content)
    ref = manifest["files"].get(VECTORS)
    if ref is None:
        raise damaged(path, f"no {VECTORS}")
    data = _read(path / VECTORS, ref["bytes"])
    if len(data) != ref["bytes"] or _sha256(data) != ref["sha256"]:
        raise damaged(path, f"a file {VECTORS} that does not match its hash")
    return manifest


def _read_arrays(path: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        return load_tensors(_read(path / VECTORS, manifest["files"][VECTORS]["bytes"]))
    except (SafetensorError, ValueError, KeyError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def _read(file: Path, most: int) -> bytes:
    try:
        if file.stat().st_size > most:
            raise damaged(file.parent, f"a {file.name} of more than {most} bytes")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise MissingArtefactError(
            file.parent, expected="a library", got=f"no {file.name}", fix="Make one with: saekit vector make"
        ) from error
    except OSError as error:
        fix = "See who may read it."
        raise StorageError(
            file.parent, expected="a library that can be read", got=str(error.strerror), fix=fix
        ) from error


def _write(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files beside their places, the last of them last, and rename them in that order."""
    try:
        for name, data in files.items():
            target = path / (name + PARTIAL)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            (path / (name + PARTIAL)).replace(path / name)
    except OSError as error:
        fix = "Check the place and its free space."
        raise StorageError(path, expected="a library that can be written", got=str(error.strerror), fix=fix) from error


def _remove_signature(path: Path) -> None:
    """Before a library changes: a signature of what it was would say of what it is that somebody tampered with it."""
    try:
        (path / SIGNATURE).unlink(missing_ok=True)
    except OSError as error:
        fix = "Check the place."
        raise StorageError(path, expected="a library that can be written", got=str(error.strerror), fix=fix) from error


def _finish(path: Path) -> bool:
    """Finish a saving that was stopped while it renamed; whether there was one, and it was whole."""
    partial = path / (MANIFEST + PARTIAL)
    try:
        manifest = parse_manifest(path, _read(partial, JSON_BYTES))
        waiting = [name for name in manifest["files"] if (path / (name + PARTIAL)).is_file()]
        for name, ref in manifest["files"].items():
            file = path / (name + PARTIAL if name in waiting else name)
            if not file.is_file() or file_sha256(file) != ref["sha256"]:
                return False
        for name in [*waiting, MANIFEST]:
            (path / (name + PARTIAL)).replace(path / name)
    except (SaekitError, OSError):
        return False
    return True


def _by_lines(manifest: Mapping[str, Any]) -> str:
    """As JSON with a line for each vector, feature, kit and file, so that versions can be compared line by line."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def block(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(map(line, value)) + "\n]"
        if isinstance(value, dict) and value:
            return "{\n" + ",\n".join(f"{line(key)}: {line(each)}" for key, each in value.items()) + "\n}"
        return line(value)

    return "{\n" + ",\n".join(f"{line(key)}: {block(value)}" for key, value in manifest.items()) + "\n}\n"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}"

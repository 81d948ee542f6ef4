"""A library: steering vectors, labelled features and kits in one directory that can be checked, read and passed on.

    manifest.json        what the library is, its vectors, features and kits, and size and hash of every other file
    vectors.safetensors  one float32 unit direction a vector, by name, those of readers, and the weights of gates
    README.md, plots/    the same for people
    sae/                 optional: the SAE that the features are latents of

Saving puts everything together in memory and replaces the files in one go. Loading trusts nothing: sizes are compared
before files are read, hashes before they are believed. The same content has the same bytes. Vectors that belong
together, one a layer, are named NAME@HOOK_POINT, and found by NAME, as those of a kit are by its name.

Left out: files and hashes (`steer.manifest`), signatures, archives and catalogues (`steer.packs`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from activations.errors import ConfigError, UnknownNameError
from activations.hook_points import HookPoint
from steer.library_card import card, plots
from steer.library_entries import entry_of_vector, vector_of_entry
from steer.manifest import (
    CARD,
    FORMAT,
    MANIFEST,
    SAE,
    VECTORS,
    by_lines,
    content_hash,
    damaged,
    first_problem,
    read_library,
    remove_signature,
    sha256,
    write_files,
)
from steer.pack import About, Feature, FileRef, Kit, SaeRef, as_json
from steer.packs.installed import check_own, resolve
from steer.vectors import SteeringVector


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
        manifest, tensors = read_library(path)
        arrays = _read_arrays(path, tensors)
        gates: dict[Any, Any] = {}
        try:
            if not all(isinstance(manifest[key], list) for key in ("vectors", "features", "kits")):
                raise TypeError("vectors, features and kits are lists")
            vectors = {entry["name"]: vector_of_entry(entry, arrays, gates) for entry in manifest["vectors"]}
            if len(vectors) < len(manifest["vectors"]):
                raise ValueError("two vectors of one name")
            library = cls(
                vectors=vectors,
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
            library.check()
        except (
            KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, ConfigError,
        ) as error:  # fmt: skip
            raise damaged(path, first_problem(error)) from error
        return library

    @classmethod
    def open_or_new(cls, path: Path) -> "Library":
        """The library at `path` to be written, or an empty one if there is none.

        Raises: ConfigError for one that is installed; as `open` does, for one that is damaged.
        """
        check_own(path)
        return cls.open(path) if (path / MANIFEST).exists() else cls()

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
            "features": [as_json(each) for each in self._linked()],
            "kits": [as_json(each) for each in sorted(self.kits, key=lambda each: each.name)],
            "vectors": [entry_of_vector(vector, arrays) for vector in self.vectors.values()],
        }
        shown = replace(self, features=self._linked())
        files = {VECTORS: save_tensors(arrays), CARD: card(shown).encode()} | plots(shown)
        refs = {name: as_json(FileRef(bytes=len(data), sha256=sha256(data))) for name, data in files.items()}
        refs |= {name: as_json(ref) for name, ref in self.attached.items()}
        manifest["files"] = {name: refs[name] for name in sorted(refs)}
        manifest["content_sha256"] = content_hash(manifest)
        remove_signature(path)
        write_files(path, files | {MANIFEST: by_lines(manifest).encode()})
        return manifest["content_sha256"]

    def _linked(self) -> list[Feature]:
        """Features in order, each with the name of the vector that was made of its latent, if there is one."""
        own = None if self.sae is None else self.sae.sha256
        made = {
            latent: name
            for name, vector in self.vectors.items()
            if vector.source.get("sae_sha256") == own and isinstance(latent := vector.source.get("latent"), int)
        }
        ordered = sorted(self.features, key=lambda each: each.latent)
        return [each.model_copy(update={"vector": made.get(each.latent)}) for each in ordered]

    def check(self) -> None:
        """Raise ConfigError if a kit or a feature names what is not there, or two things have one name."""
        known = {*self.vectors, *(group_name(name) for name in self.vectors)}
        for kit in self.kits:
            for name in kit.vectors.keys() - known:
                fix = "Add it, or leave it out."
                raise ConfigError(f"kit '{kit.name}'", expected="vectors of this library", got=f"'{name}'", fix=fix)
        for name, n in Counter([*known, *(kit.name for kit in self.kits)]).items():
            if n > 1:
                raise ConfigError(f"'{name}'", expected="one thing of this name", got=n, fix="Rename one.")
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
                    for vector in _of_name(self.vectors, each)
                ]
        return _of_name(self.vectors, name) or [named(self.vectors, path, name)]


def save_library(path: Path, vectors: Sequence[SteeringVector]) -> str:
    """Write `vectors` as those of the library at `path`, and return its content hash; the rest of it is kept.

    Raises: as `Library.save` does.
    """
    return replace(Library.open_or_new(path), vectors={vector.name: vector for vector in vectors}).save(path)


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
    found: dict[str, list[SteeringVector]] = {}
    for name, vector in vectors.items():
        found.setdefault(name if group_name(name) in vectors else group_name(name), []).append(vector)
    return {name: _in_order(several) for name, several in found.items()}


def _of_name(vectors: Mapping[str, SteeringVector], name: str) -> list[SteeringVector]:
    if name in vectors:
        return [vectors[name]]
    return _in_order([vector for each, vector in vectors.items() if each.startswith(f"{name}@")])


def _in_order(vectors: list[SteeringVector]) -> list[SteeringVector]:
    return sorted(vectors, key=lambda vector: HookPoint.parse(vector.hook_point).depth)


def _read_arrays(path: Path, tensors: bytes) -> dict[str, np.ndarray]:
    try:
        return load_tensors(tensors)
    except (SafetensorError, ValueError, KeyError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error

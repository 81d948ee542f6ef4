"""What a browser shows: feature indexes by name, and libraries.

A folder stands for every index and library below it, two folders deep, and the features of a library are an index too,
unless the index of their SAE is opened as well. Left out: reading them (`sae.index_db`,
`steer.library`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from activations.errors import MissingArtefactError, SaekitError, UnknownNameError
from sae.index_db import FILE_NAME, FeatureIndex
from steer.library_index import index_of_library
from steer.packs.installed import resolve

MANIFEST = "manifest.json"
DEPTH = 2
"""folders below a given one that are searched"""


@dataclass(frozen=True)
class Source:
    """One feature index."""

    name: str
    """its hook point; with the folder's name behind it where several have the same"""
    path: Path
    index: FeatureIndex
    sae: Path | None
    """the SAE it was built from, if it is still where it was"""
    model: str | None = None
    """how the model is named that it was built with, for `load_model`"""
    store: str | None = None
    """the activation store that it was built from"""


@dataclass(frozen=True)
class Opened:
    """All that one browser shows."""

    sources: dict[str, Source]
    """by name"""
    libraries: tuple[Path, ...]

    def source(self, name: str) -> Source:
        """A source by name. Raises: UnknownNameError."""
        if name not in self.sources:
            known = ", ".join(self.sources) or "none"
            raise UnknownNameError("source", expected=f"one of {known}", got=repr(name), fix="Choose one.")
        return self.sources[name]

    def close(self) -> None:
        """Release the databases."""
        for source in self.sources.values():
            source.index.close()


def open_paths(paths: Sequence[Path]) -> Opened:
    """Open every index and find every library in some folders.

    Raises: MissingArtefactError for a folder that holds neither; as FeatureIndex.open does for a damaged index.
    """
    indexes: dict[Path, FeatureIndex] = {}
    libraries: list[Path] = []
    for path in map(resolve, paths):
        found = list(_artefacts(path, DEPTH)) if path.is_dir() else []
        if not found:
            fix = "Make one with: saekit index, or saekit demo"
            raise MissingArtefactError(path, expected="a feature index or a library", got="none in it", fix=fix)
        for folder in found:
            if (folder / FILE_NAME).is_file():
                indexes[folder] = FeatureIndex.open(folder)
            elif folder not in libraries:
                libraries.append(folder)
    whole = {index.info.get("sae_sha256") for index in indexes.values()}
    for own in filter(None, map(_index_of, libraries)):
        index = FeatureIndex.open(own)
        if index.info.get("sae_sha256") in whole:
            index.close()
        else:
            indexes[own] = index
    return Opened(_named(indexes), tuple(libraries))


def _index_of(library: Path) -> Path | None:
    """The index of its features; none if it has none, or is damaged, which the bench says of it."""
    try:
        return index_of_library(library)
    except SaekitError:
        return None


def _artefacts(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / FILE_NAME).is_file() or (folder / MANIFEST).is_file():
        yield folder
    elif depth > 0:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.is_symlink():
                yield from _artefacts(child, depth - 1)


def _named(indexes: dict[Path, FeatureIndex]) -> dict[str, Source]:
    points = {folder: str(index.info.get("hook_point", folder.name)) for folder, index in indexes.items()}
    times = Counter(points.values())
    sources: dict[str, Source] = {}
    for folder, index in indexes.items():
        name = points[folder] if times[points[folder]] == 1 else f"{points[folder]}@{folder.name}"
        while name in sources:
            name += "'"
        sources[name] = Source(name, folder, index, *_made_from(folder))
    return sources


def _made_from(folder: Path) -> tuple[Path | None, str | None, str | None]:
    """SAE, model and store that the index's own config names."""
    try:
        config = yaml.safe_load((folder / "index.yaml").read_text())
        sae, *others = Path(config["sae"]), config.get("model"), config.get("store")
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError):
        return None, None, None
    model, store = (each if isinstance(each, str) else None for each in others)
    return sae if (sae / "cfg.json").is_file() else None, model, store

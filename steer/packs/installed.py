"""Packs that are installed on this machine, by name and version.

They are in the folder that `SAEKIT_LIBRARIES` names, else in `saekit/libraries` of `$XDG_DATA_HOME` or
`~/.local/share`, each as NAME/VERSION, which is a library like any other; those that come with saekit are in SHIPPED.
Wherever a library is asked for, NAME or NAME@VERSION stands for one of them, unless there is a path of that name. Left
out: how they get there (`steer.packs.install`).
"""

import os
from importlib import resources
from pathlib import Path

from activations.errors import ConfigError, MissingArtefactError
from steer.packs.disk import explained
from steer.packs.names import is_pack_name, is_version, newest, parse_pack_name, version_order

SHIPPED = Path(str(resources.files("steer") / "data" / "libraries"))
"""those that come with saekit"""


def store() -> Path:
    """Where installed packs are."""
    chosen = os.environ.get("SAEKIT_LIBRARIES")
    if chosen:
        return Path(chosen).expanduser()
    return data_folder() / "libraries"


def data_folder() -> Path:
    """Where saekit keeps what belongs to a user."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "saekit"


def versions(name: str) -> dict[str, Path]:
    """Version -> directory of what is installed of a pack, oldest first."""
    found = [path for folder in (SHIPPED, store()) for path in entries(folder / name) if is_version(path.name)]
    there = [path for path in found if (path / "manifest.json").is_file()]
    return {path.name: path for path in sorted(there, key=lambda path: version_order(path.name))}


def installed() -> dict[str, dict[str, Path]]:
    """Name -> version -> directory of all that is installed."""
    names = sorted({path.name for folder in (SHIPPED, store()) for path in entries(folder) if is_pack_name(path.name)})
    return {name: found for name in names if (found := versions(name))}


def entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing if there is none."""
    return list(folder.iterdir()) if folder.is_dir() else []


def resolve(library: str | Path) -> Path:
    """The directory that a path, or the NAME or NAME@VERSION of an installed pack, stands for.

    A path that exists is itself, and so is what is neither: whoever opens it says that it is not there.

    Raises: MissingArtefactError if other versions of the pack are installed, but not this one.
    """
    path = Path(library)
    wanted = parse_pack_name(str(library))
    if wanted is None or os.path.exists(path):
        return path
    with explained(store()):
        found = versions(wanted.name)
    if not found:
        return path
    version = wanted.version or newest(found)
    if version not in found:
        fix = f"Install it with: saekit library install --set pack={wanted}"
        raise MissingArtefactError(f"pack {wanted}", expected=f"one of {', '.join(found)}", got=f"'{version}'", fix=fix)
    return found[version]


def check_own(library: str | Path) -> None:
    """Raise ConfigError for a library that is installed, which stays what it is, as its name and version say."""
    path = resolve(library)
    here = path.absolute()
    if path != Path(library) or any(here.is_relative_to(folder.absolute()) for folder in (SHIPPED, store())):
        fix = f"Copy {path} to a folder of your own, and change that."
        raise ConfigError(library, expected="a library of your own to write", got="one that is installed", fix=fix)

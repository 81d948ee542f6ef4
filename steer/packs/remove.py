"""Taking an installed pack away.

Flow: 1. what is installed under the name is looked up, those that come with saekit left out; 2. under the store's lock
its folder is renamed into a hidden one, after which nobody finds it; 3. that is deleted. A pack that is damaged goes
the same way. Left out: taking a pack out of a catalogue, for which its file and its entry are removed by hand.
"""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from activations.disk import sync
from activations.errors import ConfigError, UnknownNameError
from steer.packs import installed
from steer.packs.disk import explained, locked, staging
from steer.packs.installed import entries, store
from steer.packs.names import is_pack_name, is_version, newest, parse_pack_name, printable, version_order


class Removed(NamedTuple):
    """What `remove` took away."""

    name: str
    version: str
    path: Path


def find_installed(pack: str) -> Removed:
    """The installed pack that NAME or NAME@VERSION says.

    Raises: ConfigError for what is no such name, one that comes with saekit, and NAME where there are several versions;
      UnknownNameError listing what is installed.
    """
    wanted = parse_pack_name(pack)
    if wanted is None:
        fix = "See saekit library list."
        raise ConfigError(f"pack '{printable(pack)[:200]}'", expected="NAME or NAME@VERSION", got="another", fix=fix)
    with explained(store()):
        found, shipped = _versions(store() / wanted.name), _versions(installed.SHIPPED / wanted.name)
    if wanted.version is None and len(found) > 1:
        fix = f"Say which, as in {wanted.name}@{newest(found)}."
        raise ConfigError(f"pack {wanted}", expected="one version", got=", ".join(found), fix=fix)
    version = wanted.version or next(iter(found), None)
    if version in found:
        return Removed(wanted.name, version, store() / wanted.name / version)
    if shipped and version in (None, *shipped):
        fix = "It stays; what is installed under its name with a higher version comes before it."
        raise ConfigError(f"pack {wanted}", expected="one that was installed", got="one of saekit's own", fix=fix)
    there = found or sorted(path.name for path in entries(store()) if is_pack_name(path.name))
    expected, fix = f"one of {', '.join(there)}" if there else "something installed", "See saekit library list."
    raise UnknownNameError(f"pack {wanted}", expected=expected, got="nothing of that name", fix=fix)


def remove(pack: str) -> Removed:
    """Take an installed pack away. Raises: as `find_installed` does; StorageError."""
    folder = store()
    find_installed(pack)
    with explained(folder), staging(folder) as staged, locked(folder):
        found = find_installed(pack)
        found.path.rename(staged / "removed")
        with suppress(OSError):  # other versions of it are installed
            found.path.parent.rmdir()
        sync(folder)
    return found


def _versions(folder: Path) -> list[str]:
    """Oldest first."""
    return sorted((path.name for path in entries(folder) if is_version(path.name)), key=version_order)

"""Names of packs and their versions, names of files that cannot be beside each other, and what is fit to be shown.

What files of a library may be called says `steer.manifest`, and what a library may be called `steer.pack`. Here is what
is added where a pack comes from anybody: no name that Windows keeps for a device, no two names that differ in case
alone, and no file that is the folder of another. Left out: what is in the files.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from activations.errors import ConfigError, CorruptArtefactError
from steer.pack import NAME, VERSION, About

ARCHIVE_SUFFIX = ".tar.zst"
ARCHIVE_NAME = r"^[a-z0-9][a-z0-9._-]{0,120}\.tar\.zst$"
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


class PackName(NamedTuple):
    """A pack that somebody asks for."""

    name: str
    version: str | None
    """none: the newest that there is"""

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def is_device(file: str) -> bool:
    """Whether a part of a path is a name that Windows keeps for a device.

    >>> is_device("plots/aux.svg"), is_device("plots/auxiliary.svg")
    (True, False)
    """
    return any(_DEVICE.fullmatch(part) for part in file.split("/"))


def clash(names: Iterable[str]) -> str | None:
    """The first of `names` that is another one but for case, or is the folder of another; None if all can be written.

    >>> clash(["plots/a.svg", "Plots/a.svg"]), clash(["a", "a/b"]), clash(["a/b", "a/c"])
    ('Plots/a.svg', 'a', None)
    """
    spelt: dict[str, str] = {}
    files: set[str] = set()
    folders: set[str] = set()
    for name in names:
        parts = name.split("/")
        paths = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if name in files or any(spelt.setdefault(path.lower(), path) != path for path in paths):
            return name
        files.add(name)
        folders.update(paths[:-1])
    return min(files & folders, default=None)


def is_pack_name(name: str) -> bool:
    """Whether a pack may be called so."""
    return bool(re.fullmatch(NAME, name))


def is_version(version: str) -> bool:
    """Whether this is MAJOR.MINOR.PATCH."""
    return bool(re.fullmatch(VERSION, version))


def version_order(version: str) -> tuple[int, ...]:
    """A key that sorts versions by their numbers.

    >>> sorted(["1.10.0", "1.9.0", "2.0.0"], key=version_order)
    ['1.9.0', '1.10.0', '2.0.0']
    """
    return tuple(map(int, version.split(".")))


def newest(versions: Iterable[str]) -> str:
    """The highest of some versions."""
    return max(versions, key=version_order)


def parse_pack_name(text: str) -> PackName | None:
    """NAME or NAME@VERSION, or None for anything else."""
    name, at, version = text.partition("@")
    if not is_pack_name(name) or (at and not is_version(version)):
        return None
    return PackName(name, version if at else None)


def about_of(where: object, manifest: Mapping[str, Any]) -> About:
    """What a library says of itself. Raises: CorruptArtefactError if that cannot be read."""
    try:
        return About.model_validate(manifest.get("about"))
    except ValidationError as error:
        first = error.errors()[0]
        got = printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        fix = "Get it again from where it came."
        raise CorruptArtefactError(where, expected="a library that says what it is", got=got, fix=fix) from error


def name_of(where: object, manifest: Mapping[str, Any]) -> tuple[str, str]:
    """Name and version of a pack. Raises: ConfigError for a library that has not both; as `about_of` does."""
    about = about_of(where, manifest)
    if about.name is None or about.version is None:
        got = f"name {about.name!r} and version {about.version!r}"
        fix = "Give it both with: saekit library init"
        raise ConfigError(where, expected="a name and a version such as 1.0.0", got=got, fix=fix)
    return about.name, about.version


def printable(text: str) -> str:
    """The text without what moves a terminal's cursor, changes its colours, or ends a line."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)

"""Names in packs: those of files, of packs, and their versions; and what is fit to be shown.

A pack comes from anybody, and its files are written to this disk under the names that it gives. So a name is a relative
path in ASCII that means the same everywhere: no "..", no backslash, drive, NUL or leading dash, no name that Windows
keeps for a device, and no two names that differ in case alone. Versions are those of semver.org without build metadata,
which has no order. Left out: what is in the files.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from activations.errors import ConfigError

MANIFEST, SIGNATURE = "manifest.json", "signature.json"
ARCHIVE_SUFFIX = ".tar.zst"
NAME_CHARACTERS = 100
"""of the path of a file, and of the name of a pack with its version; what a tar header holds"""

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+=,-]*")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_PACK = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_NUMBER = r"(0|[1-9][0-9]{0,8})"
_WORD = r"(?:0|[1-9][0-9]{0,8}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-({_WORD}(?:\.{_WORD})*))?")


class PackName(NamedTuple):
    """A pack that somebody asks for."""

    name: str
    version: str | None
    """none: the newest"""

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def file_name_problem(name: str) -> str | None:
    """What is wrong with the path of a file in a pack, in words; None if nothing is.

    >>> file_name_problem("plots/joy@resid_post.12.svg")
    >>> file_name_problem("../.bashrc")
    'a part that is empty, starts with a dot or a dash, or has unusual letters'
    """
    if len(name) > NAME_CHARACTERS:
        return f"more than {NAME_CHARACTERS} characters"
    for part in name.split("/"):
        if not _PART.fullmatch(part) or part.endswith("."):
            return "a part that is empty, starts with a dot or a dash, or has unusual letters"
        if _DEVICE.fullmatch(part):
            return "a name that Windows keeps for a device"
    return None


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


def is_pack_name(name: object) -> bool:
    """Whether a pack may be called so: words of small letters and digits, with one of ``. _ -`` between them."""
    return isinstance(name, str) and len(name) <= NAME_CHARACTERS // 2 and bool(_PACK.fullmatch(name))


def is_version(version: object) -> bool:
    """Whether this is a version, such as 1.2.0 or 2.0.0-rc.1."""
    return isinstance(version, str) and len(version) <= NAME_CHARACTERS // 4 and bool(_VERSION.fullmatch(version))


def version_order(version: str) -> tuple[object, ...]:
    """A key that sorts versions as semver.org (11) says; a release comes behind all that lead up to it.

    >>> sorted(["1.10.0", "1.9.0", "1.10.0-rc.2", "1.10.0-rc.10", "1.10.0-rc"], key=version_order)
    ['1.9.0', '1.10.0-rc', '1.10.0-rc.2', '1.10.0-rc.10', '1.10.0']
    """
    found = _VERSION.fullmatch(version)
    assert found is not None, version
    words = found[4].split(".") if found[4] else []
    ordered = tuple((0, int(word), "") if word.isdigit() else (1, 0, word) for word in words)
    return int(found[1]), int(found[2]), int(found[3]), not words, ordered


def newest(versions: Iterable[str]) -> str:
    """The newest release, or, where there is none, the newest of what leads up to one."""
    versions = list(versions)
    return max([each for each in versions if "-" not in each] or versions, key=version_order)


def parse_pack_name(text: str) -> PackName | None:
    """NAME or NAME@VERSION, or None for anything else."""
    name, at, version = text.partition("@")
    if not is_pack_name(name) or (at and not is_version(version)):
        return None
    return PackName(name, version if at else None)


def named_version(where: object, manifest: dict[str, object]) -> tuple[str, str]:
    """Name and version of a manifest. Raises: ConfigError for a library that has none, and so is no pack."""
    name, version = manifest.get("name"), manifest.get("version")
    if not is_pack_name(name) or not is_version(version):
        raise ConfigError(
            where,
            expected="a name in small letters and a version such as 1.0.0",
            got=f"name {name!r} and version {version!r}",
            fix="Give it both with: saekit library init",
        )
    assert isinstance(name, str)
    assert isinstance(version, str)
    return name, version


def printable(text: str) -> str:
    """The text without what moves a terminal's cursor, changes its colours, or ends a line."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)

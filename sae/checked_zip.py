"""Zips that nobody vouches for, opened in memory that has a bound.

A zip ends with a list of its members, of any length, which is read in one piece before anything can be asked of it.
So: 1. reads are limited while a zip is opened; 2. of its members, kinds, names and sizes can be compared before one is
read. Whatever the standard library raises is left to the caller, who knows what the file should be. Left out: what the
members are.
"""

import io
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIST_BYTES = 4 << 20
"""the longest list of members that is read: some 40,000"""
STORED_OR_DEFLATED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 1
"""a bit of the flags"""


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip at `path`. Raises: OSError, and whatever a damaged file leads zipfile into."""
    with _Limited(path) as file, zipfile.ZipFile(file) as archive:
        file.most = None
        yield archive


def odd_member(archive: zipfile.ZipFile) -> str | None:
    """What keeps a zip from being a plain one, None if nothing: a link, a name that leads out of it, one name twice,
    an encrypted member, or a compression other than deflate."""
    names: set[str] = set()
    for member in archive.infolist():
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            return f"{member.filename[:80]!r}, a link or a device"
        if any(part in ("", ".", "..") for part in member.filename.removesuffix("/").split("/")) or any(
            letter in member.filename for letter in "\\:\0"
        ):
            return f"{member.filename[:80]!r}, a path that may lead elsewhere"
        if member.filename in names:
            return f"{member.filename[:80]!r} twice"
        if member.flag_bits & ENCRYPTED or member.compress_type not in STORED_OR_DEFLATED:
            return f"{member.filename[:80]!r}, encrypted or compressed by another method"
        names.add(member.filename)
    return None


class _Limited(io.FileIO):
    """A file of which no more than `most` bytes are read at once."""

    most: int | None = LIST_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is None:
            return super().read(size) or b""
        content = super().read(self.most + 1 if size is None or size < 0 else min(size, self.most + 1)) or b""
        if len(content) > self.most:
            raise zipfile.BadZipFile(f"a list of members of more than {self.most} bytes")
        return content

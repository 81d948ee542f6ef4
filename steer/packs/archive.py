"""A pack as one file, NAME-VERSION.tar.zst, the same bytes wherever and whenever it is written.

    manifest.json, signature.json if there is one, then the listed files by name, each behind a plain ustar header:
    mode 0644, time 0, owner 0; two blocks of zeros; one zstd frame that says how long all this is, with a checksum

Writing: 1. the manifest is read and compared with its hash; 2. each file goes in while its size and hash are compared.
Reading, in which nothing is believed: 1. the blocks of the frame are counted, so that a file that was cut, or has
something behind it, is refused before it is decompressed; 2. length and window of the frame are compared with limits;
3. the manifest comes first and is checked; 4. it determines every byte that is not content: each header has to be
exactly that of the next listed file. So links, devices, other paths, a second file of a name, files that nobody listed,
and sizes that are not true cannot be in an archive; 5. hashes are compared while the files are written into a folder
that nobody reads yet.

Any tar that knows zstd unpacks these archives; those that it writes are no packs. Left out: signatures
(`steer.packs.signature`), and where archives come from and go to (`steer.packs.catalogue`). The bytes depend on the
version of libzstd; the content hash does not.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from activations.errors import MissingArtefactError
from sae.checked_files import JSON_BYTES
from steer.manifest import MANIFEST, SIGNATURE, parse_manifest
from steer.packs.contents import (
    BLOCK,
    FILE_BYTES,
    N_FILES,
    PACK_BYTES,
    SIGNATURE_BYTES,
    damaged,
    declared_files,
    file_parts,
    read_small,
)
from steer.packs.disk import check_room, explained, write_hashed, written_whole
from steer.packs.names import ARCHIVE_SUFFIX, name_of

TAR_BLOCK = tarfile.BLOCKSIZE
LEVEL = 10
WINDOW_LOG = 23
"""log2 of how many bytes a decompressor has to keep: 8 MiB"""
FRAME_BYTES = PACK_BYTES + JSON_BYTES + (N_FILES + 4) * 2 * TAR_BLOCK
"""what an archive may unpack to"""
MAGIC = b"\x28\xb5\x2f\xfd"
UNUSED_BITS = 0b11000
"""of the byte behind that, which a decompressor may pass over (RFC 8878, 3.1.1.1.1)"""
KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.DIRTYPE: "a folder",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


def write_archive(directory: Path, file: Path, signature: bytes | None = None) -> dict[str, Any]:
    """Write the pack in `directory` as the archive `file`, all at once, and return its manifest.

    Args:
      signature: content of its signature.json; None: that of the directory, if it has one.
    Raises: ConfigError for a library without name or version; CorruptArtefactError if a file is not as listed.
    """
    content = read_small(directory / MANIFEST, JSON_BYTES)
    if content is None:
        fix = "Make one with: saekit vector make"
        raise MissingArtefactError(directory, expected="a library", got=f"no {MANIFEST}", fix=fix)
    manifest = parse_manifest(directory, content)
    name_of(directory, manifest)
    declared = declared_files(directory, manifest)
    small = {MANIFEST: content}
    signature = read_small(directory / SIGNATURE, SIGNATURE_BYTES) if signature is None else signature
    if signature is not None:
        small[SIGNATURE] = signature
    sizes = {name: len(content) for name, content in small.items()} | {
        name: size for name, (size, _) in declared.items()
    }
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as raw:
            frame = _compressor().stream_writer(raw, size=_unpacked(sizes), closefd=False)
            for name, content in small.items():
                frame.write(_header(name, len(content)) + content + _padding(len(content)))
            for name, (size, sha256) in declared.items():
                _add(frame, directory / name, name, size, sha256)
            frame.write(bytes(2 * TAR_BLOCK))
            frame.close()
    return manifest


def unpack_archive(file: Path, target: Path, where: object = None) -> dict[str, Any]:
    """Unpack an archive that nobody vouches for into the new folder `target`, and return its manifest.

    The folder should be one that is not read before this returns.

    Args:
      where: what errors call the archive; None: the path of the file.
    Raises: MissingArtefactError, CorruptArtefactError whatever is wrong with the archive, DiskSpaceError.
    """
    where = where or file
    with explained(where), _opened(file) as raw:
        length = _checked_frame(where, raw)
        target.mkdir()
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << WINDOW_LOG)
        reader = _Reader(where, decompressor.stream_reader(raw, closefd=False), length)
        content = b"".join(reader.member(MANIFEST, at_most=JSON_BYTES))
        manifest = parse_manifest(str(where), content)
        (target / MANIFEST).write_bytes(content)
        declared = declared_files(where, manifest)
        check_room(target, sum(size for size, _ in declared.values()))
        if reader.next_name == SIGNATURE:
            write_hashed(target / SIGNATURE, reader.member(SIGNATURE, at_most=SIGNATURE_BYTES))
        for name, (size, sha256) in declared.items():
            if write_hashed(target / name, reader.member(name, exactly=size)) != sha256:
                raise damaged(f"{where}: {name}", "the content that the manifest has the hash of", "other content")
        reader.end()
    return manifest


class _Reader:
    """The members of a decompressed archive, one behind the other, none of which may be other than it has to be."""

    def __init__(self, where: object, source: zstandard.ZstdDecompressionReader, length: int):
        self._where, self._source, self._left = where, source, length
        self._block = self._take(TAR_BLOCK)

    @property
    def next_name(self) -> str:
        """The name in the header that comes next, "" if it is none."""
        info = _parsed(self._block)
        return "" if info is None else info.name

    def member(self, name: str, *, at_most: int = FILE_BYTES, exactly: int | None = None) -> Iterator[bytes]:
        """The content of the next member, which has to be this file, in blocks."""
        info = _parsed(self._block)
        size = info.size if info is not None and exactly is None else exactly or 0
        if not 0 <= size <= at_most or self._block != _header(name, size):
            expected = f"{name}{'' if exactly is None else f' of {exactly} bytes'} as saekit packs it"
            raise damaged(self._where, expected, _described(self._block))
        left = size
        while left:
            part = self._take(min(left, BLOCK))
            left -= len(part)
            yield part
        if self._take(len(_padding(size))) != _padding(size):
            raise damaged(f"{self._where}: {name}", "zeros behind it", "something else")
        self._block = self._take(TAR_BLOCK)

    def end(self) -> None:
        """Check that nothing else follows."""
        if self._block != bytes(TAR_BLOCK):
            raise damaged(self._where, "the end, after the files that the manifest lists", _described(self._block))
        if self._take(TAR_BLOCK) != bytes(TAR_BLOCK) or self._left or self._read(1):
            raise damaged(self._where, "the end of the archive", "something behind it")

    def _take(self, n_bytes: int) -> bytes:
        if n_bytes > self._left:
            raise damaged(self._where, "as many bytes as its members have", "fewer")
        found = bytearray()
        while len(found) < n_bytes:
            part = self._read(n_bytes - len(found))
            if not part:
                raise damaged(self._where, "as many bytes as its frame says", "fewer")
            found += part
        self._left -= n_bytes
        return bytes(found)

    def _read(self, n_bytes: int) -> bytes:
        try:
            return self._source.read(n_bytes)
        except zstandard.ZstdError as error:
            raise damaged(self._where, "an intact zstd frame", str(error)) from error


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except FileNotFoundError as error:
        raise MissingArtefactError(file, expected="an archive", got="nothing there", fix="Check the path.") from error


def _checked_frame(where: object, raw: BinaryIO) -> int:
    """How long the one frame in a file unpacks to, by its header; the file is left at its start.

    The blocks of a frame are behind 3 bytes each (RFC 8878, 3.1.1.2) that say how long they are. Following them to the
    end finds what a decompressor passes over in silence: a cut checksum, and other frames behind this one.
    """
    head = raw.read(18)
    if not head.startswith(MAGIC) or (head[4:5] and head[4] & UNUSED_BITS):
        raise damaged(where, f"a pack, NAME-VERSION{ARCHIVE_SUFFIX}", "no zstd file")
    try:
        frame = zstandard.get_frame_parameters(head)
        raw.seek(zstandard.frame_header_size(head))
    except zstandard.ZstdError as error:
        raise damaged(where, "an intact zstd frame", str(error)) from error
    if not frame.has_checksum or frame.dict_id:
        raise damaged(where, "a zstd frame with a checksum and without a dictionary", "another")
    if not 0 < frame.content_size <= FRAME_BYTES:
        raise damaged(
            where, f"an archive that says how long it is, at most {FRAME_BYTES} bytes", f"{frame.content_size}"
        )
    if frame.window_size > 1 << WINDOW_LOG:
        raise damaged(where, f"a zstd window of at most {1 << WINDOW_LOG} bytes", f"{frame.window_size}")
    is_last = False
    while not is_last:
        block = int.from_bytes(raw.read(3).ljust(3, b"\1"), "little")
        is_last, is_repeated = bool(block & 1), (block >> 1) & 3 == 1
        raw.seek(1 if is_repeated else block >> 3, os.SEEK_CUR)
    end = raw.tell() + 4
    if (length := raw.seek(0, os.SEEK_END)) != end:
        raise damaged(where, f"a file of {end} bytes", f"one of {length}")
    raw.seek(0)
    return frame.content_size


def _compressor() -> zstandard.ZstdCompressor:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, window_log=WINDOW_LOG, write_content_size=1, write_checksum=1, write_dict_id=0, threads=0
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


def _unpacked(sizes: Mapping[str, int]) -> int:
    return sum(TAR_BLOCK + size + len(_padding(size)) for size in sizes.values()) + 2 * TAR_BLOCK


def _add(frame: zstandard.ZstdCompressionWriter, path: Path, name: str, size: int, sha256: str) -> None:
    frame.write(_header(name, size))
    state = hashlib.sha256()
    for part in file_parts(path, size):
        state.update(part)
        frame.write(part)
    if state.hexdigest() != sha256:
        raise damaged(path, "the content that the manifest has the hash of", "other content")
    frame.write(_padding(size))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % TAR_BLOCK)


def _parsed(block: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "ascii", "replace")
    except (tarfile.HeaderError, ValueError):
        return None


def _described(block: bytes) -> str:
    """What a header says, in words, for an error."""
    info = _parsed(block)
    if info is None:
        return "the end" if block == bytes(TAR_BLOCK) else "no tar header"
    kind = KINDS.get(info.type, "" if info.type == tarfile.REGTYPE else "another kind of member")
    return f"{f'{kind}, ' if kind else ''}{info.name[:200]!r} of {info.size} bytes and mode {info.mode & 0o7777:o}"

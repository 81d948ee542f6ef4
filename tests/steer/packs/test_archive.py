"""Archives: the same bytes each time, and nothing but a pack comes out of one."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import assume, given
from hypothesis import strategies as st

from activations.errors import ConfigError, CorruptArtefactError, DiskSpaceError, MissingArtefactError, SaekitError
from steer.packs import archive as archive_module
from steer.packs.archive import unpack_archive, write_archive
from steer.packs.names import clash, is_device
from tests.steer.packs.packs import FILES, manifest_of, tree, write_pack

Member = tuple[tarfile.TarInfo, bytes]
WORDS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", fullmatch=True)
NAMES = st.lists(WORDS, min_size=1, max_size=3).map(lambda words: "/".join(words) + ".svg")
CONTENTS = st.dictionaries(NAMES, st.binary(max_size=2000), max_size=6)


@given(CONTENTS, st.none() | st.binary(max_size=200))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], signature: bytes | None) -> None:
    assume(clash(files) is None and not any(map(is_device, files)))
    folder = tmp_path_factory.mktemp("packs")
    pack = write_pack(folder / "pack", files)
    manifest = write_archive(pack, folder / "a.tar.zst", signature)
    assert unpack_archive(folder / "a.tar.zst", folder / "again") == manifest
    expected = files | {"manifest.json": (pack / "manifest.json").read_bytes()}
    assert tree(folder / "again") == expected | ({} if signature is None else {"signature.json": signature})


def test_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    first, second = write_pack(tmp_path / "1"), write_pack(tmp_path / "2", dict(reversed(FILES.items())))
    shutil.copy(first / "manifest.json", second / "manifest.json")
    for number, path in enumerate(sorted(second.rglob("*"))):
        os.utime(path, (number, number))
        path.chmod(0o700)
    write_archive(first, tmp_path / "1.tar.zst")
    write_archive(second, tmp_path / "other" / "2.tar.zst")
    one, other = (tmp_path / "1.tar.zst").read_bytes(), (tmp_path / "other" / "2.tar.zst").read_bytes()
    assert one == other
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with tarfile.open(fileobj=io.BytesIO(zstandard.ZstdDecompressor().decompress(one))) as tar:
        assert tar.getnames() == ["manifest.json", *sorted(FILES)]
        heads = {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in tar}
    assert heads == {(0, 0, 0, "", "", 0o644)}


def test_the_programs_of_others_unpack_it(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    pack = make_pack()
    write_archive(pack, tmp_path / "a.tar.zst")
    tar = zstandard.ZstdDecompressor().decompress((tmp_path / "a.tar.zst").read_bytes())
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-x", "-C", tmp_path / "out"], input=tar, check=True)
    assert tree(tmp_path / "out") == {name: content for name, content in tree(pack).items() if name != "judge.jsonl"}


def test_a_pack_that_is_not_as_listed_is_not_written(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    target = tmp_path / "out" / "a.tar.zst"
    for number, (change, match) in enumerate(
        [
            (lambda pack: (pack / "README.md").write_bytes(b"# A pacK\n"), "other content"),
            (lambda pack: (pack / "README.md").write_bytes(b"# A longer pack\n"), "9 bytes"),
            (lambda pack: (pack / "README.md").unlink(), "README.md"),
            (lambda pack: ((pack / "README.md").rename(pack / "x"), (pack / "README.md").symlink_to("x")), "README"),
            (lambda pack: ((pack / "README.md").unlink(), os.mkfifo(pack / "README.md")), "something else"),
        ]
    ):
        pack = make_pack(f"pack{number}")
        change(pack)
        with pytest.raises(SaekitError, match=match):
            write_archive(pack, target)
        assert list(target.parent.iterdir()) == []
    with pytest.raises(ConfigError, match="init"):
        write_archive(make_pack("unnamed", name=None), target)


# --- archives that no writer of this project makes


def info(name: str, content: bytes = b"", **changes: Any) -> Member:
    """A member, plain but for `changes`."""
    made = tarfile.TarInfo(name)
    made.size, made.mode = len(content), 0o644
    for key, value in changes.items():
        setattr(made, key, value)
    return made, content


def members(files: dict[str, bytes] = FILES, **changes: Any) -> list[Member]:
    """Those that there should be, if nothing is changed."""
    manifest = json.dumps(manifest_of(files, **changes)).encode()
    return [info("manifest.json", manifest), *(info(name, content) for name, content in sorted(files.items()))]


def tar_of(parts: Iterable[Member], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    blocks = [head.tobuf(tar_format) + content + bytes(-len(content) % 512) for head, content in parts]
    return b"".join(blocks) + bytes(1024)


def frame_of(tar: bytes, **options: Any) -> bytes:
    options = {"write_checksum": True, "write_content_size": True} | options
    return zstandard.ZstdCompressor(**options).compress(tar)


def refused(
    tmp_path: Path, content: bytes, match: str | None = None, kind: type[SaekitError] = CorruptArtefactError
) -> None:
    """Unpacking fails in one line, and writes nothing outside its folder."""
    file = tmp_path / "hostile.tar.zst"
    file.write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(kind, match=match) as caught:
        unpack_archive(file, tmp_path / "out")
    assert "\x1b" not in str(caught.value)
    assert "hostile.tar.zst" in str(caught.value)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert tree(tmp_path) == before


def test_the_archives_made_here_are_right_but_for_what_is_put_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.tar.zst").write_bytes(frame_of(tar_of(members())))
    unpack_archive(tmp_path / "a.tar.zst", tmp_path / "out")
    assert {name: content for name, content in tree(tmp_path / "out").items() if name != "manifest.json"} == FILES


@pytest.mark.parametrize(
    "name",
    ["../evil", "/tmp/evil", "a/../../evil", "..\\evil", "C:\\evil", "c:evil", "a\0b", ".bashrc", "manifest.json",
     "Signature.json", "plots/EFFECTS.svg", "README.md/a.b", "plots", "nul.txt", "\x1b[2J", "-rf.x", "a b.c", "é.svg"],
)  # fmt: skip
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    refused(tmp_path, frame_of(tar_of(members({**FILES, name: b"evil"}))), "names")
    refused(tmp_path, frame_of(tar_of([*members(), info(name, b"evil")])), "the end, after the files|mode 644")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
                                  tarfile.FIFOTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE,
                                  tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])  # fmt: skip
def test_members_that_are_no_files(tmp_path: Path, kind: bytes) -> None:
    first, *rest = members()
    for position in (0, 1, len(rest)):
        for linked in ("../../evil", "manifest.json"):
            odd = info(sorted(FILES)[min(position, len(rest) - 1)], type=kind, linkname=linked)
            refused(
                tmp_path, frame_of(tar_of([first, *rest[:position], odd, *rest[position:]])), "as saekit packs it|end"
            )
            refused(tmp_path, frame_of(tar_of([odd, first, *rest])), "manifest.json as saekit")
            refused(
                tmp_path, frame_of(tar_of([first, *rest[:position], odd, *rest[position + 1 :]])), "saekit packs|end"
            )


def test_members_that_are_too_many_too_few_or_in_another_order(tmp_path: Path) -> None:
    first, *rest = members()
    for wrong in (
        [*rest, first],  # the manifest last
        rest,
        [first, first, *rest],
        [first, *rest, rest[0]],
        [first, rest[0], *rest],
        [first, *rest, info("extra", b"x")],
        [first, info("extra", b"x"), *rest],
        [first, *rest[1:]],
        [first, *rest[:-1]],
        [first, *reversed(rest)],
        [first, *rest, info("signature.json", b"{}")],
        [first, info("signature.json", bytes(5000)), *rest],
        [first, info("signature.json", b"{}"), info("signature.json", b"{}"), *rest],
        [],
    ):
        refused(tmp_path, frame_of(tar_of(wrong)))


def test_headers_that_say_more_than_they_need_to(tmp_path: Path) -> None:
    first, *rest = members()
    changes = [{"mode": 0o4755}, {"mtime": 1}, {"uid": 1}, {"uname": "root"}, {"linkname": "x"}]
    for change in changes:
        name, content = rest[0][0].name, rest[0][1]
        refused(tmp_path, frame_of(tar_of([first, info(name, content, **change), *rest[1:]])), "as saekit packs it")
    refused(tmp_path, frame_of(tar_of([first, *rest], tarfile.GNU_FORMAT)), "manifest.json as saekit")
    padded = bytearray(tar_of([first, *rest]))
    padded[512 + rest[0][0].size + first[0].size :][:0] = b""
    padded[512 + first[0].size] = 1
    refused(tmp_path, frame_of(bytes(padded)), "zeros behind it")


def test_sizes_that_are_not_true(tmp_path: Path) -> None:
    first, *rest = members()
    for size in (0, 1, rest[0][0].size + 1, 2**33 - 1):
        head = info(rest[0][0].name, size=size)[0]
        refused(tmp_path, frame_of(tar_of([first, (head, rest[0][1]), *rest[1:]])), "bytes as saekit|number field")
    huge = {"a.b": {"bytes": 2**60, "sha256": "0" * 64}}
    for files, match in [
        (huge, "below 8 GiB"),
        ({"a.b": {"bytes": -1, "sha256": "0" * 64}}, "bytes: "),
        ({"a.b": {"bytes": True, "sha256": "0" * 64}}, "bytes: "),
        ({"a.b": {"bytes": 1.0, "sha256": "0" * 64}}, "bytes: "),
        ({"a.b": {"bytes": 1, "sha256": "0" * 63}}, "sha256: "),
        ({"a.b": {"bytes": 1}}, "sha256: "),
        ({"a.b": None}, "hostile"),
        ([], "names"),
        ({f"f{n}.x": {"bytes": 2**33 - 1, "sha256": "0" * 64} for n in range(5)}, "32 GiB of files"),
        ({f"f{n}.x": {"bytes": 0, "sha256": "0" * 64} for n in range(10_001)}, "at most 10000"),
    ]:
        manifest = json.dumps(manifest_of({}, files=files)).encode()
        refused(tmp_path, frame_of(tar_of([info("manifest.json", manifest)])), match)


def test_a_disk_that_is_too_small_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))  # type: ignore[attr-defined]
    content = frame_of(tar_of(members()))
    (tmp_path / "a.tar.zst").write_bytes(content)
    with pytest.raises(DiskSpaceError, match="bytes free"):
        unpack_archive(tmp_path / "a.tar.zst", tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"manifest.json"}


def test_manifests_that_are_none(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"):
        refused(tmp_path, frame_of(tar_of([info("manifest.json", content)])))
    changed = manifest_of(FILES) | {"summary": "another"}
    refused(tmp_path, frame_of(tar_of([info("manifest.json", json.dumps(changed).encode()), *members()[1:]])), "hash")
    wrong = {**FILES, "README.md": b"# A pacK\n"}
    refused(tmp_path, frame_of(tar_of([members()[0], *members(wrong)[1:]])), "other content")


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = frame_of(bytes(64 << 20))
    assert len(zeros) < 10_000
    refused(tmp_path, zeros, "manifest.json as saekit packs it")
    bomb = tar_of([info("manifest.json", bytes(65 << 20))])
    refused(tmp_path, frame_of(bomb), "manifest.json as saekit packs it")
    refused(tmp_path, frame_of(tar_of([*members(), info("zeros", bytes(64 << 20))])), "the end, after")
    refused(tmp_path, frame_of(tar_of(members()) + bytes(64 << 20)), "the end of the archive")
    monkeypatch.setattr(archive_module, "FRAME_BYTES", 10_000)
    refused(tmp_path, frame_of(bytes(10_001)), "at most 10000 bytes")


def test_frames_that_are_not_those_of_a_pack(tmp_path: Path) -> None:
    tar = tar_of(members())
    refused(tmp_path, b"", "no zstd")
    refused(tmp_path, tar, "no zstd")
    refused(tmp_path, frame_of(tar, write_checksum=False), "checksum")
    refused(tmp_path, frame_of(tar, write_content_size=False), "says how long")
    wide = zstandard.ZstdCompressionParameters(window_log=27, write_checksum=1, write_content_size=1)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj(size=len(tar) + (20 << 20))
    content = stream.compress(tar + bytes(20 << 20)) + stream.flush()
    refused(tmp_path, content, "window")
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"evil"
    for wrong in (skippable + frame_of(tar), frame_of(tar) + skippable, frame_of(tar) * 2, frame_of(tar) + b"\0"):
        refused(tmp_path, wrong)


@pytest.fixture(scope="module")
def small() -> bytes:
    return frame_of(tar_of(members({"README.md": b"hi"})))


def test_an_archive_that_is_cut_anywhere(tmp_path: Path, small: bytes) -> None:
    for end in range(len(small)):
        refused(tmp_path, small[:end])


def test_an_archive_with_a_flipped_bit_anywhere(tmp_path: Path, small: bytes) -> None:
    """The header of the frame, whose bits are all tried, its blocks and its checksum.

    A few bits of a block say the same in another way, such as where an equal text was before: what comes out is equal.
    """
    (tmp_path / "hostile.tar.zst").write_bytes(small)
    unpack_archive(tmp_path / "hostile.tar.zst", tmp_path / "right")
    flips = [(position, position % 8) for position in range(len(small))] + [(4, bit) for bit in range(8)]
    n_equal = 0
    for position, bit in flips:
        flipped = bytearray(small)
        flipped[position] ^= 1 << bit
        try:
            refused(tmp_path, bytes(flipped))
        except pytest.fail.Exception:
            assert tree(tmp_path / "out") == tree(tmp_path / "right")
            shutil.rmtree(tmp_path / "out")
            n_equal += 1
    assert n_equal < 5


@given(st.data())
def test_a_tar_with_any_byte_changed_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tar = bytearray(tar_of(members()))
    position = data.draw(st.integers(0, len(tar) - 1))
    tar[position] ^= data.draw(st.integers(1, 255))
    refused(tmp_path_factory.mktemp("changed"), frame_of(bytes(tar)))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    refused(folder, content)
    refused(folder, b"\x28\xb5\x2f\xfd" + content)
    refused(folder, frame_of(content + bytes(1024)))


def test_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match="an archive, got nothing"):
        unpack_archive(tmp_path / "none.tar.zst", tmp_path / "out")


def test_the_content_of_a_pack_is_in_its_hash(make_pack: Callable[..., Path], tmp_path: Path) -> None:
    manifest = write_archive(make_pack(), tmp_path / "a.tar.zst")
    rest = {key: value for key, value in manifest.items() if key != "content_sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    assert manifest["content_sha256"] == hashlib.sha256(canonical).hexdigest()

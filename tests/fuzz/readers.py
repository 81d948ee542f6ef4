"""Every reader of bytes that come from anybody, with files that it accepts, to be damaged.

A reader gets bytes in place of the part of a file that is being damaged; what a hash or a checksum would stop at the
door is wrapped anew, so that damage gets behind it. The contract: a reader accepts, or raises one SaekitError with a
line that can be printed; nothing else is raised, and memory stays bounded. Used by `fuzz_readers.py`, which is guided
by coverage, and by `test_readers.py`. Left out: what comes over the network (`tests/steer/packs`), and models.
"""

import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from activations.errors import LONGEST, SaekitError
from sae.formats import SAE_FORMATS
from sae.formats import find as find_sae
from steer.formats import detect, find
from steer.library import Library, save_library
from steer.manifest import content_hash
from steer.packs.archive import unpack_archive, write_archive
from steer.packs.index_file import index_bytes, index_entry, parse_index
from steer.packs.names import printable
from steer.packs.signature import check_signature, sign
from steer.vectors import Reader as ReaderOfVector
from tests.conformance.test_sae_formats import HOLDS as SAE_HOLDS
from tests.conformance.test_sae_formats import random_artefact
from tests.conformance.test_vector_formats import HOLDS, MODEL, held, unit, written
from tests.steer.formats.test_spipe import Pipeline
from tests.steer.formats.test_svec import STEERABILITY
from tests.steer.packs.packs import write_pack

Read = Callable[[Path, bytes], object]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", "x" * 300,
    "\ud800", "\n", "../x", "resid_post.2", [], {}, [[]], [0] * 300, {"": None}, "and", {"not": "g"},
)  # fmt: skip
"""what is put in the place of something in JSON"""


KEYS = ("", "x", "format", "a\nb", "\ud800")
LONGEST_ERROR = 4 * LONGEST
"""letters; what a file says is quoted, but not all of it"""


class Reader(NamedTuple):
    """What reads a file, and files that it accepts."""

    read: Read
    """of an empty folder to write into, and the bytes; raises SaekitError"""
    seeds: list[bytes]
    kind: str = "bytes"
    """bytes, json or safetensors: how it is damaged"""


def readers() -> dict[str, Reader]:
    """All of them, by name."""
    with tempfile.TemporaryDirectory(prefix="saekit-") as folder:
        made = Path(folder)
        return {**_vectors(made), **_spipes(made), **_libraries(made), **_packs(made), **_saes(made)}


def accepts(reader: Reader, folder: Path, content: bytes) -> bool:
    """Read bytes; whether they were accepted. The folder is empty afterwards.

    Raises: whatever a reader must not raise; MemoryError also if it was told as something else.
    """
    try:
        reader.read(folder, content)
        return True
    except SaekitError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from error
        printable(str(error)).encode()
        if len(str(error)) > LONGEST_ERROR:
            raise AssertionError(f"an error of {len(str(error))} letters") from error
        return False
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def damaged(content: bytes, kind: str, random: Random) -> bytes:
    """The bytes with something wrong in them, in JSON something that is JSON all the same."""
    if kind == "safetensors" and len(content) > 8 and random.random() < 0.7:
        length = int.from_bytes(content[:8], "little")
        head = _damaged_json(content[8 : 8 + length], random)
        return len(head).to_bytes(8, "little") + head + content[8 + length :]
    if kind == "json" and random.random() < 0.85:
        return _damaged_json(content, random)
    part, at = bytearray(content), random.randrange(len(content) + 1)
    match random.randrange(5):
        case 0:
            part[at : at + 1] = bytes([random.randrange(256)])
        case 1:
            del part[at : at + random.randrange(1, 1 + len(part))]
        case 2:
            part[at:at] = random.randbytes(random.randrange(1, 9))
        case 3:
            part[at : at + 8] = random.choice((b"\xff", b"\0", b"\x7f")) * random.choice((1, 2, 4, 8))
        case _:
            part = part[:at]
    return bytes(part)


def _damaged_json(content: bytes, random: Random) -> bytes:
    """One place in it, chosen at random, is something else, gone, there twice, or under another name."""
    try:
        root = {"": json.loads(content)}
        places: list[tuple[Any, Any]] = [(root, "")]
        for inside, key in places:
            value = inside[key]
            if isinstance(value, dict | list):
                keys: Iterable[Any] = range(len(value)) if isinstance(value, list) else value
                places += [(value, each) for each in list(keys)[:200]]
        inside, key = random.choice(places[1:] or places)
        other, its = random.choice(places)
        value = random.choice((random.choice(VALUES), other[its], [inside[key]] * 2))
        if random.random() < 0.2 and isinstance(inside, dict):
            value, key = (inside.pop(key), random.choice((*KEYS, str(key) + "2")))
        inside[key] = value
        return json.dumps(root.get("")).encode()
    except (ValueError, RecursionError):
        return content + b" "


def _of_file(name: str, *reads: Callable[[Path], object]) -> Read:
    """Write the bytes to a file of that name, and read it in several ways, all of which are tried."""

    def read(folder: Path, content: bytes) -> None:
        path, errors = folder / name, []
        path.write_bytes(content)
        with suppress(SaekitError):
            detect(path)
        for each in reads:
            try:
                each(path)
            except SaekitError as error:
                errors.append(error)
        if len(errors) == len(reads):
            raise errors[0]

    return read


def _vectors(made: Path) -> dict[str, Reader]:
    """The formats of vectors, each with the ones that have the same kind of file."""

    def reading(name: str) -> Callable[[Path], object]:
        return lambda path: find(name).read(path, MODEL)

    files: dict[str, list[bytes]] = {}
    for name, holds in HOLDS.items():
        for operation in holds.operations:
            files.setdefault(name, []).append(written(name, made, [held(name, operation)]).read_bytes())
    find("plain").write([held("plain", "add")], made / "v.npz", True)
    pt = {name: files[name] for name in ("hotwire", "steering_vectors", "lm_eval")}
    every_pt = [each for seeds in pt.values() for each in seeds]
    small_pt = [each for name in ("steering_vectors", "lm_eval") for each in pt[name]]
    pickles = [_member(each, "data.pkl") for each in small_pt]
    reads_pt = [reading(name) for name in pt]
    svec = [json.dumps(STEERABILITY | {"directions": {"1": unit(1).tolist()}}).encode()]
    return {
        "gguf": Reader(_of_file("v.gguf", reading("llama_cpp"), reading("glp")), files["llama_cpp"] + files["glp"]),
        "ds4": Reader(_of_file("v.f32", reading("ds4")), files["ds4"]),
        "pt": Reader(_of_file("v.pt", *reads_pt), every_pt),
        "pt pickle": Reader(_in_zip("v.pt", small_pt[0], "data.pkl", _of_file("v.pt", *reads_pt)), pickles),
        "neuronpedia": Reader(_of_file("v.json", reading("neuronpedia")), files["neuronpedia"], "json"),
        "safetensors": Reader(_of_file("v.safetensors", reading("plain")), files["plain"], "safetensors"),
        "npz": Reader(_of_file("v.npz", reading("plain")), [(made / "v.npz").read_bytes()]),
        "npy": Reader(
            _in_zip("v.npz", (made / "v.npz").read_bytes(), ".npy", _of_file("v.npz", reading("plain"))),
            [_member((made / "v.npz").read_bytes(), ".npy")],
        ),
        "svec": Reader(_of_file("v.svec", reading("svec_cast")), svec, "json"),
    }


def _spipes(made: Path) -> dict[str, Reader]:
    whole = []
    for kind in ("caa", "additive", "projection"):
        pipeline = Pipeline()
        rows = {layer: unit(layer)[None] for layer in (1, 3)}
        if kind == "caa":
            pipeline.caa(rows=rows)
        else:
            pipeline.adapter(kind, {}, rows=rows)
        whole.append(pipeline.write(made / "v.spipe").read_bytes())
    read = _of_file("v.spipe", lambda path: find("spipe").read(path, MODEL))

    def tensors(folder: Path, content: bytes) -> None:
        pipeline = Pipeline()
        pipeline.caa(rows=content)
        read(folder, pipeline.write(folder / "v.spipe").read_bytes())

    return {
        "spipe": Reader(read, whole),
        "spipe manifest": Reader(
            _in_zip("v.spipe", whole[0], "spipe.json", read),
            [_member(each, "spipe.json") for each in whole[:1]],
            "json",
        ),
        "spipe artefact": Reader(
            _in_zip("v.spipe", whole[0], "artifact.json", read), [_member(whole[0], "artifact.json")], "json"
        ),
        "spipe tensors": Reader(tensors, [_member(whole[0], "artifact.safetensors")], "safetensors"),
    }


def _libraries(made: Path) -> dict[str, Reader]:
    """A library of vectors with gates and a reader; hashes are made to fit what is in it."""
    plain = held("plain", "add")
    cold = plain.energy_gate(0.2)
    gated = replace(plain, name="gated", gate=replace(cold, name="g") & ~replace(cold, name="h"))
    reading = replace(plain, name="read", reader=ReaderOfVector(unit(4), "resid_post.3", 0.5), window=(0.5, 1.5))
    save_library(made / "library", [plain, gated, reading])
    library = Library.open(made / "library")
    manifest = json.loads((made / "library" / "manifest.json").read_text())
    tensors = (made / "library" / "vectors.safetensors").read_bytes()

    def opened(folder: Path, manifest: Mapping[str, Any] | None, raw: bytes, tensors: bytes = tensors) -> None:
        hashed = (
            raw if manifest is None else json.dumps({**manifest, "content_sha256": content_hash(manifest)}).encode()
        )
        (folder / "manifest.json").write_bytes(hashed)
        (folder / "vectors.safetensors").write_bytes(tensors)
        Library.open(folder)

    def of_manifest(folder: Path, content: bytes) -> None:
        found = _parsed(content)
        opened(folder, found if isinstance(found, dict) else None, content)

    def of_gate(folder: Path, content: bytes) -> None:
        found = _parsed(content)
        gate = {} if found is None else found
        vectors = [entry | {"gate": gate} if entry["gate"] else entry for entry in manifest["vectors"]]
        opened(folder, manifest | {"vectors": vectors}, content)

    def of_tensors(folder: Path, content: bytes) -> None:
        ref = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files = manifest["files"] | {"vectors.safetensors": ref}
        opened(folder, manifest | {"files": files}, b"", content)

    gate = next(entry["gate"] for entry in manifest["vectors"] if entry["gate"])
    rich = manifest | {"kits": [{"name": "kit", "vectors": dict.fromkeys(library.vectors, 1.0), "receipts": []}]}
    return {
        "library manifest": Reader(of_manifest, [json.dumps(each).encode() for each in (manifest, rich)], "json"),
        "library gate": Reader(of_gate, [json.dumps(gate).encode()], "json"),
        "library tensors": Reader(of_tensors, [tensors], "safetensors"),
    }


def _packs(made: Path) -> dict[str, Reader]:
    manifest = write_archive(write_pack(made / "pack"), made / "p.tar.zst")
    archive = (made / "p.tar.zst").read_bytes()
    entry = index_entry("p", manifest, file="p.tar.zst", n_bytes=9, sha256="ab" * 32, signer=None)
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))

    def unpacked(folder: Path, content: bytes) -> None:
        (folder / "p.tar.zst").write_bytes(content)
        unpack_archive(folder / "p.tar.zst", folder / "pack")

    def of_tar(folder: Path, content: bytes) -> None:
        unpacked(folder, zstandard.ZstdCompressor(write_checksum=True).compress(content))

    def signed(folder: Path, content: bytes) -> None:
        (folder / "signature.json").write_bytes(content)
        check_signature("pack", folder, manifest, {})

    return {
        "archive": Reader(unpacked, [archive]),
        "tar": Reader(of_tar, [zstandard.ZstdDecompressor().decompress(archive)]),
        "index": Reader(
            lambda folder, content: parse_index("index", content, {}),
            [index_bytes([entry]), index_bytes([entry], key)],
            "json",
        ),
        "signature": Reader(signed, [sign(manifest["content_sha256"], key)], "json"),
    }


def _saes(made: Path) -> dict[str, Reader]:
    """Each file of the formats of SAEs, beside the others as they are."""
    found = {}
    for name in SAE_FORMATS:
        kind = "topk" if "topk" in SAE_HOLDS[name] else "jumprelu"
        artefact = random_artefact(kind)
        find_sae(name).write(
            replace(artefact, apply_b_dec_to_input=False) if "gemma" in name else artefact, made / name
        )
        files = {
            path.name: path.read_bytes() for path in (made / name).iterdir() if path.suffix not in (".html", ".md")
        }
        for file, content in files.items():
            damage = {".json": "json", ".safetensors": "safetensors"}.get(Path(file).suffix, "bytes")
            found[f"sae {name} {file}"] = Reader(_in_folder(name, files, file), [content], damage)
    return found


def _in_folder(name: str, files: Mapping[str, bytes], changed: str) -> Read:
    def read(folder: Path, content: bytes) -> None:
        for file, usual in files.items():
            (folder / file).write_bytes(content if file == changed else usual)
        find_sae(name).read(folder)

    return read


def _in_zip(file: str, usual: bytes, changed: str, read: Read) -> Read:
    """Put bytes in place of the member whose name ends so, with the checksum that they have."""

    def wrapped(folder: Path, content: bytes) -> None:
        with zipfile.ZipFile(io.BytesIO(usual)) as source, zipfile.ZipFile(folder / file, "w") as target:
            for member in source.infolist():
                is_it = member.filename.endswith(changed)
                target.writestr(member.filename, content if is_it else source.read(member))
        read(folder, (folder / file).read_bytes())

    return wrapped


def _member(zipped: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        return archive.read(next(each for each in archive.namelist() if each.endswith(name)))


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None

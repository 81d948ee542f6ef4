"""Files that declare far more than they hold, or hold what is no row: one error each, in little memory and time."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from activations.errors import SaekitError
from steer.formats import find
from steer.library import load_library
from steer.manifest import FORMAT, content_hash
from tests.conformance.test_vector_formats import MODEL, unit


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word)) + word.encode()


def gguf_file(n_tensors: int, n_keys: int, *parts: bytes) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_keys)
    return b"".join([head, text("general.architecture"), struct.pack("<I", 8), text("controlvector"), *parts])


KEY = text("k")
GGUF = {
    "tensors": gguf_file(2**62, 1),
    "keys": gguf_file(1, 2**62),
    "string": gguf_file(1, 2, KEY, struct.pack("<IQ", 8, 2**62)),
    "name": gguf_file(1, 2, struct.pack("<Q", 2**62)),
    "array": gguf_file(1, 2, KEY, struct.pack("<IIQ", 9, 4, 2**60)),
    "zeros": gguf_file(1, 2, KEY, struct.pack("<IIQ", 9, 4, 2**33), bytes(64)),
    "strings": gguf_file(1, 2, KEY, struct.pack("<IIQ", 9, 8, 2**40)),
    "nested": gguf_file(1, 2, KEY, struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 20_000),
    "shape": gguf_file(1, 1, text("direction.2"), struct.pack("<IQQIQ", 2, 2**40, 2**22, 0, 0), bytes(64)),
    "offset": gguf_file(1, 1, text("direction.2"), struct.pack("<IQIQ", 1, 6, 0, 2**63), bytes(64)),
    "many": gguf_file(50_000, 1, bytes(4_000_000)),
}
HEADER = json.dumps({"resid_post.2": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
ARRAYS = {
    "huge.safetensors": struct.pack("<Q", 2**62) + b"{}",
    "more.safetensors": struct.pack("<Q", len(HEADER)) + HEADER,
    "deep.json": b'{"vector":' * 100_000,
    "number.json": b'{"layerNumber": 2, "hookType": "resid-post", "vector": [1' + b"0" * 400 + b"]}",
}
LIMITED = """
import resource, sys
from pathlib import Path
from steer.formats import find
from activations.errors import SaekitError
from activations.store_schema import ModelRef
import gguf, torch
model = ModelRef(id="tiny", fingerprint="ab" * 32, n_layers=5, d_model=6)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
names = {".gguf": ["llama_cpp", "glp"], ".json": ["neuronpedia"], ".safetensors": ["plain"], ".npz": ["plain"]}
for path in sorted(Path(sys.argv[1]).iterdir()):
    for name in names[path.suffix]:
        try:
            find(name).read(path, model)
        except SaekitError as error:
            print(path.name, name, type(error).__name__)
"""


def test_what_declares_too_much_takes_no_memory(tmp_path: Path) -> None:
    for name, content in {**{f"{name}.gguf": each for name, each in GGUF.items()}, **ARRAYS}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("long.gguf", "long.json", "long.safetensors", "long.npz"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 38)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(ran.stdout.splitlines()) == 2 * (len(GGUF) + 1) + len(ARRAYS) + 3, ran.stdout


@pytest.mark.parametrize(("name", "file"), [("spipe", "v.spipe"), ("hotwire", "v.pt"), ("plain", "v.npz")])
def test_a_zip_with_a_list_of_members_that_is_too_long_is_not_read(name: str, file: str, tmp_path: Path) -> None:
    n_bytes = 5 << 20
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, n_bytes, 4, 0)
    (tmp_path / file).write_bytes(b"PK\3\4" + bytes(n_bytes) + end)
    with pytest.raises(SaekitError, match="a list of members of more than"):
        find(name).read(tmp_path / file, MODEL)


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.ones(5, 6).to_sparse(),
    "meta": lambda: torch.ones(5, 6, device="meta"),
    "complex": lambda: torch.ones(5, 6, dtype=torch.complex64),
    "whole": lambda: torch.ones(5, 6, dtype=torch.int64),
    "repeated": lambda: torch.ones(1).expand(5, 6),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_no_rows_are_refused(kind: str, tmp_path: Path) -> None:
    tensor, path = TENSORS[kind](), tmp_path / "file.pt"
    row = torch.ones(1).expand(6) if kind == "repeated" else tensor[0]
    for name, content in {
        "hotwire": tensor,
        "steering_vectors": {"layer_activations": {2: row}, "layer_type": "decoder_block"},
        "lm_eval": {"layers.2": {"steering_vector": row, "action": "add"}},
    }.items():
        torch.save(content, path)
        with pytest.raises(SaekitError):
            find(name).read(path, MODEL)


def library(folder: Path, *entries: dict[str, Any]) -> Path:
    usual = {
        "name": "v", "model": MODEL.model_dump(mode="json"), "hook_point": "resid_post.2", "mean_norm": 1.0,
        "source": {}, "coefficient": 1.0, "receipts": [], "operation": "add", "scope": "all", "gate": None,
        "window": None, "reader": None,
    }  # fmt: skip
    tensors, vectors = save({"v": unit(1)}), [usual | each for each in entries]
    ref = {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()}
    write_manifest(
        folder,
        {"format": FORMAT, "about": {}, "sae": None, "features": [], "kits": [], "vectors": vectors,
         "files": {"vectors.safetensors": ref}},
    )  # fmt: skip
    (folder / "vectors.safetensors").write_bytes(tensors)
    return folder


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["content_sha256"] = content_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "wrong",
    [{"coefficient": 10**400}, {"mean_norm": 0.0}, {"mean_norm": -1.0}, {"source": 5}, {"receipts": 5},
     {"receipts": [5]}, {"name": ["v"]}, {"hook_point": None}, {"window": "ab"}, {"scope": 7}, {"operation": []},
     {"reader": {"direction": "v", "hook_point": "resid_post.2", "midpoint": True}}, {"gate": 5},
     {"gate": {"when": "g", "gates": [{"name": "g", "kind": "energy", "weight": "v", "hook_point": "resid_post.2",
      "bias": 10**400, "on": 0.2, "off": 0.1, "min_tokens": 1, "model": None, "calibration": {}}]}}],
)  # fmt: skip
def test_a_library_with_a_hash_that_holds_is_not_believed(wrong: dict[str, Any], tmp_path: Path) -> None:
    assert np.array_equal(load_library(library(tmp_path, {}))["v"].direction, unit(1))
    with pytest.raises(SaekitError):
        load_library(library(tmp_path, wrong))


def test_a_library_with_two_vectors_of_one_name_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match="two vectors of one name"):
        load_library(library(tmp_path, {}, {}))
    library(tmp_path, {})
    os.truncate(tmp_path / "vectors.safetensors", 1 << 38)
    with pytest.raises(SaekitError, match=r"vectors\.safetensors of more than \d+ bytes"):
        load_library(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"]["vectors.safetensors"]["bytes"] = 1 << 38
    write_manifest(tmp_path, manifest)
    with pytest.raises(SaekitError, match="1024 MiB at most"):
        load_library(tmp_path)

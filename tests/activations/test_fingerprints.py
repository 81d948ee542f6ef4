"""Digests, and that they are computed once and never stale."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from activations import fingerprints
from activations.fingerprints import cache_dir, digest, digest_of, file_sha256, tensor_digests


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SAEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "saekit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "saekit"


def test_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "_sha256_of_bytes", lambda path: pytest.fail("read again"))
        assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"digest": "made up"}'])
def test_broken_note_is_ignored(tmp_path: Path, own_cache: Path, text: str) -> None:
    (tmp_path / "a").write_bytes(b"one")
    file_sha256(tmp_path / "a")
    (note,) = (own_cache / "digests").iterdir()
    note.write_text(text)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()


def test_cache_that_cannot_be_written_is_no_error(tmp_path: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    (tmp_path / "a").write_bytes(b"one")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()


def test_tensor_digests_do_not_depend_on_the_file(tmp_path: Path) -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, dtype=np.float16)
    save_file({"a": a, "b": b}, tmp_path / "both")
    save_file({"a": a}, tmp_path / "a", metadata={"format": "pt"})
    save_file({"b": b}, tmp_path / "b")
    both = tensor_digests(tmp_path / "both")
    assert both == tensor_digests(tmp_path / "a") | tensor_digests(tmp_path / "b")
    assert both["a"] == f"F32 [2, 3] {hashlib.sha256(a.tobytes()).hexdigest()}"


def test_digest_tells_parts_apart() -> None:
    assert digest("a", "b") != digest("ab")
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})

"""Converting a GGUF file: once, whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from activations import gguf_cache
from activations.errors import DiskSpaceError, ModelError
from activations.gguf_cache import converted
from activations.models import load_model, weight_fingerprint

D_MODEL, D_MLP, N_HEADS, N_KV = 32, 48, 4, 2


def write_gguf(path: Path, tokenizer: Any, arch: str = "llama", leave_out: str = "") -> dict[str, np.ndarray]:
    """A random Llama of one block in float32; returns its tensors by GGUF name."""
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, tokenizer)
    random = np.random.default_rng(0)
    kv = D_MODEL // N_HEADS * N_KV
    shapes = {
        "token_embd.weight": (len(tokenizer), D_MODEL),
        "output_norm.weight": (D_MODEL,),
        "output.weight": (len(tokenizer), D_MODEL),
        "blk.0.attn_norm.weight": (D_MODEL,),
        "blk.0.attn_q.weight": (D_MODEL, D_MODEL),
        "blk.0.attn_k.weight": (kv, D_MODEL),
        "blk.0.attn_v.weight": (kv, D_MODEL),
        "blk.0.attn_output.weight": (D_MODEL, D_MODEL),
        "blk.0.ffn_norm.weight": (D_MODEL,),
        "blk.0.ffn_gate.weight": (D_MLP, D_MODEL),
        "blk.0.ffn_up.weight": (D_MLP, D_MODEL),
        "blk.0.ffn_down.weight": (D_MODEL, D_MLP),
    }
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name != leave_out:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_metadata(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    vocab = tokenizer.get_vocab()
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(D_MODEL)
    writer.add_block_count(1)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny_gguf(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer)
    return tmp_path / "tiny.gguf"


@pytest.fixture
def fake_write(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Conversion that writes one file; returns the dtypes it was asked for."""
    dtypes: list[torch.dtype] = []

    def write(gguf: Path, part: Path, dtype: torch.dtype) -> None:
        (part / "config.json").write_text("{}")
        dtypes.append(dtype)

    monkeypatch.setattr(gguf_cache, "_write_converted", write)
    return dtypes


def test_load_a_gguf(own_cache: Path, tmp_path: Path, tiny_tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer)
    lines: list[str] = []
    loaded = load_model(str(tmp_path / "tiny.gguf"), device="cpu", dtype="float32", on_status=lines.append)
    assert (loaded.id, loaded.d_model, loaded.n_layers) == ("tiny", D_MODEL, 1)
    head: Any = loaded.family.lm_head(loaded.model).weight
    assert np.array_equal(head.numpy(), tensors["output.weight"]), "float32 weights are kept exactly"
    assert loaded.fingerprint == next(own_cache.iterdir()).name
    assert lines == [f"converting tiny.gguf once, to keep in {own_cache}"]
    again = load_model(str(tmp_path / "tiny.gguf"), device="cpu", dtype="float32", on_status=lines.append)
    assert len(lines) == 1
    assert again.fingerprint == loaded.fingerprint
    assert again.tokenizer("the river").input_ids == tiny_tokenizer("the river").input_ids
    assert capfd.readouterr() == ("", "")


def test_a_converted_folder_is_the_model_of_its_file(own_cache: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    folder, sha256 = converted(tiny_gguf, print)
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link", tiny_gguf):
        assert weight_fingerprint(str(path)) == sha256
    moved = shutil.copytree(folder, tmp_path / "models" / sha256)
    assert weight_fingerprint(str(moved)) != sha256, "a name proves nothing outside of the cache"


def test_interrupted_conversion_leaves_nothing(
    own_cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, part: Path, dtype: torch.dtype) -> None:
        (part / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_cache, "_write_converted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted(tiny_gguf, print)
    assert list(own_cache.iterdir()) == []


def test_what_a_killed_process_left_is_not_used_and_goes_in_time(
    own_cache: Path, tiny_gguf: Path, fake_write: list[torch.dtype]
) -> None:
    folder, _ = converted(tiny_gguf, lambda line: None)
    shutil.rmtree(folder)
    fresh, stale = (own_cache / f".{folder.name}.{name}" for name in ("fresh", "stale"))
    for part in (fresh, stale):
        part.mkdir()
        (part / "model.safetensors").write_text("half")
    os.utime(stale, (1, 1))
    assert converted(tiny_gguf, lambda line: None)[0] == folder
    assert {path.name for path in own_cache.iterdir()} == {folder.name, fresh.name}
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_second_of_two_processes_takes_the_copy_of_the_first(
    own_cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(gguf: Path, part: Path, dtype: torch.dtype) -> None:
        (part / "config.json").write_text("second")
        folder = own_cache / part.name.split(".")[1]
        folder.mkdir()
        (folder / "config.json").write_text("first")

    monkeypatch.setattr(gguf_cache, "_write_converted", overtaken)
    folder, _ = converted(tiny_gguf, lambda line: None)
    assert (folder / "config.json").read_text() == "first"
    assert list(own_cache.iterdir()) == [folder]


def test_large_models_are_kept_in_bfloat16(
    own_cache: Path, tiny_gguf: Path, fake_write: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = converted(tiny_gguf, lambda line: None)
    shutil.rmtree(folder)
    monkeypatch.setattr(gguf_cache, "EXACT_LIMIT_PARAMS", 1000)
    converted(tiny_gguf, lambda line: None)
    assert fake_write == [torch.float32, torch.bfloat16]


def test_no_room(
    own_cache: Path, tiny_gguf: Path, fake_write: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(DiskSpaceError, match=r"expected 0\.1 GB free .* got 0\.0 GB.*SAEKIT_CACHE"):
        converted(tiny_gguf, lambda line: None)
    assert fake_write == []


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("part", [0.01, 0.3, 0.99])
def test_cut_gguf(tiny_gguf: Path, part: float) -> None:
    data = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ModelError, match="expected a whole GGUF file, got a file that breaks off"):
        converted(tiny_gguf, lambda line: None)


@pytest.mark.parametrize(
    ("arch", "leave_out", "got"),
    [
        ("nonesuch", "", "nonesuch"),
        ("llama", "output_norm.weight", "model.norm.weight"),
        ("llama", "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_gguf_that_is_no_usable_model(
    own_cache: Path, tmp_path: Path, tiny_tokenizer: Any, arch: str, leave_out: str, got: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer, arch, leave_out)
    with pytest.raises(ModelError, match="expected a GGUF file of a model that transformers can read") as caught:
        converted(tmp_path / "tiny.gguf", lambda line: None)
    assert got in str(caught.value.got)
    assert list(own_cache.iterdir()) == []

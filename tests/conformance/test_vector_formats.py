"""What every row of VECTOR_FORMATS promises: what it can hold comes back the same, and nothing else is written.

Files are anybody's: whatever is done to one, reading it gives vectors or one SaekitError.
"""

import json
import os
import pickle
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from activations.errors import (
    CorruptArtefactError,
    MismatchError,
    MissingArtefactError,
    NumericsError,
    SaekitError,
    UnknownNameError,
)
from activations.hook_points import SITES, HookPoint
from activations.store_schema import ModelRef
from sae.formats.state_dict import load_torch
from steer.formats import VECTOR_FORMATS, base, detect, find
from steer.formats.base import VectorFormat
from steer.operations import VECTOR_OPERATIONS
from steer.vectors import SteeringVector

MODEL = ModelRef(id="tiny", fingerprint="ab" * 32, n_layers=5, d_model=6)
OTHER = MODEL.model_copy(update={"fingerprint": "cd" * 32})


class Holds(NamedTuple):
    """What a format can express."""

    suffix: str
    operations: tuple[str, ...] = ("add",)
    sites: tuple[str, ...] = ("resid_post",)
    scopes: tuple[str, ...] = ("all",)
    first_layer: int = 0
    several: bool = True
    keeps_strength: bool = True
    """whether a coefficient that is not folded in comes back"""
    coefficient: float | None = None
    """the only one that an ablation may have"""


HOLDS = {
    "llama_cpp": Holds(".gguf", first_layer=1),
    "glp": Holds(".gguf", ("add", "ablate"), ("resid_post", "mlp_out", "attn_out"), first_layer=1),
    "ds4": Holds(".f32", ("ablate",), ("mlp_out", "attn_out"), keeps_strength=False),
    "steering_vectors": Holds(".pt", keeps_strength=False),
    "lm_eval": Holds(".pt", ("add", "ablate"), coefficient=1.0),
    "hotwire": Holds(".pt", scopes=("all", "generated"), keeps_strength=False),
    "neuronpedia": Holds(".json", sites=("resid_pre", "resid_post"), several=False),
    "plain": Holds(".safetensors", tuple(VECTOR_OPERATIONS), tuple(SITES)),
}
READ_ONLY = {"svec_cast", "svec_caa", "spipe"}
"""tests/steer/formats"""
PAIRS = [(name, operation) for name, holds in HOLDS.items() for operation in holds.operations]
CALM = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def unit(seed: int) -> np.ndarray:
    row = np.random.default_rng(seed).normal(size=MODEL.d_model)
    return (row / np.linalg.norm(row)).astype(np.float32)


def vector(hook_point: str = "resid_post.2", **changes: Any) -> SteeringVector:
    made = SteeringVector("v", unit(len(hook_point)), hook_point, MODEL, 8.0, {"kind": "contrast"}, 3.0)
    return replace(made, **changes)


def held(name: str, operation: str | None = None, **changes: Any) -> SteeringVector:
    """A vector that the format can hold."""
    holds = HOLDS[name]
    chosen = operation or holds.operations[0]
    coefficient = (holds.coefficient or 0.5) if chosen == "ablate" else 3.0
    values = {"hook_point": f"{holds.sites[0]}.2", "operation": chosen, "coefficient": coefficient}
    return vector(**values | changes)


def written(name: str, folder: Path, vectors: list[SteeringVector] | None = None, folded: bool = False) -> Path:
    path = folder / f"file{HOLDS[name].suffix}"
    find(name).write(vectors or [held(name)], path, folded)
    return path


def test_the_table_is_whole() -> None:
    assert HOLDS.keys() | READ_ONLY == VECTOR_FORMATS.keys()
    assert all(isinstance(known, VectorFormat) and known.TITLE for known in VECTOR_FORMATS.values())
    with pytest.raises(UnknownNameError, match="llama_cpp"):
        find("llama.cpp")


@pytest.mark.parametrize(("name", "operation"), PAIRS)
@CALM
@given(data=st.data())
def test_what_it_holds_comes_back(name: str, operation: str, data: st.DataObject, tmp_path: Path) -> None:
    holds, is_ablation = HOLDS[name], operation == "ablate"
    site = data.draw(st.sampled_from(holds.sites))
    layers = st.lists(
        st.integers(holds.first_layer, MODEL.n_layers - 1), min_size=1, max_size=3 if holds.several else 1, unique=True
    )
    folded = not is_ablation and operation != "rotate" and data.draw(st.booleans())
    size = st.floats(0.0625, 60, width=32).map(float)
    same = holds.coefficient or (data.draw(size) if is_ablation else None)
    scope = data.draw(st.sampled_from(holds.scopes))
    vectors = [
        vector(f"{site}.{layer}", direction=unit(layer), operation=operation, scope=scope,
               coefficient=same if is_ablation and same else data.draw(size) * data.draw(st.sampled_from([1, -1])))
        for layer in data.draw(layers)
    ]  # fmt: skip
    path = written(name, tmp_path, vectors, folded)
    assert detect(path) == name
    found = {str(each.hook_point): each for each in find(name).read(path, MODEL)}
    assert found.keys() == {each.hook_point for each in vectors}
    strength = max((each.coefficient for each in vectors), key=abs)
    for each in vectors:
        back = found[each.hook_point]
        assert back.operation == operation
        if is_ablation:
            np.testing.assert_array_equal(back.values, each.direction)
            assert back.coefficient == pytest.approx(each.coefficient if holds.keeps_strength else 1.0)
            continue
        scale = back.coefficient
        if not folded and not holds.keeps_strength:
            scale *= each.coefficient if name == "hotwire" else strength
        np.testing.assert_allclose(scale * back.values, each.coefficient * each.direction, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", HOLDS)
def test_how_it_is_used_is_said(name: str, tmp_path: Path) -> None:
    lines = find(name).write([held(name)], tmp_path / f"v{HOLDS[name].suffix}", False)
    assert lines
    assert all(line.strip() == line for line in lines)
    if HOLDS[name].keeps_strength is False:
        assert f"{held(name).coefficient:g}" in " ".join(lines), "where the file does not say its strength, this does"


@pytest.mark.parametrize("name", HOLDS)
def test_what_it_cannot_express_is_refused_and_leaves_no_file(name: str, tmp_path: Path) -> None:
    holds, good = HOLDS[name], held(name)
    wrong = [[replace(good, operation=each)] for each in VECTOR_OPERATIONS if each not in holds.operations] + [
        [replace(good, hook_point=f"{site}.2")] for site in SITES if site not in holds.sites
    ]
    wrong += [[replace(good, scope=scope)] for scope in ("prompt", "generated") if scope not in holds.scopes]
    wrong += [[replace(good, gate=good.energy_gate(0.2))], [], [good, good]]
    wrong += [[replace(good, hook_point=f"{holds.sites[0]}.{layer}")] for layer in range(holds.first_layer)]
    wrong += [[good, replace(good, hook_point=f"{holds.sites[0]}.3", model=OTHER)]]
    if not holds.several:
        wrong += [[good, replace(good, hook_point=f"{holds.sites[0]}.3")]]
    for vectors in wrong:
        path = tmp_path / f"file{holds.suffix}"
        with pytest.raises(MismatchError):
            find(name).write(vectors, path, False)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "vectors", "folded"),
    [
        ("ds4", [held("ds4"), replace(held("ds4"), hook_point="mlp_out.3", coefficient=0.25)], False),
        ("ds4", [held("ds4"), replace(held("ds4"), hook_point="attn_out.3")], False),
        ("ds4", [held("ds4", coefficient=101.0)], False),
        ("ds4", [held("ds4")], True),
        ("glp", [held("glp", "ablate")], True),
        ("glp", [held("glp", "ablate"), held("glp", "add", hook_point="resid_post.3")], False),
        ("glp", [held("glp", "add"), held("glp", "add", hook_point="mlp_out.3")], False),
        ("glp", [held("glp", "ablate"), held("glp", "ablate", hook_point="resid_post.3", coefficient=0.25)], False),
        ("lm_eval", [held("lm_eval", "ablate", coefficient=0.5)], False),
        ("plain", [held("plain", "ablate")], True),
    ],
)
def test_what_would_be_something_else_there_is_refused(
    name: str, vectors: list[SteeringVector], folded: bool, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError):
        written(name, tmp_path, [replace(each, name=f"v{i}") for i, each in enumerate(vectors)], folded)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", HOLDS)
def test_another_model_is_refused(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    for change in ({"d_model": 7}, {"d_model": 3}, {"n_layers": 2}):
        with pytest.raises(MismatchError):
            find(name).read(path, MODEL.model_copy(update=change))


@pytest.mark.parametrize("name", HOLDS)
@CALM
@given(data=st.data())
def test_whatever_is_done_to_a_file_gives_vectors_or_one_error(name: str, data: st.DataObject, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "grow", "large"])):
            case "flip":
                content[where] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                content = content[: where + 1]
            case "grow":
                content[where:where] = data.draw(st.binary(min_size=1, max_size=9))
            case _:
                content[where : where + 8] = b"\xff" * 8
    path.write_bytes(bytes(content))
    with suppress(SaekitError):
        detect(path)
    with suppress(SaekitError):
        for row in find(name).read(path, MODEL):
            assert row.values.shape == (MODEL.d_model,)
            assert np.isfinite(row.values).all()
            assert row.operation in VECTOR_OPERATIONS


@pytest.mark.parametrize("name", HOLDS)
def test_a_file_cut_anywhere_is_no_file(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    content = path.read_bytes()
    whole = len(content) - {".gguf": 32, ".json": 1}.get(path.suffix, 0)  # padding, or a line's end, may be missing
    for end in range(0, whole, max(whole // 60, 1)):
        path.write_bytes(content[:end])
        with pytest.raises(SaekitError):
            find(name).read(path, MODEL)
    path.unlink()
    with pytest.raises(MissingArtefactError):
        find(name).read(path, MODEL)
    with pytest.raises(MissingArtefactError):
        detect(path)


def test_a_file_of_torch_is_loaded_once_to_find_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    monkeypatch.setattr(base, "load_torch", lambda path: loads.append(path) or load_torch(path))
    for name in ("hotwire", "lm_eval", "steering_vectors"):
        path = written(name, tmp_path)
        assert (detect(path), loads) == (name, [path])
        loads.clear()


def write_gguf(path: Path, rows: dict[int, np.ndarray], keys: dict[str, str | int]) -> None:
    """A file of directions by block, with keys, whether or not they are ones that are read."""
    writer = gguf.GGUFWriter(path, "controlvector")
    for key, value in keys.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for layer, row in rows.items():
        writer.add_tensor(f"direction.{layer}", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_row(name: str, path: Path, row: np.ndarray) -> None:
    """A file of the format with this row, as its own writer would never write it."""
    if name in ("llama_cpp", "glp"):
        write_gguf(path, {2: row}, {"glp.mode": "add"} if name == "glp" else {})
    elif name == "ds4":
        np.concatenate([row, *[unit(0)] * 4]).astype("<f4").tofile(path)
    elif name == "neuronpedia":
        content = {"layerNumber": 2, "hookType": "resid-post", "vector": row.tolist()}
        path.write_text(json.dumps(content))
    elif name == "plain":
        save_file({"resid_post.2": row}, path)
    else:
        tensor = torch.from_numpy(row)
        entry = {"steering_vector": tensor, "steering_coefficient": 1.0, "action": "add"}
        torch.save({
            "steering_vectors": {"layer_activations": {2: tensor}, "layer_type": "decoder_block"},
            "lm_eval": {"layers.2": entry}, "hotwire": torch.stack([tensor] * 5),
        }[name], path)  # fmt: skip


@pytest.mark.parametrize("name", HOLDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_rows_that_are_no_direction_are_refused(name: str, value: float, tmp_path: Path) -> None:
    path, row = tmp_path / f"file{HOLDS[name].suffix}", unit(1)
    with_row(name, path, row)
    assert find(name).read(path, MODEL)
    row[:] = 0
    row[0] = value
    path.unlink()
    with_row(name, path, row)
    if name == "ds4" and value == 0:
        assert [each.hook_point.layer for each in find(name).read(path, MODEL)] == [1, 2, 3, 4], "0 does nothing"
        return
    with pytest.raises((CorruptArtefactError, NumericsError)):
        find(name).read(path, MODEL)


class Boom:
    """What a pickle may run."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("name", ["steering_vectors", "lm_eval", "hotwire"])
def test_code_in_a_file_is_not_run(name: str, tmp_path: Path) -> None:
    path, place = tmp_path / "file.pt", tmp_path / "ran"
    torch.save({"layer_activations": {2: Boom(place)}, "layer_type": "decoder_block"}, path)
    with pytest.raises(CorruptArtefactError):
        find(name).read(path, MODEL)
    with pytest.raises(SaekitError):
        detect(path)
    path.write_bytes(pickle.dumps(Boom(place)))
    with pytest.raises(CorruptArtefactError):
        find(name).read(path, MODEL)
    assert not place.exists()


def test_what_unfolds_to_much_more_is_not_unfolded(tmp_path: Path) -> None:
    torch.save(torch.zeros(5, 6), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as source, zipfile.ZipFile(
        tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED
    ) as target:  # fmt: skip
        for each in source.infolist():
            target.writestr(each.filename, source.read(each))
    with pytest.raises(CorruptArtefactError, match="compressed"):
        find("hotwire").read(tmp_path / "bomb.pt", MODEL)
    np.savez_compressed(tmp_path / "bomb.npz", **{"resid_post.2": np.zeros(4_000_000, np.float32)})  # type: ignore[reportArgumentType]
    with pytest.raises(CorruptArtefactError, match="times as large"):
        find("plain").read(tmp_path / "bomb.npz", MODEL)


def test_objects_in_an_npz_are_not_unpickled(tmp_path: Path) -> None:
    place = tmp_path / "ran"
    np.savez(tmp_path / "file.npz", **{"resid_post.2": np.array([Boom(place)], object)})  # type: ignore[reportArgumentType]
    with pytest.raises(CorruptArtefactError):
        find("plain").read(tmp_path / "file.npz", MODEL)
    assert not place.exists()


def test_rows_of_an_npz_are_added_at_strength_1(tmp_path: Path) -> None:
    find("plain").write([vector()], tmp_path / "file.npz", False)
    (row,) = find("plain").read(tmp_path / "file.npz", MODEL)
    np.testing.assert_allclose(row.values * row.coefficient, 3 * vector().direction, rtol=1e-6)
    for wrong in ("ablate", "rotate"):
        with pytest.raises(MismatchError):
            find("plain").write([vector(operation=wrong)], tmp_path / "other.npz", False)


def test_a_file_that_projects_is_not_read_as_one_that_adds(tmp_path: Path) -> None:
    path = written("glp", tmp_path, [held("glp", "ablate")])
    with pytest.raises(MismatchError, match="project"):
        find("llama_cpp").read(path, MODEL)
    for key, value in {"glp.mode": "rotate", "glp.rank": 2, "glp.hook_point": "somewhere"}.items():
        write_gguf(tmp_path / "other.gguf", {2: unit(0)}, {key: value})
        with pytest.raises(MismatchError):
            find("glp").read(tmp_path / "other.gguf", MODEL)


def test_ds4_has_the_bytes_that_its_engine_wants(tmp_path: Path) -> None:
    (line,) = find("ds4").write([held("ds4")], tmp_path / "terse.f32", False)
    rows = np.frombuffer((tmp_path / "terse.f32").read_bytes(), "<f4").reshape(MODEL.n_layers, MODEL.d_model)
    assert np.flatnonzero(np.linalg.norm(rows, axis=1)).tolist() == [2]
    np.testing.assert_array_equal(rows[2], held("ds4").direction)
    about = json.loads((tmp_path / "terse.json").read_text())
    assert {"format": "ds4-directional-steering-v1", "shape": [5, 6], "component": "ffn_out"}.items() <= about.items()
    assert line.endswith("--dir-steering-ffn 0.5"), "the share is taken away there with the same sign"
    (tmp_path / "terse.json").unlink()
    assert find("ds4").read(tmp_path / "terse.f32", MODEL)[0].hook_point == HookPoint("mlp_out", 2), "as it comes"


def test_easysteer_counts_from_0(tmp_path: Path) -> None:
    write_gguf(tmp_path / "file.gguf", {layer: unit(layer) for layer in range(MODEL.n_layers)}, {})
    found = find("llama_cpp").read(tmp_path / "file.gguf", MODEL)
    assert [str(each.hook_point) for each in found] == [f"resid_post.{layer}" for layer in range(5)]
    np.testing.assert_array_equal(found[0].values, unit(0))


def test_a_feature_of_neuronpedia_says_its_hook(tmp_path: Path) -> None:
    content = {"hookName": "blocks.3.hook_resid_pre", "vector": unit(0).tolist(), "vectorLabel": "rivers"}
    (tmp_path / "feature.json").write_text(json.dumps(content))
    (row,) = find("neuronpedia").read(tmp_path / "feature.json", MODEL)
    assert (str(row.hook_point), row.coefficient, row.name) == ("resid_pre.3", 1.0, "rivers")
    (tmp_path / "feature.json").write_text(json.dumps(content | {"hookName": "blocks.3.attn.hook_z"}))
    with pytest.raises(MismatchError):
        find("neuronpedia").read(tmp_path / "feature.json", MODEL)

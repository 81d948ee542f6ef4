"""Arithmetic of directions, and what is done with the results."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from activations.errors import ConfigError, MismatchError, NumericsError, UnknownNameError
from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from steer.library import load_library, save_library
from steer.making.arithmetic import check_together, combine, combined, unit, weighted, without
from steer.making.config import CombineConfig, MeasureConfig
from steer.measures.concepts import concept_of, own_concept
from steer.vectors import SteeringVector, from_latent, from_latents

MEASURE = MeasureConfig(doses=(0.5,), select_prompts=2, heldout_prompts=2, max_new_tokens=3, n_random=1)


def random_rows(n: int, d: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


seeds = st.integers(0, 2**32 - 1)


@given(st.integers(2, 5), st.integers(6, 40), seeds)
def test_what_is_taken_out_leaves_no_projection_and_is_taken_out_once(n: int, d: int, seed: int) -> None:
    rows = random_rows(n, d, seed)
    rest = without(rows[0], rows[1:])
    assert_allclose(rows[1:] @ rest, 0, atol=1e-12)
    assert_allclose(without(rest, rows[1:]), rest, atol=1e-12)
    assert_allclose(without(rows[0], np.vstack([rows[1:], rows[1:]])), rest, atol=1e-9)
    assert rest @ rows[0] > 0


@given(st.integers(4, 40), seeds, st.floats(-3, 3), st.floats(0.1, 3))
def test_what_is_added_can_be_subtracted(d: int, seed: int, by: float, scale: float) -> None:
    a, b = random_rows(2, d, seed)
    assert_allclose(weighted(np.stack([a, b, b]), [1.0, by, -by]), a, atol=1e-12)
    total = weighted(np.stack([a, b]), [scale, by])
    assume(np.linalg.norm(total) > 0.01)
    again = weighted(np.stack([unit(total, "sum").astype(float), b]), [np.linalg.norm(total), -by])
    assert_allclose(unit(again, "a"), a, atol=2e-5)


@given(st.integers(2, 5), st.integers(6, 40), seeds)
def test_shared_and_unshared_parts(n: int, d: int, seed: int) -> None:
    rows, names = random_rows(n, d, seed), dict.fromkeys("abcde"[:n], 1.0)
    (common,) = combined("shared", names, rows)
    assert_allclose(common.direction, rows.mean(0) / np.linalg.norm(rows.mean(0)), atol=1e-6)
    parts = combined("unshared", names, rows)
    assert [part.suffix for part in parts] == [f"-{name}" for name in names]
    for part, row in zip(parts, rows, strict=True):
        assert abs(part.direction @ common.direction) < 1e-5
        (alone,) = combined("without", {"row": 1.0, "common": 1.0}, np.stack([row, common.direction]))
        assert_allclose(part.direction, alone.direction, atol=1e-4)
    if n == 2:
        assert_allclose(parts[0].direction, -parts[1].direction, atol=1e-4)


def test_nothing_left_is_said() -> None:
    row = random_rows(1, 8, 0)
    both = np.vstack([row, row])
    for how, vectors in (("sum", {"a": 1.0, "b": -1.0}), ("without", {"a": 1, "b": 1}), ("unshared", {"a": 1, "b": 1})):
        with pytest.raises(NumericsError, match="direction"):
            combined(how, {name: float(weight) for name, weight in vectors.items()}, both)
    with pytest.raises(NumericsError, match="shared part of a, b"):
        combined("shared", {"a": 1.0, "b": 1.0}, np.vstack([row, -row]))
    with pytest.raises(ConfigError, match="two vectors"):
        combined("shared", {"a": 1.0}, row)


def others(vector: SteeringVector) -> list[SteeringVector]:
    direction = np.random.default_rng(3).standard_normal(len(vector.direction)).astype(np.float32)
    other = replace(vector, name="side", direction=direction / np.linalg.norm(direction))
    return [vector, other]


def config(path: Path, **changes: Any) -> CombineConfig:
    base = {"library": path, "out": path, "name": "new", "vectors": {"up": 1.0, "side": -0.5}, "measure": MEASURE}
    return CombineConfig(**base | changes)


def test_a_combination_is_stored_measured_and_says_where_it_is_from(
    tmp_path: Path, tiny: LoadedModel, vector: SteeringVector
) -> None:
    up, side = others(vector)
    save_library(tmp_path, [up, side])
    (made,) = combine(config(tmp_path), tiny)
    kept = load_library(tmp_path)
    assert list(kept) == ["new", "side", "up"]
    total = up.direction - 0.5 * side.direction
    assert_allclose(kept["new"].direction, total / np.linalg.norm(total), atol=1e-6)
    source = kept["new"].source
    assert source["expression"] == "1 * up + -0.5 * side"
    assert source["parents"] == {"up": up.sha256, "side": side.sha256}
    assert source["concept"] == "up"
    assert source["cosines"]["up"] == pytest.approx(float(made.direction @ up.direction))
    assert kept["new"].coefficient == pytest.approx(0.5 * 4.0)
    assert "effect" in kept["new"].receipts[-1]
    assert up.sha256 != side.sha256
    assert replace(up, name="x", receipts=[{}]).sha256 == up.sha256
    assert replace(up, hook_point="resid_post.2").sha256 != up.sha256


def test_each_remainder_is_measured_as_its_own_parent(
    tmp_path: Path, tiny: LoadedModel, vector: SteeringVector
) -> None:
    save_library(tmp_path, others(vector))
    made = combine(config(tmp_path, how="unshared"), tiny)
    assert [(each.name, each.source["concept"]) for each in made] == [("new-up", "up"), ("new-side", "side")]


def test_a_combination_is_read_as_its_parent_ever_after(
    tmp_path: Path, tiny: LoadedModel, vector: SteeringVector
) -> None:
    up, side = others(vector)
    save_library(tmp_path, [up, side])
    (made,) = combine(config(tmp_path, vectors={"side": 1.0, "up": 1.0}), tiny)
    x = torch.randn(60, tiny.d_model, generator=torch.Generator().manual_seed(0))
    found = concept_of(load_library(tmp_path)["new"], tmp_path / "no sae").shows(x)
    assert found.tolist() == (x @ torch.from_numpy(side.direction) > 0).tolist()
    assert found.tolist() != (x @ torch.from_numpy(made.direction) > 0).tolist()
    artefact = sae(tiny.d_model)
    artefact.save(tmp_path / "sae")
    latent = from_latent(SaeArtefact.load(tmp_path / "sae"), 2, tiny.ref, 1.0)
    save_library(tmp_path, [replace(side, source={"kind": "learned"}), replace(latent, name="up")])
    combine(config(tmp_path, measured=False, sae=tmp_path / "sae"))
    kept = load_library(tmp_path)["new"]
    assert kept.receipts == []
    assert (
        concept_of(kept, tmp_path / "sae").shows(x).tolist()
        == (x @ torch.from_numpy(artefact.W_enc[:, 2]) > 0).tolist()
    )


def test_what_cannot_be_read_is_stored_without_a_receipt(
    tmp_path: Path, tiny: LoadedModel, vector: SteeringVector
) -> None:
    save_library(tmp_path, [replace(each, source={"kind": "latent", "latent": 1}) for each in others(vector)])
    (made,) = combine(config(tmp_path), tiny)
    assert (made.receipts, made.coefficient, "concept" in made.source) == ([], 0.0, False)
    save_library(tmp_path, others(vector))
    assert combine(config(tmp_path, measured=False))[0].receipts == []


def test_vectors_that_do_not_belong_together(tmp_path: Path, vector: SteeringVector) -> None:
    up, side = others(vector)
    for wrong, says in (
        (replace(side, hook_point="resid_post.2"), "hook point resid_post.1, as of 'up'"),
        (replace(side, model=side.model.model_copy(update={"fingerprint": "f", "id": "another"})), "one of another"),
    ):
        with pytest.raises(MismatchError, match=says):
            check_together([up, wrong])
    save_library(tmp_path, [up])
    with pytest.raises(UnknownNameError, match="side"):
        combine(config(tmp_path))
    with pytest.raises(ConfigError, match="two vectors"):
        combine(config(tmp_path, vectors={}))


def sae(d_model: int) -> SaeArtefact:
    rng = np.random.default_rng(0)
    W_dec = rng.standard_normal((6, d_model)).astype(np.float32)
    zeros = {"b_enc": np.zeros(6, np.float32), "b_dec": np.zeros(d_model, np.float32)}
    return SaeArtefact("standard", W_dec.T.copy(), W_dec=W_dec, metadata={"hook_point": "resid_post.1"}, **zeros)


def test_the_concept_of_latents_is_their_weighted_activity(tiny: LoadedModel) -> None:
    artefact = sae(tiny.d_model)
    x = torch.randn(200, tiny.d_model, generator=torch.Generator().manual_seed(0))
    z = torch.relu(x @ torch.from_numpy(artefact.W_enc))
    several = own_concept(from_latents(artefact, {2: 1.0, 4: -0.5}, tiny.ref, 1.0), artefact)
    single = own_concept(from_latent(artefact, 2, tiny.ref, 1.0), artefact)
    assert several is not None
    assert single is not None
    assert torch.equal(several.shows(x), z[:, 2] > 0.5 * z[:, 4])
    assert torch.equal(single.shows(x), z[:, 2] > 0)
    vector = from_latent(artefact, 2, tiny.ref, 1.0)
    assert own_concept(vector) is None
    with pytest.raises(MismatchError, match="latent-2"):
        own_concept(vector, replace(artefact, metadata={**artefact.metadata, "weights_sha256": "other"}))


def test_latents_are_summed_at_their_weights(tiny: LoadedModel) -> None:
    artefact = sae(tiny.d_model)
    vector = from_latents(artefact, {1: 3.0, 5: -2.0}, tiny.ref, 1.0)
    total = 3 * artefact.W_dec[1] - 2 * artefact.W_dec[5]
    assert_allclose(vector.direction, total / np.linalg.norm(total), atol=1e-6)
    assert (vector.name, vector.source["latents"]) == ("latents-1-5", {"1": 3.0, "5": -2.0})
    assert from_latents(artefact, dict.fromkeys(range(5), 1.0), tiny.ref, 1.0).name == "latents-0-1-2-etc"
    with pytest.raises(NumericsError, match="direction"):
        from_latents(artefact, {1: 0.0}, tiny.ref, 1.0)
    with pytest.raises(UnknownNameError, match="0 to 5"):
        from_latents(artefact, {6: 1.0}, tiny.ref, 1.0)

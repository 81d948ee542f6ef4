"""Gates in libraries: what was kept is what steers, and nothing else is read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activations.errors import ConfigError, CorruptArtefactError, MismatchError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer import library
from steer.gate_files import MAX_NODES, READOUTS, condition_of, entry_of, kind_of
from steer.gates import Condition, Gate, Readout, calibrate, clauses, cosine, energy, gates_of, probe
from steer.library import load_library, save_library
from steer.operations import Intervention
from steer.runtime import steering
from steer.vectors import SteeringVector


def gate(name: str, readout: Readout | None = None, **changes: Any) -> Gate:
    weight = torch.from_numpy(np.random.default_rng(len(name)).standard_normal(32).astype(np.float32))
    return Gate(readout or probe(weight, 0.5, "resid_post.0"), **{"on": 0.25, "off": -1.5, "name": name} | changes)


POOL = [gate("a"), gate("bb"), gate("ccc")]
trees = st.recursive(
    st.integers(0, 2),
    lambda inner: st.tuples(st.sampled_from(["and", "or"]), inner, inner) | st.tuples(st.just("not"), inner),
    max_leaves=5,
)


def built(tree: Any) -> Condition:
    if isinstance(tree, int):
        return POOL[tree]
    how, *parts = tree
    conditions = [built(part) for part in parts]
    return {"and": lambda: conditions[0] & conditions[1], "or": lambda: conditions[0] | conditions[1]}.get(
        how, lambda: ~conditions[0]
    )()


@given(trees)
def test_a_condition_comes_back_as_it_was(tree: Any) -> None:
    condition = built(tree)
    entry, weights = entry_of(condition)
    again = condition_of(json.loads(json.dumps(entry)), weights, {})
    named = [[{each.name: up for each, up in clause.items()} for clause in clauses(c)] for c in (condition, again)]
    assert named[0] == named[1]
    for one, other in zip(gates_of(condition), gates_of(again), strict=True):
        assert (one.name, one.on, one.shuts_at, one.min_tokens) == (other.name, other.on, other.off, other.min_tokens)
        assert torch.equal(one.readout.weight, other.readout.weight)


def test_every_kind_of_readout_is_kept(tmp_path: Path, vector: SteeringVector) -> None:
    w = torch.randn(32, generator=torch.Generator().manual_seed(0))
    latent = Readout(HookPoint("resid_post", 1), w, -0.5, floor=0.125)
    others = {
        "energy": energy(w, "resid_mid.1"),
        "cosine": cosine(w, "resid_mid.1"),
        "probe": probe(w, 2.0, "resid_mid.1"),
    }
    readouts = {**others, "latent": latent}
    assert list(readouts) == list(READOUTS)
    assert [kind_of(readout) for readout in readouts.values()] == list(readouts)
    joined: Condition = gate("first", on=3.0, off=None, calibration={"n": 3, "rate": 0.1})
    for kind, readout in readouts.items():
        joined = joined & gate(kind, readout)
    save_library(tmp_path, [replace(vector, gate=joined)])
    kept = load_library(tmp_path)["up"].gate
    assert kept is not None
    for one, other in zip(gates_of(joined), gates_of(kept), strict=True):
        same = [(r.hook_point, r.bias, r.floor, r.absolute, r.relative) for r in (one.readout, other.readout)]
        assert same[0] == same[1]
        assert (one.calibration, one.min_tokens, one.model) == (other.calibration, other.min_tokens, other.model)
        assert torch.equal(one.readout.weight, other.readout.weight)
    assert "| first, energy, cosine, probe, latent |" in (tmp_path / "README.md").read_text()


def test_a_library_steers_with_its_gate(tmp_path: Path, tiny: LoadedModel, vector: SteeringVector) -> None:
    never, always = (gate("g", on=on, off=on) for on in (1e9, -1e9))
    ids = torch.tensor([[1, 5, 9, 4]])

    def logits(**changes: Any) -> torch.Tensor:
        save_library(tmp_path, [replace(vector, coefficient=3.0, **changes)])
        with torch.no_grad(), steering(tiny, [Intervention.of(load_library(tmp_path)["up"])]):
            return tiny.model(ids).logits

    with torch.no_grad():
        plain = tiny.model(ids).logits
    assert torch.equal(logits(gate=never), plain)
    assert torch.equal(logits(gate=always), logits())
    assert not torch.equal(logits(), plain)
    assert Intervention.of(replace(vector, gate=never), gate=always).gate is always
    calibrated = calibrate(tiny, never.readout, ["one two", "three four five"], 0.5)
    other = replace(calibrated, model="of others")
    assert torch.isfinite(logits(gate=calibrated)).all()
    with pytest.raises(MismatchError, match="other weights"):
        logits(gate=other)


def test_equal_gates_of_a_library_are_one_and_run_once(
    tmp_path: Path, tiny: LoadedModel, vector: SteeringVector
) -> None:
    vectors = [replace(vector, name=name, gate=gate("g")) for name in ("one", "two")]
    save_library(tmp_path, vectors)
    one, two = load_library(tmp_path).values()
    assert one.gate is two.gate
    with steering(tiny, [Intervention.of(one, 1.0), Intervention.of(two, 1.0)]):
        pass


def deep(n: int) -> Condition:
    condition: Condition = POOL[0]
    for _ in range(n):
        condition = ~condition
    return condition


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (gate("x") & gate("x", on=3.0), "one of this name"),
        (gate("x", on=float("inf")), "finite"),
        (gate("x", Readout(HookPoint("resid_post", 0), torch.ones(32), absolute=True)), "energy, cosine"),
        (deep(MAX_NODES), "simpler"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_writing(
    tmp_path: Path, vector: SteeringVector, bad: Condition, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        save_library(tmp_path / "new", [replace(vector, gate=bad)])
    assert not (tmp_path / "new").exists()


def edit(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda entry: entry["gates"][0].update(changes)


@pytest.mark.parametrize(
    "damage",
    [
        edit(kind="pickle"), edit(on=float("nan")), edit(on="high"), edit(on=True), edit(off=99.0), edit(min_tokens=0),
        edit(min_tokens=1.5), edit(hook_point="resid_post.x"), edit(hook_point=3), edit(model=3), edit(calibration=[]),
        edit(weight="none"), edit(weight=3), edit(weight="short"), edit(weight="whole"), edit(weight="nan"),
        edit(name="other"), edit(name=[]),
        lambda entry: entry["gates"].append(entry["gates"][0]),
        lambda entry: entry["gates"][0].pop("on"),
        lambda entry: entry.update(when={"xor": ["a", "a"]}),
        lambda entry: entry.update(when={"and": ["a", "a"], "or": ["a", "a"]}),
        lambda entry: entry.update(when={"and": ["a"]}),
        lambda entry: entry.update(when=["a"]),
        lambda entry: entry.update(when={}),
        lambda entry: entry.update(when=eval("{'not':" * 50 + "'a'" + "}" * 50)),
        lambda entry: entry.clear(),
    ],
)  # fmt: skip
def test_a_gate_that_was_tampered_with_is_one_error(
    tmp_path: Path, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch, damage: Callable[[dict[str, Any]], Any]
) -> None:
    """By someone who also made the hash right."""
    extra = {"short": np.ones(31, np.float32), "whole": np.ones(32, np.int32), "nan": np.full(32, np.nan, np.float32)}

    def save(arrays: dict[str, np.ndarray]) -> bytes:
        return save_tensors(arrays | extra)

    save_tensors = library.save_tensors
    monkeypatch.setattr(library, "save_tensors", save)
    entries = library.entry_of_vector

    def damaged(*args: Any) -> dict[str, Any]:
        entry = entries(*args)
        damage(entry["gate"])
        return entry

    monkeypatch.setattr(library, "entry_of_vector", damaged)
    save_library(tmp_path, [replace(vector, gate=gate("a"))])
    with pytest.raises((CorruptArtefactError, LookupError)) as caught:
        load_library(tmp_path)
    assert "expected" in str(caught.value)

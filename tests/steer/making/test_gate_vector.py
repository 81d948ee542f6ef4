"""Gates of library vectors, calibrated on texts: what was chosen on, what was not, and that they are kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from activations.errors import ConfigError, MismatchError, TextError
from activations.models import LoadedModel
from steer.gates import Gate, calibrate, cosine, peak
from steer.library import load_library, save_library
from steer.making.config import GateConfig
from steer.making.gate_vector import gate_vector
from steer.operations import Intervention
from steer.runtime import steering
from steer.vectors import SteeringVector

QUIET = [f"the {thing} is here and {i}" for i, thing in enumerate(["cat", "dog", "road", "sea", "mill", "man"] * 4)]
FIRES = ["run 12 34 56", "la la la la", "on and on and on"]


@pytest.fixture
def config(tmp_path: Path, vector: SteeringVector) -> GateConfig:
    save_library(tmp_path / "library", [vector, replace(vector, name="b@resid_post.2", hook_point="resid_post.2"),
                                        replace(vector, name="b@resid_post.1")])  # fmt: skip
    for name, texts in (("quiet", QUIET), ("fires", FIRES)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts) + "\n")
    files = {"library": tmp_path / "library", "quiet": tmp_path / "quiet.txt", "fires": tmp_path / "fires.txt"}
    return GateConfig(vector="up", rate=0.2, **files)


def changed(config: GateConfig, **changes: Any) -> GateConfig:
    return config.model_copy(update=changes)


def test_a_gate_is_chosen_on_one_half_and_counted_on_the_rest(
    config: GateConfig, tiny: LoadedModel, vector: SteeringVector
) -> None:
    shown = gate_vector(config, tiny)
    readout = cosine(torch.from_numpy(vector.direction), "resid_post.1")
    expected = calibrate(tiny, readout, QUIET[::2], 0.2)
    assert (shown["on"], shown["off"]) == pytest.approx((expected.on, expected.off))
    for name, texts in (("false_alarms", QUIET[1::2]), ("hits", FIRES)):
        share = sum(peak(tiny, readout, text) > expected.on for text in texts) / len(texts)
        assert (shown[name]["share"], shown[name]["n"]) == (pytest.approx(share), len(texts))
        assert shown[name]["low"] <= share <= shown[name]["high"]
    kept = load_library(config.library)["up"].gate
    assert isinstance(kept, Gate)
    assert (kept.on, kept.name, kept.model) == (pytest.approx(expected.on), "up", tiny.fingerprint)
    assert kept.calibration["hits"] == shown["hits"]
    assert load_library(config.library)["b@resid_post.1"].gate is None


def test_vectors_that_belong_together_share_a_gate(config: GateConfig, tiny: LoadedModel) -> None:
    shown = gate_vector(changed(config, vector="b", kind="energy", min_tokens=3), tiny)
    assert (shown["vectors"], shown["hook_point"]) == (["b@resid_post.1", "b@resid_post.2"], "resid_post.1")
    library = load_library(config.library)
    one, two = library["b@resid_post.1"], library["b@resid_post.2"]
    assert one.gate is two.gate
    with steering(tiny, [Intervention.of(each, 1.0) for each in (one, two)]) as steered:
        with torch.no_grad():
            tiny.model(torch.tensor([[1, 5, 9]]))
        assert list(steered.fired()[0]) == ["b"]


def test_mistakes(config: GateConfig, tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no later than resid_post\.1"):
        gate_vector(changed(config, hook_point="resid_post.2"), tiny)
    with pytest.raises(ConfigError, match="99 texts"):
        gate_vector(changed(config, rate=0.01), tiny)
    with pytest.raises(MismatchError, match="one of"):
        gate_vector(config, replace(tiny, fingerprint="f"))
    with pytest.raises(TextError, match="readable"):
        gate_vector(changed(config, fires=tmp_path / "none.txt"), tiny)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(TextError, match="a text a line"):
        gate_vector(changed(config, quiet=tmp_path / "empty.txt"), tiny)

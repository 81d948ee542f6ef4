"""The layer sweep: one pass for all layers, one reader for all, and a choice that says why."""

import json
from pathlib import Path

import numpy as np
import pytest

from activations.errors import HookPointError, TextError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.making.config import LayersConfig
from steer.making.contrast import fit_quality, from_contrast, read_sides
from steer.making.layers import LayerTrial, as_result, choose_layer, sweep_layers
from steer.measures.effect import states
from steer.pairs import load_pairs

ROWS = [
    ("The river", " ran on to the sea.", " stood still.", "fit"),
    ("A cat", " sat and looked on.", " was not there.", "fit"),
    ("Two men", " walked on and on.", " stayed at home.", "fit"),
    ("The mill", " went round.", " stopped early.", "heldout"),
    ("A road", " led on to the town.", " ended here.", "heldout"),
]


def config(folder: Path, **changes: object) -> LayersConfig:
    keys = ("prompt", "positive", "negative", "split")
    file = folder / "flow.jsonl"
    file.write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in ROWS))
    base = {"contrast": str(file), "prompts": 2, "max_new_tokens": 3, "out": folder / "out"}
    return LayersConfig.parse(base | changes, "test")


def test_all_layers_are_read_in_one_pass_as_each_alone(tiny: LoadedModel, tmp_path: Path) -> None:
    pairs = load_pairs(config(tmp_path).contrast)[:2]
    points = [HookPoint("resid_post", layer) for layer in (0, 2, 3)]
    passes = []
    handle = tiny.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    together = read_sides(tiny, points, pairs)
    handle.remove()
    assert len(passes) == 2, "one a side"
    for point in points:
        for side in ("positive", "negative"):
            texts = [getattr(pair, side) for pair in pairs]
            alone = [x.mean(0).numpy() for x in states(tiny, point, [pair.prompt for pair in pairs], texts)]
            np.testing.assert_allclose(getattr(together[point], side), alone, atol=1e-5)


def test_a_sweep_has_the_figures_of_each_layers_vector(tiny: LoadedModel, tmp_path: Path) -> None:
    settings = config(tmp_path)
    sweep = sweep_layers(settings, tiny)
    assert [trial.hook_point for trial in sweep.trials] == [f"resid_post.{i}" for i in range(4)]
    pairs = load_pairs(settings.contrast)
    for trial in sweep.trials:
        vector = from_contrast(tiny, trial.hook_point, "flow", pairs)
        assert trial.heldout_auroc == vector.source["heldout_auroc"]
        assert trial.heldout_accuracy == vector.source["heldout_accuracy"]
        assert trial.stability == pytest.approx(vector.source["stability"], abs=1e-6)
        assert trial.coefficient == pytest.approx(0.4 * vector.mean_norm)
    best = max(trial.heldout_auroc for trial in sweep.trials)
    assert next(t for t in sweep.trials if t.hook_point == sweep.reader).heldout_auroc == best
    assert sweep.reader in sweep.caveat
    written = json.loads((settings.out / "layers.json").read_text())
    assert written["chosen"] == sweep.chosen
    assert list(written["layers"]) == [trial.hook_point for trial in sweep.trials]
    picture = (settings.out / "layers.svg").read_text()
    assert picture.startswith("<svg")
    assert written["layers"] == json.loads(json.dumps(as_result(sweep)["layers"]))


def test_layers_are_chosen_and_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    assert [t.hook_point for t in sweep_layers(config(tmp_path, layers=[3, 1]), tiny).trials] == [
        "resid_post.1", "resid_post.3",
    ]  # fmt: skip
    assert len(sweep_layers(config(tmp_path, step=3), tiny).trials) == 2
    with pytest.raises(HookPointError, match="0 to 3"):
        sweep_layers(config(tmp_path, layers=[4]), tiny)
    with pytest.raises(HookPointError, match="SITE"):
        sweep_layers(config(tmp_path, site="nowhere"), tiny)
    few = config(tmp_path)
    Path(few.contrast).write_text("\n".join(Path(few.contrast).read_text().splitlines()[:4]))
    with pytest.raises(TextError, match="two held-out"):
        sweep_layers(few, tiny)


def trial(layer: int, effect: float, low: float, nll: float, sound: bool) -> LayerTrial:
    return LayerTrial(
        f"resid_post.{layer}", 1.0, 1.0, 1.0, 1.0, None, 1.0, 0.0, effect, (low, effect + 0.1), nll, 0.0, sound
    )


def test_the_choice_is_the_largest_effect_within_bounds() -> None:
    trials = [trial(0, 0.9, 0.8, 3.0, False), trial(1, 0.4, 0.2, 0.5, True), trial(2, 0.3, 0.1, 0.1, True)]
    chosen, why = choose_layer(trials, 1.0, 0.1)
    assert chosen.hook_point == "resid_post.1"
    assert "+0.400, of the 2 layers of 3" in why
    assert "1 others lie within its interval" in why
    _, why = choose_layer([trial(1, 0.1, -0.2, 0.5, True)], 1.0, 0.1)
    assert "take no layer on this evidence" in why
    chosen, why = choose_layer([trial(0, 0.9, 0.8, 3.0, False), trial(1, 0.5, 0.4, 2.0, False)], 1.0, 0.1)
    assert chosen.hook_point == "resid_post.1"
    assert "At no layer" in why


def test_stability_of_one_layer_is_as_elsewhere(tiny: LoadedModel, tmp_path: Path) -> None:
    settings = config(tmp_path, layers=[2])
    pairs = [pair for pair in load_pairs(settings.contrast) if pair.split == "fit"]
    read = read_sides(tiny, [HookPoint("resid_post", 2)], pairs)[HookPoint("resid_post", 2)]
    d = read.positive - read.negative
    direction = d.mean(0) / np.linalg.norm(d.mean(0))
    expected = fit_quality(d, direction, "mean", 0)["stability"]
    assert sweep_layers(settings, tiny).trials[0].stability == pytest.approx(expected, abs=1e-5)

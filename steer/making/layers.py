"""Where to steer: one contrast at every layer.

Flow of `sweep_layers`:
1. all hook points are read in one pass over the pairs, and each gets its own direction from the fit pairs;
2. how far it can be believed: stability, and AUROC and accuracy on the held-out pairs;
3. what it does, at one dose for all: selection prompts are continued and read again by one and the same reader, the
   layer that tells held-out pairs apart best, so that layers are not compared by rulers of their own; and `shift`, the
   nats a token by which held-out positive sides gain on negative ones, for which nothing is read at all;
4. `choose_layer`: the largest effect among the layers whose text costs and repeats no more than allowed.

Left out: several layers at once (`steer.operations.schedule`), and the dose of the chosen one (`saekit vector make`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from activations.errors import ConfigError, TextError
from activations.hook_points import HookPoint
from activations.models import LoadedModel, load_model
from sae.charts import BLUE, GREY, ORANGE, figure, svg
from sae.metrics import means
from steer.generate import generate_conditions
from steer.making.config import LayersConfig
from steer.making.contrast import (
    Read,
    direction_of,
    fit_quality,
    gains,
    midpoint_of,
    read_sides,
    separation,
)
from steer.making.make import load_prompts
from steer.measures.effect import Concept, contrast_reader, rate, reread
from steer.operations import Intervention
from steer.pairs import ContrastPair, load_pairs
from steer.vectors import SteeringVector

AT_ONCE = 8
"""layers whose texts are generated in one batch"""
CAVEAT = (
    "One seed, one dose and few prompts: layers whose intervals overlap are not told apart. The effect is read at "
    "{reader}, which favours directions like its own; shift does not depend on it. Choose the dose at the layer by "
    "itself, with saekit vector make, which measures on prompts that this choice never saw."
)


@dataclass(frozen=True)
class LayerTrial:
    """One layer; intervals are 95%, bootstrapped over pairs or prompts."""

    hook_point: str
    mean_norm: float
    coefficient: float
    stability: float
    heldout_auroc: float
    heldout_auroc_ci95: tuple[float, float] | None
    heldout_accuracy: float
    shift: float
    """nats a token"""
    effect: float
    effect_ci95: tuple[float, float] | None
    nll_rise: float
    repetition_rise: float
    sound: bool
    """whether cost and repetition are within bounds"""


@dataclass(frozen=True)
class LayerSweep:
    """All layers, and the one to take."""

    trials: list[LayerTrial]
    chosen: str
    why: str
    caveat: str
    reader: str
    """hook point at which the effect was read"""


def sweep_layers(config: LayersConfig, loaded: LoadedModel | None = None) -> LayerSweep:
    """Try every layer, and write `layers.json` and `layers.svg` to the directory `config.out`.

    Raises: HookPointError for a layer or site that the model does not have; TextError without pairs of both splits.
    """
    loaded = loaded or load_model(config.model, device=config.device)
    points = _points(config, loaded)
    pairs = load_pairs(config.contrast)
    fit, heldout = ([pair for pair in pairs if pair.split == split] for split in ("fit", "heldout"))
    if len(fit) < 2 or len(heldout) < 2:
        got, fix = f"{len(fit)} and {len(heldout)}", "Add pairs, or mark some as held out."
        raise TextError(config.contrast, expected="two fit and two held-out pairs or more", got=got, fix=fix)
    read = read_sides(loaded, points, fit)
    read_heldout = read_sides(loaded, points, heldout)
    vectors = {point: _vector(config, loaded, point, read[point]) for point in points}
    apart = {point: _apart(vectors[point], read_heldout[point], config.seed) for point in points}
    best = max(points, key=lambda point: (apart[point]["heldout_auroc"], apart[point]["heldout_accuracy"], point.layer))
    figures = _steered(config, loaded, [*vectors.values()], contrast_reader(vectors[best]))
    trials = []
    for row, (point, vector) in zip(figures, vectors.items(), strict=True):
        quality = fit_quality(read[point].positive - read[point].negative, vector.direction, config.method, config.seed)
        trials.append(_trial(config, loaded, vector, {**apart[point], **quality, **row}, heldout))
    chosen, why = choose_layer(trials, config.max_nll_rise, config.max_repetition_rise)
    sweep = LayerSweep(trials, chosen.hook_point, why, CAVEAT.format(reader=best), str(best))
    _write(config, sweep)
    return sweep


def choose_layer(
    trials: Sequence[LayerTrial], max_nll_rise: float, max_repetition_rise: float
) -> tuple[LayerTrial, str]:
    """The trial with the largest effect among those that are sound, or else the one whose text costs least; and why."""
    sound = [trial for trial in trials if trial.sound]
    bounds = f"{max_nll_rise:g} nats a token more than unsteered text and repeats at most {max_repetition_rise:g} more"
    if not sound:
        least = min(trials, key=lambda trial: trial.nll_rise)
        return least, f"At no layer does steered text cost at most {bounds}; this one costs least. Lower the dose."
    best = max(sound, key=lambda trial: trial.effect)
    low = best.effect_ci95[0] if best.effect_ci95 is not None else best.effect
    alike = sum(trial.effect >= low for trial in sound) - 1
    why = (
        f"The largest effect, {best.effect:+.3f}, of the {len(sound)} layers of {len(trials)} whose text costs at most"
    )
    why = f"{why} {bounds}"
    why += f"; {alike} others lie within its interval." if alike else "."
    return best, why if low > 0 else f"{why} Its interval includes 0: take no layer on this evidence."


def _points(config: LayersConfig, loaded: LoadedModel) -> list[HookPoint]:
    layers = sorted(set(config.layers)) or range(0, loaded.n_layers, config.step)
    sites = loaded.family.sites(loaded.model.config)
    points = [HookPoint.parse(f"{config.site}.{layer}").check(loaded.n_layers, sites) for layer in layers]
    if not points:
        raise ConfigError("key 'layers'", expected="a layer", got="none", fix="Leave it out to try all.")
    return points


def _vector(config: LayersConfig, loaded: LoadedModel, point: HookPoint, read: Read) -> SteeringVector:
    direction = direction_of(read.positive - read.negative, config.method).astype(np.float32)
    source = {
        "kind": "contrast",
        "contrast": Path(config.contrast).stem,
        "method": config.method,
        "midpoint": midpoint_of(read.positive, read.negative, direction),
    }
    return SteeringVector(f"layer {point.layer}", direction, str(point), loaded.ref, read.mean_norm, source)


def _apart(vector: SteeringVector, read: Read, seed: int) -> dict[str, Any]:
    return separation(read.positive @ vector.direction, read.negative @ vector.direction, seed)


def _steered(
    config: LayersConfig, loaded: LoadedModel, vectors: Sequence[SteeringVector], concept: Concept
) -> list[dict[str, Any]]:
    """Rate, cost and repetition of each prompt's text beside unsteered ones of the same seed, a row a vector."""
    prompts = load_prompts("select")[: config.prompts]
    limits = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
    rows = []
    for start in range(0, len(vectors), AT_ONCE):
        some = vectors[start : start + AT_ONCE]
        steered = [[Intervention.of(vector, vector.coefficient_of(config.dose))] for vector in some]
        texts = generate_conditions(loaded, [[], *steered], prompts, **limits)
        flat = [text for row in texts for text in row]
        readings = reread(loaded, concept.hook_point, [*prompts] * len(texts), flat)
        table = np.array([[rate(each, concept), each.nll, each.repetition] for each in readings])
        plain, *others = table.reshape(len(texts), len(prompts), 3)
        rows += [_rise(other - plain, config.seed) for other in others]
    return rows


def _rise(change: Float[np.ndarray, "prompt 3"], seed: int) -> dict[str, Any]:
    effect = means({"effect": change[:, 0]}, seed)
    return {**effect, "nll_rise": float(change[:, 1].mean()), "repetition_rise": float(change[:, 2].mean())}


def _trial(
    config: LayersConfig,
    loaded: LoadedModel,
    vector: SteeringVector,
    found: dict[str, Any],
    heldout: Sequence[ContrastPair],
) -> LayerTrial:
    return LayerTrial(
        hook_point=vector.hook_point,
        mean_norm=vector.mean_norm,
        coefficient=vector.coefficient_of(config.dose),
        stability=found["stability"],
        heldout_auroc=found["heldout_auroc"],
        heldout_auroc_ci95=_both(found["heldout_auroc_ci95"]),
        heldout_accuracy=found["heldout_accuracy"],
        shift=float(gains(loaded, vector, heldout, config.dose).mean()),
        effect=found["effect"],
        effect_ci95=_both(found.get("effect_ci95")),
        nll_rise=found["nll_rise"],
        repetition_rise=found["repetition_rise"],
        sound=found["nll_rise"] <= config.max_nll_rise and found["repetition_rise"] <= config.max_repetition_rise,
    )


def _both(values: Sequence[float] | None) -> tuple[float, float] | None:
    return None if values is None else (float(values[0]), float(values[1]))


def as_result(sweep: LayerSweep) -> dict[str, Any]:
    """What the command shows: the choice, and a row a layer."""
    rows = {
        trial.hook_point: {
            "AUROC": trial.heldout_auroc,
            "accuracy": trial.heldout_accuracy,
            "stability": trial.stability,
            "shift": trial.shift,
            "effect": trial.effect,
            "low": None if trial.effect_ci95 is None else trial.effect_ci95[0],
            "high": None if trial.effect_ci95 is None else trial.effect_ci95[1],
            "nll rise": trial.nll_rise,
            "repetition rise": trial.repetition_rise,
            "sound": trial.sound,
        }
        for trial in sweep.trials
    }
    said = {"chosen": sweep.chosen, "why": sweep.why, "caveat": sweep.caveat, "reader": sweep.reader}
    return {**said, "layers": rows}


def _write(config: LayersConfig, sweep: LayerSweep) -> None:
    config.save(config.out / "config.yaml")
    content = {"config": config.model_dump(mode="json"), **as_result(sweep)}
    (config.out / "layers.json").write_text(json.dumps(content, indent=2) + "\n")
    (config.out / "layers.svg").write_text(picture(sweep, config))


def picture(sweep: LayerSweep, config: LayersConfig) -> str:
    """The sweep as SVG: how well sides are told apart, what steering does, and what it costs."""
    drawn, axes = figure(3, 1, (7.2, 6.6))
    layers = [HookPoint.parse(trial.hook_point).layer for trial in sweep.trials]
    apart, effect, cost = axes
    apart.plot(layers, [trial.heldout_auroc for trial in sweep.trials], color=BLUE, marker=".", label="AUROC")
    apart.plot(layers, [trial.stability for trial in sweep.trials], color=GREY, marker=".", label="stability")
    apart.set(title="sides of held-out pairs told apart; directions of resampled fit pairs alike", ylim=(None, 1.03))
    effects = np.array([trial.effect for trial in sweep.trials])
    ends = np.array([trial.effect_ci95 or (trial.effect, trial.effect) for trial in sweep.trials])
    effect.axhline(0, color=GREY, linewidth=0.8)
    spread = np.abs(ends.T - effects)
    effect.errorbar(
        layers, effects, yerr=spread, color=BLUE, marker=".", capsize=2, linewidth=1.2, label="effect on rate"
    )
    shifts = [trial.shift for trial in sweep.trials]
    effect.plot(layers, shifts, color=GREY, marker=".", linewidth=1.2, label="shift, nats a token")
    effect.set(title=f"what steering does at dose {config.dose:g}, read at {sweep.reader}; 95% intervals over prompts")
    cost.axhline(config.max_nll_rise, color=ORANGE, linestyle=":", label="allowed")
    cost.plot(
        layers, [trial.nll_rise for trial in sweep.trials], color=BLUE, marker=".", label="rise of the text's cost"
    )
    cost.set(title="what it costs, nats a token", xlabel=f"0-based block ({config.site}); dashed: chosen")
    for axis in axes:
        axis.axvline(HookPoint.parse(sweep.chosen).layer, color=ORANGE, linestyle="--", linewidth=1)
        axis.title.set_fontsize(9)
        axis.legend(fontsize=7, frameon=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return str(svg(drawn))

"""Between which coefficients a vector works and does no harm, and which of them is the best.

Flow:
1. the concept is rebuilt from the vector's source, and the prompts are cut into two halves;
2. each dose of a grid is tried on the first half (`steer.measures.effect`). A dose works if the lower end of the 95%
   interval of its effect is above 0, and cost, repetition and KL are within bounds;
3. the window is the run of working doses around the one with the highest effect, below the first that is out of bounds:
   harm only grows with the dose, so what lies beyond is not believed. Both its ends are refined, by trying the dose
   in the middle between an end and its neighbour that does not work;
4. both ends and the chosen dose are measured on the other half, on which nothing was chosen. That is what is reported;
5. window, coefficient and receipt go into the library. If no dose works, nothing does.

Vectors NAME@HOOK_POINT are one group: a dose is that of its lead, the others keep their share of it (`steer.groups`),
the concept is read as that of the last one, and each gets its own coefficient and window.

From then on the runtime refuses coefficients beyond the window, either way, unless forced (`steer.plan`). Left out:
operations that take away, which have a strength of 0 to 1 and no dose.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from activations.errors import ConfigError, TextError
from activations.models import LoadedModel, Status, load_model
from activations.text import documents
from steer.groups import Group, group_of
from steer.library import find_vectors
from steer.making.make import add_to_library, load_prompts
from steer.measures.concepts import concept_of
from steer.measures.effect import Arm, Bounds, DoseTrial, choose_dose, sweep_doses, try_arms
from steer.packs.installed import check_own
from steer.pairs import load_pairs
from steer.receipts.config import CalibrateConfig
from steer.vectors import SteeringVector

Sweep = Callable[[Sequence[float]], list[DoseTrial]]
"""from doses to trials, of which the first is that of dose 0"""


class Window(NamedTuple):
    """A run of doses that work."""

    low: DoseTrial
    chosen: DoseTrial
    high: DoseTrial


class Halves(NamedTuple):
    """Prompts without a text in common."""

    picked: list[str]
    """on which the window is found and the dose chosen"""
    reported: list[str]
    """on which both are measured"""


def calibrate_vector(
    config: CalibrateConfig, loaded: LoadedModel | None = None, *, on_status: Status | None = None
) -> list[SteeringVector]:
    """Find the window of a vector of a library, or of a group of them, and store it there with coefficient and receipt.

    Args:
      on_status: told in one line which doses are tried.
    Returns: the vector, or those of its group in the order of a pass.
    Raises: ConfigError if no dose works, the library is an installed one, or the vector's operation has no dose.
    """
    check_own(config.library)
    vectors = find_vectors(config.library, config.vector or None)
    if ablating := [vector.name for vector in vectors if vector.operation == "ablate"]:
        raise ConfigError(
            f"vector '{ablating[0]}'",
            expected="an operation that adds, whose dose can be chosen",
            got="ablate, whose strength of 1 takes away all there is",
            fix="Calibrate a vector that adds.",
        )
    pairs = load_pairs(config.pairs) if config.pairs else None
    concept, prompts = concept_of(vectors[-1], config.sae, pairs), halves_of(config)
    say = on_status or (lambda line: None)
    loaded = loaded or load_model(config.model, device=config.device, on_status=on_status)
    limits: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
    bounds = Bounds(config.max_nll_rise, config.max_repetition_rise, config.max_kl)
    unsteered = try_arms(loaded, concept, prompts.picked, [Arm("unsteered", [])], **limits)

    def sweep(doses: Sequence[float]) -> list[DoseTrial]:
        say(f"calibrate: doses {', '.join(f'{dose:.3g}' for dose in doses)} on {len(prompts.picked)} prompts")
        return sweep_doses(loaded, vectors, concept, prompts.picked, doses, unsteered=unsteered, **limits)

    found = search(sweep, config.doses, bounds, config.refine)
    if found.window is None:
        raise _none_works(vectors, found.trials, bounds)
    doses = sorted({trial.dose for trial in found.window})
    limits["seed"] += 1
    say(f"calibrate: the window on {len(prompts.reported)} other prompts")
    reported = sweep_doses(loaded, vectors, concept, prompts.reported, doses, **limits)
    receipt = {**figures_of(found, reported, bounds), **_settings(config, prompts)}
    calibrated = _stored(group_of(vectors), found.window, receipt)
    add_to_library(config.library, *calibrated)
    return calibrated


class Found(NamedTuple):
    """What a search led to."""

    window: Window | None
    trials: list[DoseTrial]
    """the first is that of dose 0, the others have rising doses"""


def search(sweep: Sweep, doses: Sequence[float], bounds: Bounds, refine: int) -> Found:
    """Try a grid of doses, and then `refine` times the middles between the ends of the window and what is outside."""
    trials = _sorted(sweep(doses))
    window = find_window(trials, bounds)
    for _ in range(refine if window is not None else 0):
        assert window is not None
        middles = edges(trials, window)
        if not middles:
            break
        trials = _sorted([*trials, *sweep(middles)[1:]])
        window = find_window(trials, bounds) or window
    return Found(window, trials)


def find_window(trials: Sequence[DoseTrial], bounds: Bounds) -> Window | None:
    """The run of working doses around the one with the highest effect; none if no dose works.

    Args:
      trials: the first is that of dose 0; the others have rising doses.
    """
    sound = list(takewhile(bounds.allow, trials[1:]))
    working = [trial for trial in sound if works(trial, bounds)]
    if not working:
        return None
    chosen = choose_dose([trials[0], *working], bounds)
    at = sound.index(chosen)
    below = list(takewhile(lambda trial: works(trial, bounds), reversed(sound[: at + 1])))
    above = list(takewhile(lambda trial: works(trial, bounds), sound[at:]))
    return Window(below[-1], chosen, above[-1])


def works(trial: DoseTrial, bounds: Bounds) -> bool:
    """Whether a dose has an effect and does no harm."""
    return trial.effect_low > 0 and bounds.allow(trial)


def edges(trials: Sequence[DoseTrial], window: Window) -> list[float]:
    """Doses in the middle, as a ratio, between each end of a window and the trial outside; none at an end of a grid."""
    doses = [trial.dose for trial in trials[1:]]
    low, high = doses.index(window.low.dose), doses.index(window.high.dose)
    pairs = [doses[low - 1 : low + 1] if low else [], doses[high : high + 2]]
    return [math.sqrt(pair[0] * pair[1]) for pair in pairs if len(pair) == 2]


def figures_of(found: Found, reported: Sequence[DoseTrial], bounds: Bounds) -> dict[str, Any]:
    """What a calibration says of itself; its own figures are those of the half that nothing was chosen on."""
    window, by_dose = found.window, {round(trial.dose, 9): trial for trial in reported}
    assert window is not None
    low, chosen, high = (by_dose[round(trial.dose, 9)] for trial in window)
    return {
        "ends_with_grid": [window.low == found.trials[1], window.high == found.trials[-1]],
        "holds": works(chosen, bounds),
        "effect": chosen.effect,
        "effect_ci95": [chosen.effect_low, chosen.effect_high],
        "effect_when_picked": window.chosen.effect,
        "kl": chosen.kl,
        "nll_rise": chosen.nll_rise,
        "repetition_rise": chosen.repetition_rise,
        "bounds": bounds._asdict(),
        "picked": [_row(trial, bounds) for trial in found.trials],
        "reported": {
            name: _row(trial, bounds)
            for name, trial in (("unsteered", reported[0]), ("low", low), ("chosen", chosen), ("high", high))
        },
    }


def halves_of(config: CalibrateConfig) -> Halves:
    """Two halves of prompts: of the shipped ones by their split, of others by chance.

    Raises: TextError for less than four different texts.
    """
    n = config.n_prompts
    if config.prompts is None:
        return Halves(load_prompts("select")[:n], load_prompts("heldout")[:n])
    texts = list(dict.fromkeys(document.text for document in documents(config.prompts)))
    if len(texts) < 4:
        raise TextError(config.prompts, expected="4 different prompts or more", got=len(texts), fix="Add some.")
    order = [texts[i] for i in np.random.default_rng(config.seed).permutation(len(texts))]
    middle = len(order) // 2
    return Halves(order[:middle][:n], order[middle:][:n])


def _stored(group: Group, window: Window, receipt: dict[str, Any]) -> list[SteeringVector]:
    """The calibrated vectors, each with its own figures, and without what an earlier calibration said."""
    chosen, low, high = (group.at(each.coefficient) for each in (window.chosen, window.low, window.high))
    together = {each.name: {"coefficient": each.coefficient, "dose": each.dose(each.coefficient)} for each in chosen}
    stored = []
    for vector, *ends in zip(chosen, low, high, strict=True):
        coefficients = sorted(end.coefficient for end in ends)
        own = {
            "kind": "calibration",
            **together[vector.name],
            "window": coefficients,
            "window_doses": [vector.dose(end.coefficient) for end in ends],
            **({"group": together} if len(chosen) > 1 else {}),
            **receipt,
        }
        others = [each for each in vector.receipts if each.get("kind") != "calibration"]
        stored.append(replace(vector, window=(coefficients[0], coefficients[1]), receipts=[*others, own]))
    return stored


def _settings(config: CalibrateConfig, prompts: Halves) -> dict[str, Any]:
    return {
        "prompts": config.prompts,
        "n_picked": len(prompts.picked),
        "n_reported": len(prompts.reported),
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }


def _row(trial: DoseTrial, bounds: Bounds) -> dict[str, Any]:
    return {**trial._asdict(), "works": works(trial, bounds)}


def _sorted(trials: Sequence[DoseTrial]) -> list[DoseTrial]:
    return sorted(trials, key=lambda trial: trial.dose)


def _none_works(vectors: Sequence[SteeringVector], trials: Sequence[DoseTrial], bounds: Bounds) -> ConfigError:
    sound = list(takewhile(bounds.allow, trials[1:]))
    if sound:
        best = max(sound, key=lambda trial: trial.effect)
        got = f"none: up to dose {sound[-1].dose:.3g} text stays within bounds, and the best effect is"
        got += f" {best.effect:+.3f} (from {best.effect_low:+.3f} to {best.effect_high:+.3f})"
    else:
        first = trials[1]
        got = f"none: at dose {first.dose:.3g} cost is up by {first.nll_rise:.2f}, repetition by"
        got += f" {first.repetition_rise:.2f}, KL {first.kl:.2f}"
    return ConfigError(
        f"vector '{', '.join(vector.name for vector in vectors)}'",
        expected="a coefficient with an effect above 0 and text within bounds",
        got=got,
        fix="Nothing was changed. Try lower doses, more prompts, wider bounds, or make another vector.",
    )

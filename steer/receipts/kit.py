"""What the vectors of a kit do together: the effect of each in the company of the others, and what the text costs.

Flow: 1. each vector's concept is found from its source; 2. arms continue the same prompts: unsteered, the whole kit,
what it is for asked in words, and random directions of the same lengths; 3. the unsteered model re-reads what they
wrote, once for each concept; 4. the receipt goes into the kit of the library.

    effect = mean over the vectors of the rise in the share of tokens on which each one's concept shows

Left out: stacking vectors in all orders (`steer.receipts.interference`), choosing factors.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from activations.errors import UnknownNameError
from activations.models import LoadedModel, load_model
from steer.composition import joint_doses
from steer.library import Library
from steer.making.make import load_prompts
from steer.manifest import SAE
from steer.measures.concepts import concept_of
from steer.measures.effect import Arm, Outcome, bootstrap_interval, examples_of_arms, kl_of, try_arms
from steer.operations import Intervention
from steer.pack import Kit
from steer.packs.installed import check_own
from steer.receipts.config import KitConfig
from steer.vectors import SteeringVector


def measure_kit(config: KitConfig, loaded: LoadedModel | None = None) -> Kit:
    """Measure the kit of `config`, and keep the receipt with it in its library.

    Raises: UnknownNameError listing the kits there are, and as `concept_of` and `steering` do.
    """
    check_own(config.library)
    library = Library.open(config.library)
    kit = next((each for each in library.kits if each.name == config.kit), None)
    if kit is None:
        known = ", ".join(each.name for each in library.kits) or "none yet"
        where = f"{config.library}: kit '{config.kit}'"
        raise UnknownNameError(where, expected=f"one of {known}", got=f"'{config.kit}'", fix="Correct the name.")
    loaded = loaded or load_model(config.model, device=config.device)
    members = {name: library.find(config.library, name)[-1] for name in kit.vectors}
    receipt = _measured(config, loaded, library.find(config.library, kit.name), members, kit)
    measured = kit.model_copy(update={"receipts": [*kit.receipts, receipt]})
    replace(library, kits=[measured if each is kit else each for each in library.kits]).save(config.library)
    return measured


def _measured(
    config: KitConfig,
    loaded: LoadedModel,
    vectors: list[SteeringVector],
    members: dict[str, SteeringVector],
    kit: Kit,
) -> dict[str, Any]:
    measure, rng = config.measure, np.random.default_rng(config.measure.seed)
    prompts = load_prompts("heldout")[: measure.heldout_prompts]
    asked = config.instruction or f"{kit.summary.rstrip('.')}."
    arms = [
        Arm("unsteered", []), Arm("steered", [Intervention.of(each, each.coefficient) for each in vectors]),
        Arm("prompt", [], asked),
        *(Arm("random", [Intervention.of(each.random(rng), each.coefficient) for each in vectors])
          for _ in range(measure.n_random)),
    ]  # fmt: skip
    sae = config.sae or config.library / SAE
    limits: dict[str, Any] = {"max_new_tokens": measure.max_new_tokens, "seed": measure.seed}
    found = {
        name: try_arms(loaded, concept_of(vector, sae), prompts, arms, **limits) for name, vector in members.items()
    }
    outcome: Outcome = next(iter(found.values()))
    gains = {name: each.rates - each.rates[0] for name, each in found.items()}
    together = np.mean([*gains.values()], axis=0)
    nlls, repetitions = outcome.nlls.mean(axis=1), outcome.repetitions.mean(axis=1)
    return {
        "kind": "kit", "factors": kit.vectors, "instruction": asked, "n_prompts": len(prompts), **limits,
        "joint_doses": joint_doses(vectors),
        **_figures(together, measure.seed),
        "vectors": {name: _figures(gain, measure.seed) for name, gain in gains.items()},
        "kl": kl_of(loaded, [arms[1].interventions], prompts, outcome.texts[0])[0],
        "nll_unsteered": float(nlls[0]), "nll_steered": float(nlls[1]), "nll_random": float(nlls[3:].mean()),
        "repetition_unsteered": float(repetitions[0]), "repetition_steered": float(repetitions[1]),
        "examples": examples_of_arms(prompts, outcome.texts),
    }  # fmt: skip


def _figures(gains: np.ndarray, seed: int) -> dict[str, Any]:
    return {
        "effect": float(gains[1].mean()),
        "effect_ci95": bootstrap_interval(gains[1], seed),
        "prompt_baseline_effect": float(gains[2].mean()),
        "random_control_effect": float(gains[3:].mean()),
    }

"""From a latent, several, a contrast or an instruction to a measured vector in a library.

Flow: 1. make the unit direction, as KINDS has it; 2. choose a dose on the `select` prompts, unless a coefficient is
given; 3. measure the receipt on the `heldout` prompts; 4. add the vector to the library, in place of one of the same
name. What takes a direction away is measured at strength 1, all of it, unless a coefficient is given.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from activations.errors import ConfigError
from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.belongs import check_belongs, check_store
from sae.torch_view import TorchSae
from steer.latents import Places, places_of
from steer.library import Library, group_name
from steer.making.config import MeasureConfig, VectorConfig
from steer.making.contrast import from_contrast
from steer.making.modifier import from_modifier, from_places, load_requests, request_prompt
from steer.measures.concepts import instruction_of
from steer.measures.effect import (
    Bounds,
    Concept,
    choose_dose,
    contrast_reader,
    latent_reader,
    latents_reader,
    measure,
    sweep_doses,
)
from steer.pairs import load_pairs
from steer.scopes import Scope
from steer.vectors import SteeringVector, from_latent, from_latents


class Made(NamedTuple):
    """A direction, and what it is measured with."""

    vector: SteeringVector
    concept: Concept
    prompts: "Prompts | None" = None
    """none: the shipped openings"""


class Prompts(NamedTuple):
    """What is continued to choose a dose, and to measure."""

    select: list[str]
    heldout: list[str]
    instructed: list[str] | None = None
    """held-out ones with the instruction in them; none: it is put in front"""


def make_vector(config: VectorConfig, loaded: LoadedModel | None = None) -> SteeringVector:
    """Make, dose and measure the vector of `config`, and add it to the library at `config.out`."""
    store, scope = ActivationStore.open(config.store), str(Scope.parse(config.scope))
    loaded = loaded or load_model(config.model, device=config.device)
    made = KINDS[config.kind](config, loaded, store)
    name = config.name or made.vector.name
    vector = replace(made.vector, name=name, operation=config.operation, scope=scope)
    if config.gate is not None:
        vector = replace(vector, gate=vector.energy_gate(config.gate, config.gate_off, config.gate_tokens))
    instruction, coefficient = config.instruction or default_instruction(config), config.coefficient
    if coefficient is None and config.operation == "ablate":
        coefficient = 1.0
    measured = dose_and_measure(loaded, vector, made.concept, config.measure, coefficient, instruction, made.prompts)
    add_to_library(config.out, measured)
    return measured


def _of_latent(config: VectorConfig, loaded: LoadedModel, store: ActivationStore) -> Made:
    if config.latent is None:
        raise ConfigError("key 'latent'", expected="a latent", got="none", fix="Write --set latent=123.")
    artefact, places, mean_norm = _sae(config, loaded, store)
    vector = from_latent(artefact, config.latent, store.meta.model, mean_norm)
    return Made(vector, latent_reader(TorchSae(artefact), config.latent, places.reads))


def _of_latents(config: VectorConfig, loaded: LoadedModel, store: ActivationStore) -> Made:
    if max(config.latents.values(), default=0.0) <= 0:
        fix = "Write --set latents='{12: 1.0, 34: 0.5}', or take what saekit vector find prints."
        raise ConfigError("key 'latents'", expected="latents, one of a weight above 0", got=config.latents, fix=fix)
    artefact, places, mean_norm = _sae(config, loaded, store)
    vector = from_latents(artefact, config.latents, store.meta.model, mean_norm)
    return Made(vector, latents_reader(TorchSae(artefact), config.latents, places.reads))


def _of_contrast(config: VectorConfig, loaded: LoadedModel, store: ActivationStore) -> Made:
    hook_point = _hook_point(config, loaded, store)
    name, pairs = Path(config.contrast).stem, load_pairs(config.contrast)
    vector = from_contrast(loaded, hook_point, name, pairs, config.method, config.measure.seed)
    vector = _with_norm_of(store, vector)
    return Made(vector, contrast_reader(vector))


def _of_modifier(config: VectorConfig, loaded: LoadedModel, store: ActivationStore) -> Made:
    if not config.modifier:
        fix = "Write --set modifier='Answer tersely.'"
        raise ConfigError("key 'modifier'", expected="an instruction", got="none", fix=fix)
    hook_point, requests = _hook_point(config, loaded, store), load_requests(config.requests)
    name = "-".join(re.findall(r"\w+", config.modifier.lower())[:4]) or "modifier"
    make = from_places if config.place == "both" else partial(from_modifier, place=config.place)
    vector = make(
        loaded,
        hook_point,
        name,
        requests,
        config.modifier,
        read=config.read,
        method=config.method,
        max_new_tokens=config.measure.max_new_tokens,
        seed=config.measure.seed,
    )
    vector = _with_norm_of(store, vector)
    texts = {split: [each.text for each in requests if each.split == split] for split in ("fit", "heldout")}
    select, heldout = ([request_prompt(loaded, text) for text in texts[split]] for split in ("fit", "heldout"))
    instructed = [request_prompt(loaded, text, config.modifier, vector.source["place"]) for text in texts["heldout"]]
    return Made(vector, contrast_reader(vector), Prompts(select, heldout, instructed))


KINDS: dict[str, Callable[[VectorConfig, LoadedModel, ActivationStore], Made]] = {
    "latent": _of_latent,
    "latents": _of_latents,
    "contrast": _of_contrast,
    "modifier": _of_modifier,
}
"""What a vector is made from -> how."""


def _sae(config: VectorConfig, loaded: LoadedModel, store: ActivationStore) -> tuple[SaeArtefact, Places, float]:
    artefact = SaeArtefact.load(config.sae)
    check_belongs(store, loaded, artefact)
    places = places_of(artefact)
    return artefact, places, store.stats(str(places.writes)).mean_norm


def _hook_point(config: VectorConfig, loaded: LoadedModel, store: ActivationStore) -> str:
    check_store(store, loaded)
    return config.hook_point or store.hook_points[0]


def _with_norm_of(store: ActivationStore, vector: SteeringVector) -> SteeringVector:
    """With the mean norm that the store has of its hook point, if it does."""
    if vector.hook_point not in store.hook_points:
        return vector
    return replace(vector, mean_norm=store.stats(vector.hook_point).mean_norm)


def default_instruction(config: VectorConfig) -> str:
    """What the prompt baseline asks for, if the user did not say."""
    sources = {"contrast": {"contrast": Path(config.contrast).stem}, "modifier": {"modifier": config.modifier}}
    source = sources.get(config.kind, {})
    return instruction_of(source, config.operation)


def dose_and_measure(
    loaded: LoadedModel,
    vector: SteeringVector,
    concept: Concept,
    config: MeasureConfig,
    coefficient: float | None,
    instruction: str,
    prompts: Prompts | None = None,
) -> SteeringVector:
    """The vector with a coefficient, chosen if not given, and a receipt; on the shipped openings, if not on others."""
    sweep, given = [], prompts or Prompts(load_prompts("select"), load_prompts("heldout"))
    if coefficient is None:
        select = given.select[: config.select_prompts]
        tokens, seed = config.max_new_tokens, config.seed
        sweep = sweep_doses(loaded, vector, concept, select, config.doses, max_new_tokens=tokens, seed=seed)
        coefficient = choose_dose(sweep, Bounds(config.max_nll_rise, config.max_repetition_rise)).coefficient
    receipt = measure(
        loaded,
        vector,
        concept,
        given.heldout[: config.heldout_prompts],
        coefficient,
        instruction=instruction,
        instructed=None if given.instructed is None else given.instructed[: config.heldout_prompts],
        n_random=config.n_random,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed + 1,
    )
    receipt["sweep"] = [trial._asdict() for trial in sweep]
    return replace(vector, coefficient=coefficient, receipts=[*vector.receipts, receipt])


def load_prompts(split: str) -> list[str]:
    """The shipped neutral openings of one split, `select` or `heldout`."""
    text = (resources.files("steer") / "data" / "prompts.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [row["text"] for row in rows if row["split"] == split]


def add_to_library(path: Path, *vectors: SteeringVector, instead_of: str | None = None) -> None:
    """Add vectors to the library at `path`, which is made if it is not there.

    Args:
      instead_of: a name of which nothing is kept, nor of NAME@HOOK_POINT.
    """
    library = Library.open_or_new(path)
    kept = {
        name: each for name, each in library.vectors.items() if instead_of is None or group_name(name) != instead_of
    }
    kept |= {vector.name: vector for vector in vectors}
    replace(library, vectors={name: kept[name] for name in sorted(kept)}).save(path)

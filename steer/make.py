"""From a latent or a contrast to a measured vector in a library.

Flow: 1. make the unit direction; 2. choose a dose on the `select` prompts, unless a coefficient is given; 3. measure
the receipt on the `heldout` prompts; 4. add the vector to the library, in place of one of the same name.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from activations.errors import ConfigError, MissingArtefactError
from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.belongs import check_belongs, check_store
from sae.torch_view import TorchSae
from steer.concepts import instruction_of
from steer.config import MeasureConfig, VectorConfig
from steer.contrast import from_contrast, load_pairs
from steer.effect import Bounds, Concept, choose_dose, contrast_reader, latent_reader, measure, sweep_doses
from steer.library import load_library, save_library
from steer.vectors import SteeringVector, from_latent, places_of


def make_vector(config: VectorConfig, loaded: LoadedModel | None = None) -> SteeringVector:
    """Make, dose and measure the vector of `config`, and add it to the library at `config.out`."""
    store = ActivationStore.open(config.store)
    loaded = loaded or load_model(config.model, device=config.device)
    vector, concept = _direction(config, loaded, store)
    vector = replace(vector, name=config.name or vector.name)
    instruction = config.instruction or default_instruction(config)
    measured = dose_and_measure(loaded, vector, concept, config.measure, config.coefficient, instruction)
    add_to_library(config.out, measured)
    return measured


def _direction(config: VectorConfig, loaded: LoadedModel, store: ActivationStore) -> tuple[SteeringVector, Concept]:
    if config.kind == "contrast":
        check_store(store, loaded)
        hook_point = config.hook_point or store.hook_points[0]
        name, pairs = Path(config.contrast).stem, load_pairs(config.contrast)
        vector = from_contrast(loaded, hook_point, name, pairs, config.method, config.measure.seed)
        mean_norm = store.stats(hook_point).mean_norm if hook_point in store.hook_points else vector.mean_norm
        return replace(vector, mean_norm=mean_norm), contrast_reader(vector)
    if config.latent is None:
        raise ConfigError("key 'latent'", expected="a latent", got="none", fix="Write --set latent=123.")
    artefact = SaeArtefact.load(config.sae)
    check_belongs(store, loaded, artefact)
    places = places_of(artefact)
    mean_norm = store.stats(str(places.writes)).mean_norm
    vector = from_latent(artefact, config.latent, store.meta.model, mean_norm)
    return vector, latent_reader(TorchSae(artefact), config.latent, places.reads)


def default_instruction(config: VectorConfig) -> str:
    """What the prompt baseline asks for, if the user did not say."""
    return instruction_of({"contrast": Path(config.contrast).stem} if config.kind == "contrast" else {})


def dose_and_measure(
    loaded: LoadedModel,
    vector: SteeringVector,
    concept: Concept,
    config: MeasureConfig,
    coefficient: float | None,
    instruction: str,
) -> SteeringVector:
    """The vector with a coefficient, chosen if not given, and a receipt."""
    sweep = []
    if coefficient is None:
        prompts = load_prompts("select")[: config.select_prompts]
        limits = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
        sweep = sweep_doses(loaded, vector, concept, prompts, config.doses, **limits)
        coefficient = choose_dose(sweep, Bounds(config.max_nll_rise, config.max_repetition_rise)).coefficient
    receipt = measure(
        loaded,
        vector,
        concept,
        load_prompts("heldout")[: config.heldout_prompts],
        coefficient,
        instruction=instruction,
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


def add_to_library(path: Path, *vectors: SteeringVector) -> None:
    """Add vectors to the library at `path`, which is made if it is not there."""
    try:
        library = load_library(path)
    except MissingArtefactError:
        library = {}
    library |= {vector.name: vector for vector in vectors}
    save_library(path, _in_order(list(library.values())))


def _in_order(vectors: Sequence[SteeringVector]) -> list[SteeringVector]:
    return sorted(vectors, key=lambda vector: vector.name)

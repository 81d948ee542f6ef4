"""Labelled features: what a library keeps of them, and a measured vector of each.

Flow of `features_of`: 1. labels come from a file as the browser exports them; 2. an index says where each latent is
active and what it raises; 3. both become a `Feature` with the label's history. Flow of `steer_features`: 1. the decoder
row of each feature becomes a vector, as in `saekit vector make`; 2. it is dosed, measured beside its label as an
instruction, and added to a library. What is in that library already is not made again, so that a run may be stopped.

Left out: labelling itself (`steer.browser.labelling`, `sae.labels`).
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from activations.errors import MismatchError, MissingArtefactError, TextError
from activations.models import LoadedModel, load_model
from activations.progress import progress
from activations.store import ActivationStore
from activations.text import read_file
from sae.artefact import SaeArtefact
from sae.belongs import check_belongs
from sae.index_db import FeatureIndex, LatentRow
from sae.labels.tables import EXPLANATION
from sae.torch_view import TorchSae
from steer.latents import places_of
from steer.library import Library, load_library
from steer.making.config import FeaturesConfig
from steer.making.make import add_to_library, dose_and_measure
from steer.measures.effect import latent_reader
from steer.pack import FIGURES, Example, Feature, Label
from steer.vectors import SteeringVector, from_latent

EXAMPLES = 5
"""texts of a feature that are kept"""
AROUND = 12
"""tokens of them before and behind the strongest"""


class LabelLine(BaseModel):
    """A line of a file of labels; the browser's export has more keys, which are not read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    latent: int
    text: str
    authors: list[str]
    decided: str
    history: list[dict[str, Any]] = []


def read_labels(path: Path) -> list[LabelLine]:
    """Labels of a .jsonl file, those without a text left out.

    Raises: TextError naming the line.
    """
    found = []
    for i, line in enumerate(read_file(path, ".jsonl").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row.get("text"):  # what is disputed or undone has none
                found.append(LabelLine.model_validate(row))
        except (ValueError, AttributeError, ValidationError) as error:
            fix = "Export labels as .jsonl from the browser, or write these keys."
            raise TextError(
                f"{path} line {i}", expected="latent, text, authors and decided", got=line[:60], fix=fix
            ) from error
    return found


def features_of(index: FeatureIndex, labels: Iterable[LabelLine]) -> list[Feature]:
    """A feature for each label. Raises: UnknownNameError for a latent that the index does not have."""
    return [_feature(index, index.latent(line.latent), line) for line in labels]


def vector_name(feature: Feature) -> str:
    """What the vector of a feature is called: the first words of its label and its number.

    >>> example = Feature(latent=7, label="Whales, and reefs at sea", author="a", density=0.1, max_activation=1.0)
    >>> vector_name(example)
    'whales-and-reefs-7'
    """
    words = re.findall(r"[a-z0-9]+", feature.label.lower())
    return "-".join([*words[:3], str(feature.latent)])


def steer_features(config: FeaturesConfig, loaded: LoadedModel | None = None) -> list[SteeringVector]:
    """Make and measure a vector of every feature of a library, or of every `parts`-th, and add it to `config.out`.

    Returns: those that were made now.
    Raises: MissingArtefactError for a library without features, MismatchError for another SAE than theirs.
    """
    library, artefact = Library.open(config.library), SaeArtefact.load(config.sae)
    if not library.features or library.sae is None:
        fix = "Add some with saekit library add."
        raise MissingArtefactError(config.library, expected="labelled features", got="none", fix=fix)
    if artefact.sha256 != library.sae.sha256:
        fix = "Name the SAE that the features were added with."
        raise MismatchError(config.sae, expected="the SAE of the library's features", got="another", fix=fix)
    store = ActivationStore.open(config.store)
    loaded = loaded or load_model(config.model, device=config.device)
    check_belongs(store, loaded, artefact)
    places, view = places_of(artefact), TorchSae(artefact)
    mean_norm = store.stats(str(places.writes)).mean_norm
    todo = _missing(config, library.features[config.part :: config.parts])
    made = []
    with progress("features", len(todo), "vectors") as advance:
        for feature in todo:
            vector = replace(
                from_latent(artefact, feature.latent, store.meta.model, mean_norm), name=vector_name(feature)
            )
            concept = latent_reader(view, feature.latent, places.reads)
            asked = f"Write about {feature.label}."
            made.append(dose_and_measure(loaded, vector, concept, config.measure, None, asked))
            add_to_library(config.out, made[-1])
            advance(1)
    return made


def _missing(config: FeaturesConfig, features: Sequence[Feature]) -> list[Feature]:
    try:
        known = load_library(config.out).keys()
    except MissingArtefactError:
        known = ()
    return [feature for feature in features if vector_name(feature) not in known]


def _feature(index: FeatureIndex, row: LatentRow, line: LabelLine) -> Feature:
    said = index.labels(row.latent)
    history = [Label(text=each.text, author=each.author, created=each.created, kind=each.kind) for each in said]
    history += [
        Label(text=each["text"], author=each["author"], created=each["created"], kind=each["action"])
        for each in line.history
        if each.keys() >= {"text", "author", "created", "action"}
    ]
    if not line.history:
        author = ", ".join(line.authors)
        history.append(Label(text=line.text, author=author, created=line.decided, kind=EXPLANATION))
    return Feature(
        **{name: getattr(row, name) for name in FIGURES},
        label=line.text,
        author=", ".join(line.authors),
        history=sorted(history, key=lambda label: label.created),
        examples=[_example(index, row, i) for i in range(min(EXAMPLES, len(row.contexts)))],
        scores={
            f"{score.method} {score.measure} ({score.control}, {score.judge})": score.value
            for label in said
            if label.text == line.text
            for score in label.scores
        },
    )


def _example(index: FeatureIndex, row: LatentRow, i: int) -> Example:
    context = row.contexts[i]
    shown = slice(max(0, context.peak - AROUND), context.peak + AROUND + 1)
    texts = index.token_texts(context.tokens)
    return Example(tokens=texts[shown], activations=[round(float(value), 3) for value in context.activations[shown]])

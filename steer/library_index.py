"""The labelled features of a library as a feature index, so that everything that shows an index shows them.

Flow: 1. the manifest is read, without torch; 2. its features become rows, contexts and labels of an index that knows
these latents alone; 3. the index is kept among the user's data, by the SAE and the library's path, and is written again
when the library is another; what people write of latents in it stays.

Left out: the other latents of the SAE, of which a library says nothing.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from activations.errors import MissingArtefactError
from sae.contexts import Context
from sae.index_db import LatentRow, read_info, write_index
from sae.labels.store import LabelStore, NewLabel
from sae.labels.tables import EXPLANATION, KINDS
from sae.vocabulary import Vocabulary
from steer.manifest import SAE, damaged, first_problem, read_manifest
from steer.pack import FIGURES, Feature, SaeRef
from steer.packs.installed import data_folder


def index_of_library(library: Path) -> Path | None:
    """The index of a library's features, made if it is not there; none for a library without features.

    Raises: as `steer.manifest.read_manifest` does.
    """
    manifest = read_manifest(library)
    if not manifest.get("features") or not manifest.get("sae"):
        return None
    try:
        features = [Feature.model_validate(each) for each in manifest["features"]]
        sae = SaeRef.model_validate(manifest["sae"])
    except ValidationError as error:
        raise damaged(library, first_problem(error)) from error
    if sae.n_layers is None or any(feature.latent >= sae.d_sae for feature in features):
        raise damaged(library, "features of latents that its SAE does not have")
    place = hashlib.sha256(str(library.resolve()).encode()).hexdigest()[:8]
    folder = data_folder() / "features" / f"{sae.sha256[:12]}-{place}"
    if _content_of(folder) != manifest["content_sha256"]:
        _write(folder, library, sae, features, manifest["content_sha256"])
    return folder


def _content_of(folder: Path) -> Any:
    try:
        return read_info(folder).get("library_content")
    except MissingArtefactError:
        return None


def _write(folder: Path, library: Path, sae: SaeRef, features: Sequence[Feature], content: str) -> None:
    info = {
        "d_sae": sae.d_sae, "hook_point": sae.hook_point, "sae_sha256": sae.sha256, "n_tokens": 0, "map": "none",
        "model": {"id": sae.model_id, "fingerprint": sae.model_fingerprint, "n_layers": sae.n_layers,
                  "d_model": sae.d_model},
        "sources": [], "library_content": content,
    }  # fmt: skip
    texts = list(dict.fromkeys(token for each in features for example in each.examples for token in example.tokens))
    ids = {text: i for i, text in enumerate(texts)}
    vocabulary = Vocabulary.of(text.encode() for text in texts)
    write_index(folder, info, [_row(feature, ids) for feature in features], vocabulary)
    with LabelStore.open(folder, sae.sha256) as store:
        store.add_labels(_labels(features))
    where = {"sae": str(library.absolute() / SAE)}
    (folder / "index.yaml").write_text(yaml.safe_dump(where))


def _row(feature: Feature, ids: dict[str, int]) -> LatentRow:
    contexts = []
    for number, example in enumerate(feature.examples):
        values = np.array(example.activations, np.float32)
        tokens = np.array([ids[token] for token in example.tokens], np.int32)
        peak = int(values.argmax())
        contexts.append(Context(number, peak, tokens, values, score=float(values[peak])))
    return LatentRow(**{name: getattr(feature, name) for name in FIGURES}, neighbours=[], contexts=contexts)


def _labels(features: Iterable[Feature]) -> Iterator[NewLabel]:
    for feature in features:
        for each in feature.history:
            if each.kind in KINDS and (each.author, each.text) != (feature.author, feature.label):
                yield NewLabel(feature.latent, each.kind, each.text, each.author)
        yield NewLabel(feature.latent, EXPLANATION, feature.label, feature.author)

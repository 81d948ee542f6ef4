"""The concept of a vector of a library, rebuilt from where the vector came from.

    contrast            on the positive side of the midpoint that its source keeps
    latent, latents     where the weighted sum of their activations is above 0, for which the SAE is needed
    anything else       what a classifier of whole texts says, which is fitted to contrast pairs (`steer.classifier`)

Left out: choosing the pairs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from activations.errors import ConfigError, MismatchError
from activations.hook_points import HookPoint
from sae.artefact import SaeArtefact
from sae.torch_view import TorchSae
from steer.classifier import examples_of, fit
from steer.contrast import ContrastPair
from steer.effect import Concept, contrast_reader
from steer.vectors import SteeringVector, places_of


def concept_of(vector: SteeringVector, sae: Path, pairs: Sequence[ContrastPair] | None = None) -> Concept:
    """How the vector's concept is read off a text.

    Args:
      pairs: what a classifier is fitted to, for a vector whose source does not tell its concept.
    Raises: MismatchError if the SAE at `sae` is not the one that the vector came from, ConfigError if neither source
      nor pairs tell what it stands for.
    """
    if "midpoint" in vector.source:
        return contrast_reader(vector)
    latents = _latents(vector)
    if not latents and pairs:
        return classified(vector, pairs)
    if not latents:
        raise ConfigError(
            f"vector '{vector.name}'",
            expected="one made from a contrast or from latents, or contrast pairs that tell what it is to do",
            got=f"the kind '{vector.source.get('kind')}' and no pairs",
            fix="Name pairs with --set pairs=...",
        )
    artefact = SaeArtefact.load(sae)
    if artefact.sha256 != vector.source.get("sae_sha256"):
        raise MismatchError(
            f"SAE {sae}",
            expected=f"the one that vector '{vector.name}' came from, {str(vector.source.get('sae_sha256'))[:12]}",
            got=str(artefact.sha256)[:12],
            fix="Name it with --set sae=...",
        )
    view, wanted, weights = TorchSae(artefact), torch.tensor([*latents]), torch.tensor([*latents.values()])
    return Concept(places_of(artefact).reads, lambda x: view.encode_some(x, wanted) @ weights > 0)


def classified(vector: SteeringVector, pairs: Sequence[ContrastPair]) -> Concept:
    """The concept as a classifier has it that reads the text alone."""
    judge = fit(examples_of(pairs))
    # Nothing of the residual stream is asked for, but what a text costs is read in the same pass.
    return Concept(
        HookPoint.parse(vector.hook_point),
        lambda x: torch.zeros(len(x), dtype=torch.bool),
        lambda prompts, texts: judge.probability(texts, prompts),
    )


def instruction_of(source: Mapping[str, Any]) -> str:
    """What the prompt baseline asks for, if nobody said."""
    if "contrast" in source:
        return f"Write this in a {source['contrast'].split('_vs_')[0].replace('_', ' ')} way."
    return "Write about the topic of the following text."


def _latents(vector: SteeringVector) -> dict[int, float]:
    """The latents that a vector is made of, and their weights; none if it is made of something else."""
    source = vector.source
    if "latent" in source:
        return {int(source["latent"]): 1.0}
    return {int(latent): float(weight) for latent, weight in dict(source.get("latents", {})).items()}

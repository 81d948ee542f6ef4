"""The concept of a vector of a library, rebuilt from where the vector came from.

    contrast            on the positive side of the midpoint that its source keeps
    modifier            the same along the direction of its reader
    latent, latents     where the weighted sum of their activations is above 0, for which the SAE is needed
    combination         as the parent that it was measured as
    anything else       what a classifier of whole texts says, fitted to contrast pairs (`steer.measures.classifier`)

Left out: choosing the pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from activations.errors import ConfigError, MismatchError
from activations.hook_points import HookPoint
from sae.artefact import SaeArtefact
from sae.torch_view import TorchSae
from steer.latents import places_of
from steer.measures.classifier import examples_of, fit
from steer.measures.effect import Concept, Judges, contrast_reader, latents_reader
from steer.pairs import ContrastPair
from steer.vectors import SteeringVector


def concept_of(vector: SteeringVector, sae: Path, pairs: Sequence[ContrastPair] | None = None) -> Concept:
    """How the vector's concept is read off a text.

    Args:
      pairs: what a classifier is fitted to, for a vector whose source does not tell its concept.
    Raises: MismatchError if the SAE at `sae` is not the one that the vector came from, ConfigError if neither source
      nor pairs tell what it stands for.
    """
    found = own_concept(vector, SaeArtefact.load(sae) if weights_of(vector) else None)
    if found is not None:
        return found
    if pairs:
        return classified(vector, pairs)
    raise ConfigError(
        f"vector '{vector.name}'",
        expected="one made from a contrast or from latents, or contrast pairs that tell what it is to do",
        got=f"the kind '{vector.source.get('kind')}' and no pairs",
        fix="Name pairs with --set pairs=...",
    )


def own_concept(vector: SteeringVector, artefact: SaeArtefact | None = None) -> Concept | None:
    """What its source tells that a vector stands for; none where it does not, or the SAE of its latents is not given.

    Raises: MismatchError for another SAE than that of its latents.
    """
    if vector.reads is not None:
        return contrast_reader(vector)
    weights = weights_of(vector)
    if artefact is None or not weights:
        return None
    if artefact.sha256 != vector.source.get("sae_sha256"):
        raise MismatchError(
            f"SAE of vector '{vector.name}'",
            expected=f"the one that it came from, {str(vector.source.get('sae_sha256'))[:12]}",
            got=str(artefact.sha256)[:12],
            fix="Name that one with --set sae=...",
        )
    return latents_reader(TorchSae(artefact), weights, places_of(artefact).reads)


def read_as(vector: SteeringVector, other: SteeringVector) -> SteeringVector:
    """`vector`, whose concept is from now on that of `other`."""
    weights = {str(latent): weight for latent, weight in weights_of(other).items()}
    latents = {"latents": weights, "sae_sha256": other.source["sae_sha256"]} if weights else {}
    return replace(vector, source=vector.source | {"concept": other.name} | latents, reader=other.reads)


def weights_of(vector: SteeringVector) -> dict[int, float]:
    """The latents that a vector was made from, and how much of each; empty if it was made from something else."""
    source = vector.source
    found = source.get("latents") or ({source["latent"]: 1.0} if "latent" in source else {})
    return {int(latent): float(weight) for latent, weight in found.items()}


def classified(vector: SteeringVector, pairs: Sequence[ContrastPair]) -> Concept:
    """The concept as a classifier has it that reads the text alone."""
    judge = fit(examples_of(pairs))
    return judged(vector, lambda prompts, texts: judge.probability(texts, prompts))


def judged(vector: SteeringVector, judges: Judges) -> Concept:
    """A concept of whole texts, of which the residual stream tells nothing."""
    # It is read all the same, since what a text costs is found in the same pass.
    return Concept(HookPoint.parse(vector.hook_point), lambda x: torch.zeros(len(x), dtype=torch.bool), judges)


def instruction_of(source: Mapping[str, Any], operation: str = "add") -> str:
    """What the prompt baseline asks for, if nobody said; the opposite for what takes a direction away."""
    takes_away = operation == "ablate"
    if asked := source.get("modifier") or source.get("context"):
        return asked
    if "contrast" in source:
        side, _, other = source["contrast"].partition("_vs_")
        return f"Write this in a {(other if takes_away and other else side).replace('_', ' ')} way."
    return f"{'Do not write' if takes_away else 'Write'} about the topic of the following text."

"""Which latent to steer with.

What a latent responds to says little about what it does when it is added (Arad et al., arXiv:2505.20063), so latents
are chosen by trying them. Flow:
1. candidates: neither rare nor dense, and active in many documents and on more than one kind of token. They are
   ordered by the weakest of their listed contexts, which a few odd tokens cannot raise;
2. every candidate steers the same few prompts, all in one batch, each sequence with its own decoder row;
3. the unsteered model re-reads the texts; the candidate whose own latent gained most, in text that still reads well,
   wins.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from activations.models import LoadedModel
from sae.artefact import SaeArtefact
from sae.index_db import FeatureIndex, LatentRow
from sae.torch_view import TorchSae
from steer.generate import generate_conditions
from steer.latents import places_of
from steer.measures.effect import latent_reader, rate, reread
from steer.operations import Add, Intervention

MIN_DENSITY, MAX_DENSITY = 5e-4, 0.03
MIN_DOCUMENTS, MIN_KINDS = 8, 6


class Trial(NamedTuple):
    """One candidate latent, tried."""

    latent: int
    gain: float
    """rise in the share of tokens on which the latent is active"""
    nll_rise: float
    """rise in what the text costs the unsteered model, nats a token"""
    repetition_rise: float
    """rise in the share of three-token runs that were there before"""

    @property
    def score(self) -> float:
        """Gain, less what the text lost in quality: nats a token beyond one, repetition beyond a tenth."""
        return self.gain - max(0.0, self.nll_rise - 1.0) - max(0.0, self.repetition_rise - 0.1)


def candidates(index: FeatureIndex, n: int) -> list[LatentRow]:
    """Up to `n` latents that respond to something that is neither everywhere nor a single token."""
    rows = index.rows(min_density=MIN_DENSITY, max_density=MAX_DENSITY)
    fit = [row for row in rows if len(row.contexts) >= MIN_DOCUMENTS and token_kinds(row) >= MIN_KINDS]
    return sorted(fit, key=weakest_context, reverse=True)[:n]


def weakest_context(row: LatentRow) -> float:
    """Peak activation in the last of a latent's listed contexts."""
    return float(row.contexts[-1].activations.max())


def token_kinds(row: LatentRow) -> int:
    """Distinct tokens at the peaks of a latent's contexts."""
    return len({int(context.tokens[context.peak]) for context in row.contexts})


def try_latents(
    loaded: LoadedModel,
    artefact: SaeArtefact,
    latents: Sequence[int],
    prompts: Sequence[str],
    coefficient: float,
    *,
    max_new_tokens: int,
    seed: int,
) -> list[Trial]:
    """Steer `prompts` with every latent and read its own gain back; best score first.

    Raises: MismatchError for an SAE of several hook points.
    """
    places, sae = places_of(artefact), TorchSae(artefact)
    rows = torch.from_numpy(artefact.W_dec[list(latents)])
    conditions = [[], *([Intervention(Add(row / row.norm(), coefficient), places.writes)] for row in rows)]
    texts = generate_conditions(loaded, conditions, prompts, max_new_tokens=max_new_tokens, seed=seed)
    readings = reread(loaded, places.reads, [*prompts] * len(texts), [text for row in texts for text in row])
    n = len(prompts)
    by_condition = [readings[i * n : (i + 1) * n] for i in range(len(texts))]
    plain, steered = by_condition[0], by_condition[1:]
    trials = []
    for latent, after in zip(latents, steered, strict=True):
        concept = latent_reader(sae, latent, places.reads)
        gain = np.mean([rate(a, concept) - rate(b, concept) for a, b in zip(after, plain, strict=True)])
        rise = np.mean([a.nll - b.nll for a, b in zip(after, plain, strict=True)])
        again = np.mean([a.repetition - b.repetition for a, b in zip(after, plain, strict=True)])
        trials.append(Trial(latent, float(gain), float(rise), float(again)))
    return sorted(trials, key=lambda trial: -trial.score)

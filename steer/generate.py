"""Text from prompts, steered or not, a batch at a time.

Sampling is a function of the seed, so the same prompts with and without steering differ by the steering alone.
Left out: streaming.
"""

from collections.abc import Sequence

import torch

from activations.generate import continuations, tokens_of
from activations.models import LoadedModel
from steer.plan import Budget, Interventions
from steer.runtime import steering


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.7,
    seed: int = 0,
    interventions: Interventions = (),
    rows: Sequence[Interventions] | None = None,
    add_special_tokens: bool = True,
    force: bool = False,
    budget: Budget = None,
) -> list[str]:
    """As `activations.generate.generate`, steered.

    Args:
      interventions: what all of them are steered with.
      rows: besides, one list for each prompt.
      force: allow doses that `steering` refuses.
      budget: joint dose that each text may have at a hook point, one for all or, beside rows, one for each.
    Raises: as that and `steer.runtime.steering` do.
    """
    token_rows = tokens_of(loaded, prompts, add_special_tokens)
    steered = steering(
        loaded,
        interventions,
        rows=rows,
        prompt_lengths=[len(row) for row in token_rows],
        force=force,
        budget=budget,
        max_batch=len(prompts),
    )
    with torch.inference_mode(), steered:
        return continuations(loaded, token_rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def generate_conditions(
    loaded: LoadedModel,
    conditions: Sequence[Interventions],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 0.7,
) -> list[list[str]]:
    """Continuations of the same prompts under several conditions, in one batch, at whatever dose.

    Returns: by condition, one text a prompt. A condition of no interventions is the unsteered model.
    """
    n = len(prompts)
    texts = generate(
        loaded,
        [*prompts] * len(conditions),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        rows=[condition for condition in conditions for _ in prompts],
        force=True,
    )
    return [texts[i * n : (i + 1) * n] for i in range(len(conditions))]

"""Text from prompts, steered or not, a batch at a time, at once or as it is written.

    with streaming(loaded, prompts, interventions=[...]) as stream:
        for pieces in stream.pieces:                    what each prompt's text goes on with
            stream.steered.set([...])                   from the next token on, if you like; break stops

Sampling is a function of the seed, so the same prompts with and without steering differ by the steering alone, and a
text is the same at once and as a stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from activations.generate import pieces, tokens, tokens_of
from activations.models import LoadedModel
from steer.plan import Budget, Interventions
from steer.runtime import Steering, steering


class Stream(NamedTuple):
    """Texts that are being written."""

    pieces: Iterator[list[str]]
    """what each prompt's text goes on with, a token at a time, as `activations.generate.pieces` has it"""
    steered: Steering
    """what they are steered with, which may be changed between two tokens"""
    prompt_lengths: list[int]
    """tokens of each prompt"""


@contextmanager
def streaming(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.7,
    seed: int | Sequence[int] = 0,
    interventions: Interventions = (),
    rows: Sequence[Interventions] | None = None,
    reserve: Interventions = (),
    add_special_tokens: bool = True,
    force: bool = False,
    budget: Budget = None,
) -> Iterator[Stream]:
    """As `generate`, a token at a time; leaving the context stops it.

    Args:
      reserve: what `steered.set` may be given later.
    """
    token_rows = tokens_of(loaded, prompts, add_special_tokens)
    lengths = [len(row) for row in token_rows]
    with steering(
        loaded,
        interventions,
        rows=rows,
        prompt_lengths=lengths,
        reserve=reserve,
        force=force,
        budget=budget,
        max_batch=len(prompts),
    ) as steered:
        steps = tokens(loaded, token_rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        yield Stream(pieces(loaded, steps), steered, lengths)


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.7,
    seed: int | Sequence[int] = 0,
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
    with streaming(
        loaded,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        interventions=interventions,
        rows=rows,
        add_special_tokens=add_special_tokens,
        force=force,
        budget=budget,
    ) as stream:
        return ["".join(row) for row in zip(*stream.pieces, strict=True)]


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

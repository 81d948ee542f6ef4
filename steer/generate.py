"""Text from prompts, steered or not, a batch at a time.

Sampling is a function of the seed, so the same prompts with and without steering differ by the steering alone.
Left out: streaming.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from activations.generate import generate as generate_text
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.runtime import Steer, steering


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.7,
    seed: int = 0,
    steers: Sequence[Steer] = (),
    add_special_tokens: bool = True,
) -> list[str]:
    """Continuations of `prompts`, without the prompts and without special tokens.

    Args:
      prompts: texts as they are; apply a chat template first if the model is to answer.
      temperature: 0 decodes greedily.
      add_special_tokens: whether the tokenizer adds its own, such as BOS; not for chat prompts, which hold theirs.
    Raises: ConfigError if prompt and continuation do not fit the model's context.
    """
    with steering(loaded, steers):
        return generate_text(
            loaded,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            add_special_tokens=add_special_tokens,
        )


def generate_conditions(
    loaded: LoadedModel,
    hook_point: HookPoint,
    prompts: Sequence[str],
    deltas: Float[Tensor, "condition d_model"],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 0.7,
) -> list[list[str]]:
    """Continuations of the same prompts under several additive conditions, in one batch.

    Returns: by condition, one text a prompt. A delta of zero is the unsteered model.
    """
    n = len(prompts)
    texts = generate(
        loaded,
        [*prompts] * len(deltas),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        steers=[Steer(hook_point, deltas.repeat_interleave(n, dim=0))],
    )
    return [texts[i * n : (i + 1) * n] for i in range(len(deltas))]

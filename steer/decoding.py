"""Ways of decoding that steering cannot follow are refused, in front of the first token.

Beam search makes several sequences of one and lets them change places; assisted decoding (a draft model, prompt lookup,
multi-token prediction) takes tokens back. What acts on a token by its index alone, alike in every sequence, is right in
both. What a forward pass leaves for the next, a gate or the latch of a scope, is not; and what is different for each
row does not stay with its row in a beam search.

Left out: loops of somebody else's that reorder or crop a cache without `model.generate`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from activations.errors import ConfigError

STEPWISE = ("greedy_search", "sample")
"""modes in which a sequence keeps its place and its tokens"""
ASSISTED = "assisted_generation"


@contextmanager
def refusing(model: Any, *, has_flags: bool, is_by_row: bool) -> Iterator[None]:
    """Let `model.generate` refuse, inside the context, what would be steered wrongly.

    Args:
      has_flags: whether there are gates, or scopes that follow tokens.
      is_by_row: whether sequences are steered differently.
    """
    before, generate = vars(model).get("generate"), model.generate

    @wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        mode = mode_of(model, *args[1:2], **kwargs)
        if mode not in STEPWISE and (has_flags or (is_by_row and mode != ASSISTED)):
            what = "gates, or scopes of roles, phases or tool calls" if has_flags else "different steering for each row"
            raise ConfigError(
                f"steering with {what}",
                expected="greedy decoding or sampling, a token at a time",
                got=mode.replace("_", " "),
                fix="Generate with num_beams=1 and without a draft model.",
            )
        return generate(*args, **kwargs)

    model.generate = checked
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before


def mode_of(model: Any, generation_config: Any = None, assistant_model: Any = None, **options: Any) -> str:
    """The mode that `model.generate` would choose, in the words of transformers: `greedy_search`, `beam_search`, ..."""
    from transformers import GenerationConfig

    given = {} if generation_config is None else generation_config.to_dict()
    config = GenerationConfig()
    for settings in (model.generation_config.to_dict(), given, options):
        for key, value in settings.items():
            if value is not None and hasattr(config, key):
                setattr(config, key, value)
    return str(config.get_generation_mode(assistant_model).value)

"""What was baked, compared with the model that is steered while it runs.

    max_abs, mean_abs    difference of logits over all tokens of a set of texts
    kl                   mean KL(left || right) in nats a token

| comparison | left | right |
|---|---|---|
| every_token | steered on all tokens, the first one too | baked: equal but for rounding, or the bake is refused |
| runtime | steered as the runtime does, the first token left alone | baked |
| effect | as the model is | baked |

The runtime leaves the first token of a sequence alone because it is an attention sink (`steer.runtime`); weights cannot
tell it from others. `runtime` says what that costs. Texts are one set of questions in the chat format, and one of the
shipped corpus, which has nothing to do with any vector. All is computed in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from activations.chat import chat_prompt
from activations.hook_points import HookPoint
from activations.hooks import edit
from activations.models import LoadedModel
from activations.text import documents
from steer.composition import by_point
from steer.measures.openings import prompts
from steer.operations import Intervention
from steer.runtime import steering
from steer.vectors import SteeringVector

TEXT_TOKENS = 64
"""of a text of the corpus that are read"""

Logits = dict[str, list[Float[Tensor, "_ vocab"]]]
"""set of texts -> of each text"""


def read_texts(loaded: LoadedModel, n_prompts: int, n_texts: int) -> dict[str, list[list[int]]]:
    """The token ids that are compared. Raises: ConfigError if there are not so many prompts."""
    asked = [chat_prompt(loaded, prompt) for prompt in prompts("questions", n_prompts)]
    plain = [document.text for document in islice(documents("corpus"), n_texts)]
    tokens = loaded.tokenizer
    return {
        "prompts": [tokens(text, add_special_tokens=False)["input_ids"][:TEXT_TOKENS] for text in asked],
        "unrelated": [tokens(text)["input_ids"][:TEXT_TOKENS] for text in plain],
    }


@torch.inference_mode()
def logits_of(loaded: LoadedModel, texts: dict[str, list[list[int]]]) -> Logits:
    """Of each text alone, so that nothing depends on padding."""

    def one(ids: list[int]) -> Tensor:
        return loaded.model(torch.tensor([ids], device=loaded.device), use_cache=False).logits[0].float().cpu()

    return {name: [one(ids) for ids in rows] for name, rows in texts.items()}


def steered_logits(
    loaded: LoadedModel, vectors: Sequence[SteeringVector], texts: dict[str, list[list[int]]], force: bool
) -> dict[str, Logits]:
    """The left sides of the comparisons. Raises: as `steer.runtime.steering`, for doses that it would refuse."""
    ways: dict[str, Any] = {
        "runtime": lambda: steering(loaded, [Intervention.of(vector) for vector in vectors], force=force),
        "every_token": lambda: on_every_token(loaded, vectors),
        "effect": nullcontext,
    }
    found = {}
    for name, way in ways.items():
        with way():
            found[name] = logits_of(loaded, texts)
    return found


@contextmanager
def on_every_token(loaded: LoadedModel, vectors: Sequence[SteeringVector]) -> Iterator[None]:
    """Steer as the runtime does, but the first token of a sequence as well."""
    with ExitStack() as stack:
        for point, group in by_point(vectors).items():
            stack.enter_context(edit(loaded.model, loaded.family, HookPoint.parse(point), _writing(group)))
        yield


def compared(left: Logits, right: Logits) -> dict[str, dict[str, float]]:
    """The figures of each set of texts."""
    return {name: _figures(left[name], right[name]) for name in left}


def largest(logits: Logits) -> float:
    """The largest size of a logit, which rounding is measured in."""
    return max(float(row.abs().max()) for rows in logits.values() for row in rows)


def _writing(vectors: Sequence[SteeringVector]) -> Callable[[Tensor], Tensor]:
    def write(h: Tensor) -> Tensor:
        out = h
        for vector in vectors:
            u = torch.from_numpy(vector.direction).to(h)
            out = out + (-(h @ u)[..., None] * u if vector.operation == "ablate" else u) * vector.coefficient
        return out

    return write


def _figures(left: Sequence[Tensor], right: Sequence[Tensor]) -> dict[str, float]:
    one, other = torch.cat(list(left)).double(), torch.cat(list(right)).double()
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    difference = (one - other).abs()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return {"max_abs": float(difference.max()), "mean_abs": float(difference.mean()), "kl": float(kl)}

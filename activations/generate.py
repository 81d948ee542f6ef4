"""Text from prompts, a batch at a time.

Sampling is a function of the seed. Whatever hooks are on the model act while it generates. Left out: streaming.
"""

from collections.abc import Sequence

import torch

from activations.errors import ConfigError
from activations.models import LoadedModel


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.7,
    seed: int = 0,
    add_special_tokens: bool = True,
) -> list[str]:
    """Continuations of `prompts`, without the prompts and without special tokens.

    Args:
      prompts: texts as they are; apply a chat template first if the model is to answer.
      temperature: 0 decodes greedily.
      add_special_tokens: whether the tokenizer adds its own, such as BOS; not for chat prompts, which hold theirs.
    Raises: ConfigError if prompt and continuation do not fit the model's context.
    """
    rows = tokens_of(loaded, prompts, add_special_tokens)
    return continuations(loaded, rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def tokens_of(loaded: LoadedModel, prompts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each prompt. Raises: ConfigError if one has none."""
    rows = [loaded.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"] for prompt in prompts]
    if not all(rows):
        raise ConfigError("prompt", expected="at least one token", got="none", fix="Write something.")
    return rows


def continuations(
    loaded: LoadedModel, rows: Sequence[list[int]], *, max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """As `generate`, of token ids."""
    limits = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    return loaded.tokenizer.batch_decode(continuation_ids(loaded, rows, **limits), skip_special_tokens=True)


def continuation_ids(
    loaded: LoadedModel, rows: Sequence[list[int]], *, max_new_tokens: int, temperature: float, seed: int
) -> list[list[int]]:
    """As `continuations`, as token ids: each up to the token that ended it, which is the last of them."""
    tokenizer, width = loaded.tokenizer, max(len(row) for row in rows)
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and width + max_new_tokens > limit:
        raise ConfigError(
            "prompt", expected=f"at most {limit - max_new_tokens} tokens", got=width, fix="Shorten the prompt."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature > 0 else {"do_sample": False}
    )
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out = loaded.model.generate(  # type: ignore[operator]
            input_ids=ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **sampling,
        )
    ends = loaded.model.generation_config.eos_token_id
    known = frozenset(ends if isinstance(ends, list) else [ends])
    return [_ended(row, known) for row in out[:, width:].tolist()]


def _ended(row: list[int], ends: frozenset[int | None]) -> list[int]:
    """What was written, without the padding behind the token that ended it."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)

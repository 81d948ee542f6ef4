"""Text from prompts, a batch at a time, at once or as it is written.

Flow: 1. prompts become rows of token ids, padded on the left; 2. transformers prepares cache, sampling and stopping;
3. `tokens` is the loop, one forward pass each time that it is asked for the next tokens; 4. `pieces` turns tokens into
text that never ends within a character. What is at once is the same, joined.

Sampling is a function of the seed, drawn from a generator of its own: one for the batch, or one for each row, whose
text then does not depend on the rows beside it. Whatever hooks are on the model act while it generates, and may be
changed between two tokens. Nothing runs after the last token that was asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.errors import ConfigError
from activations.models import LoadedModel

HALF = "\N{REPLACEMENT CHARACTER}"
"""what bytes decode to that are not a character yet"""


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.7,
    seed: int | Sequence[int] = 0,
    add_special_tokens: bool = True,
) -> list[str]:
    """Continuations of `prompts`, without the prompts and without special tokens.

    Args:
      prompts: texts as they are; apply a chat template first if the model is to answer.
      temperature: 0 decodes greedily.
      seed: of the batch, or of each row.
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
    loaded: LoadedModel,
    rows: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int | Sequence[int],
) -> list[str]:
    """As `generate`, of token ids."""
    found = continuation_ids(loaded, rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return loaded.tokenizer.batch_decode(found, **_DECODING)


def continuation_ids(
    loaded: LoadedModel,
    rows: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int | Sequence[int],
) -> list[list[int]]:
    """As `continuations`, as token ids: each up to the token that ended it, which is the last of them."""
    ends = loaded.model.generation_config.eos_token_id
    known = frozenset(ends if isinstance(ends, list) else [ends])
    steps = list(tokens(loaded, rows, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))
    return [_ended(list(row), known) for row in zip(*steps, strict=True)]


def _ended(row: list[int], ends: frozenset[int | None]) -> list[int]:
    """What was written, without the padding behind the token that ended it."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


def pieces(loaded: LoadedModel, steps: Iterator[list[int]]) -> Iterator[list[str]]:
    """The text that each step of `tokens` adds to each row, "" where it adds none yet.

    Joined, the pieces of a row are its text, also where the steps end within a character. A character of several
    tokens comes with the last of them.
    """
    said: list[str] = []
    so_far: list[list[int]] = []
    for step in steps:
        so_far = [[*row, token] for row, token in zip(so_far or [[]] * len(step), step, strict=True)]
        said = said or [""] * len(step)
        whole = [text.rstrip(HALF) for text in loaded.tokenizer.batch_decode(so_far, **_DECODING)]
        # A text that does not go on from what was said is one within a character too.
        texts = [text if text.startswith(before) else before for text, before in zip(whole, said, strict=True)]
        yield [text[len(before) :] for text, before in zip(texts, said, strict=True)]
        said = texts
    final = loaded.tokenizer.batch_decode(so_far, **_DECODING)
    rest = [text[len(before) :] for text, before in zip(final, said, strict=True)]
    if any(rest):
        yield rest


_DECODING: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
"""Cleaned up, a text could take back what it said."""


def tokens(
    loaded: LoadedModel,
    rows: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int | Sequence[int],
) -> Iterator[list[int]]:
    """The next token of each row, again and again, until all have ended; padding behind the end of one.

    Raises: ConfigError, before the first pass, if rows and continuations do not fit the model's context.
    """
    seeds = [seed] if isinstance(seed, int) else seed
    draws = [torch.Generator(loaded.device).manual_seed(each) for each in seeds]

    def drawn(scores: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
        chances = scores.softmax(-1).chunk(len(draws))
        return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(chances, draws, strict=True)])[:, 0]

    if temperature == 0:
        return chosen(loaded, rows, _likeliest, max_new_tokens=max_new_tokens, do_sample=False)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95}
    return chosen(loaded, rows, drawn, max_new_tokens=max_new_tokens, **sampling)


Choose = Callable[[Float[Tensor, "row vocab"]], Int[Tensor, " row"]]
"""Scores of every token -> the next one of each row"""


def chosen(
    loaded: LoadedModel, rows: Sequence[list[int]], choose: Choose, *, max_new_tokens: int, **sampling: Any
) -> Iterator[list[int]]:
    """As `tokens`, of which `choose` says what they are.

    Args:
      sampling: what transformers does to the scores before, as `generate` takes it.
    """
    tokenizer, width = loaded.tokenizer, max(len(row) for row in rows)
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and width + max_new_tokens > limit:
        raise ConfigError(
            "prompt", expected=f"at most {limit - max_new_tokens} tokens", got=width, fix="Shorten the prompt."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def decode(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
               **inputs: Any) -> Iterator[list[int]]:  # fmt: skip
        return _decode(model, input_ids, logits_processor, stopping_criteria, generation_config, choose, inputs)

    with torch.inference_mode():
        return loaded.model.generate(  # type: ignore[operator]
            input_ids=ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            custom_generate=decode,
            **sampling,
        )


def _likeliest(scores: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
    return scores.argmax(-1)


def _decode(
    model: Any, ids: Any, processors: Any, stopping: Any, config: Any, choose: Choose, inputs: dict[str, Any]
) -> Iterator[list[int]]:
    """What transformers does for one token after the other, with a rest between them."""
    running = torch.ones(len(ids), dtype=torch.long, device=ids.device)
    is_first = True
    while bool(running.any()):
        with torch.inference_mode():  # not across a yield, or the caller would be in it too
            if is_first:
                outputs = model._prefill(ids, config, inputs, is_first_iteration=True)
            else:
                n = 1 if inputs["use_cache"] else None
                outputs = model(**model.prepare_inputs_for_generation(ids, next_sequence_length=n, **inputs))
            is_first = False
            inputs = model._update_model_kwargs_for_generation(outputs, inputs, is_encoder_decoder=False)
            following = choose(processors(ids, outputs.logits[:, -1].float()))
            following = torch.where(running > 0, following, config._pad_token_tensor)
            ids = torch.cat([ids, following[:, None]], dim=-1)
            running = running & ~stopping(ids, None)
        yield following.tolist()

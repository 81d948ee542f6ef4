"""Steering vectors from an instruction: what "Answer tersely." changes in the model, without the instruction.

Flow of `from_modifier`:
1. every request is written as a chat, with the instruction in its turn and without, and the model answers both;
2. each request becomes one difference of residual streams at equal tokens, read under either prompt. READS says which:

    answer   mean over the tokens of the answer that the model wrote with the instruction
    prompt   the last token of the prompt, from which the model begins to answer
    text     not equal tokens, but both answers, each read without the instruction: a contrast the model wrote itself

3. the differences of the `fit` requests give the direction, by the methods of `steer.making.contrast`;
4. both answers, read again without the instruction, are contrast pairs. Those to fit give the reader that says on which
   tokens of a text the manner shows, a direction of its own, since that of the vector does not tell texts apart
   (docs/LOG.md); those held out say how well the reader does, and whether steering moves the model to the first answer;
5. `recovered` is how much of what the instruction does for its own answers steering does without it, on held-out
   requests, at the one of DOSES that does most on those to fit; `from_places` makes a vector of the instruction in
   either turn, and takes the one that recovers more.

Left out: instructions of several turns, and vectors trained to match the prompt (`steer.making.learn`).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from activations.chat import chat_prompt
from activations.errors import TextError
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from activations.tokens import without_bos
from sae.metrics import bootstrap, means
from steer.generate import generate
from steer.making.contrast import (
    PROBE_DOSE,
    Sides,
    direction_of,
    fit_quality,
    gains,
    heldout_quality,
    lint,
    midpoint_of,
    read_sides,
)
from steer.measures.effect import reread, states
from steer.operations import Add, Intervention
from steer.pairs import ContrastPair
from steer.runtime import steering
from steer.vectors import Reader, SteeringVector

SHIPPED = "requests"
PLACES = ("user", "system")
"""turns that an instruction may be in"""
ANSWER_ROWS = 16
DOSES = (0.03, 0.06, 0.12, 0.25)
"""at which a vector is tried in place of its instruction"""
COMPARED = ("gained_by_prompt", "gained_by_vector", "recovered", "recovered_fit", "recovered_dose", "reader_auroc")
"""figures of either turn that stand side by side"""


class Request(NamedTuple):
    """Something a user asks."""

    text: str
    split: str
    """`fit` or `heldout`"""


class Answered(NamedTuple):
    """A request with and without the instruction, and what the model answers to it."""

    modified: str
    """prompt with the instruction"""
    plain: str
    """prompt without it"""
    modified_answer: str
    plain_answer: str
    split: str

    @property
    def pair(self) -> ContrastPair:
        """Both answers behind the prompt without the instruction."""
        return ContrastPair(self.plain, self.modified_answer, self.plain_answer, self.split)


def load_requests(spec: str) -> list[Request]:
    """The shipped requests, or those of a .jsonl file with the key text and, optionally, split; else every second line
    is held out. Raises: TextError for another file, or one without requests of both splits.
    """
    try:
        file = resources.files("steer") / "data" / "requests.jsonl" if spec == SHIPPED else Path(spec)
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        found = [Request(row["text"], row.get("split", ("fit", "heldout")[i % 2])) for i, row in enumerate(rows)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = f"'{SHIPPED}', or a .jsonl file with the key text on each line"
        got = f"{type(error).__name__} {error}"
        raise TextError(spec, expected=expected, got=got, fix="Correct path or file.") from error
    if not all(isinstance(each.text, str) and each.text.strip() for each in found):
        raise TextError(spec, expected="texts that are not empty", got="others", fix="Correct the file.")
    for split in ("fit", "heldout"):
        if all(each.split != split for each in found):
            raise TextError(spec, expected=f"requests of the split '{split}'", got="none", fix="Add some.")
    return found


def request_prompt(loaded: LoadedModel, request: str, modifier: str | None = None, place: str = "user") -> str:
    """A request as a chat that the model is to answer, with an instruction in the system or the user turn.

    What the tokenizer puts in front of every text is left out, so that it is there once.
    """
    text = f"{request}\n\n{modifier}" if modifier is not None and place == "user" else request
    return without_bos(loaded.tokenizer, chat_prompt(loaded, text, system=modifier if place == "system" else None))


def from_modifier(
    loaded: LoadedModel,
    hook_point: str,
    name: str,
    requests: Sequence[Request],
    modifier: str,
    *,
    place: str = "user",
    read: str = "answer",
    method: str = "mean",
    max_new_tokens: int = 28,
    seed: int = 0,
) -> SteeringVector:
    """The direction of an instruction with its reader, and in `source` how far both can be believed.

    Args:
      place: `system` or `user`, the turn that the instruction is in.
      read: a key of READS.
      method: a key of `steer.making.contrast.METHODS`.
    Raises: TextError if the model answers nothing, or the same with and without the instruction, to all requests of a
      split.
    """
    point = HookPoint.parse(hook_point).check(loaded.n_layers, loaded.family.sites(loaded.model.config))
    answered = answer(loaded, requests, modifier, place, max_new_tokens=max_new_tokens, seed=seed)
    fit, heldout = ([each for each in answered if each.split == split] for split in ("fit", "heldout"))
    for split, some in (("fit", fit), ("heldout", heldout)):
        if not some:
            fix = "Write a stronger instruction, or other requests."
            got = "none: they are empty, or equal without it"
            raise TextError(f"modifier '{modifier}'", expected=f"answers of its own ({split})", got=got, fix=fix)
    d = READS[read](loaded, point, fit)
    direction = direction_of(d, method).astype(np.float32)
    pairs = [each.pair for each in answered]
    positive, negative, mean_norm = read_sides(loaded, [point], [each.pair for each in fit])[point]
    source = {
        "kind": "modifier",
        "modifier": modifier,
        "place": place,
        "read": read,
        "method": method,
        "pairs": len(fit),
        "dropped": len(requests) - len(answered),
        "warnings": lint(pairs),
    }
    along = direction_of(positive - negative, "mean").astype(np.float32)
    reader = Reader(along, hook_point, midpoint_of(positive, negative, along))
    vector = SteeringVector(name, direction, hook_point, loaded.ref, mean_norm, source, reader=reader)
    own = heldout_quality(loaded, replace(vector, direction=along), [each.pair for each in heldout], seed)
    anti = gains(loaded, vector, [each.pair for each in heldout], PROBE_DOSE) < 0
    source |= {
        **fit_quality(d, direction, method, seed),
        **{key.replace("heldout_", "reader_"): own[key] for key in own if not key.startswith("anti_")},
        **means({"anti_steerable": anti.astype(float)}, seed),
    }
    tried = recovered(loaded, vector, fit, DOSES, seed)
    dose = max(DOSES, key=lambda dose: tried[dose]["gained_by_vector"])
    source |= {
        **recovered(loaded, vector, heldout, (dose,), seed)[dose],
        "recovered_fit": tried[dose]["recovered"],
        "recovered_dose": dose,
    }
    return vector


def from_places(loaded: LoadedModel, *arguments: Any, **options: Any) -> SteeringVector:
    """The vector of an instruction in the turn of which one recovers more; both turns' figures in `source.places`.

    The turn is chosen on the requests to fit, so that the figures, which are of the held-out ones, are those of no
    choice. Arguments, options and errors are those of `from_modifier`, but for the place.
    """
    made = [from_modifier(loaded, *arguments, place=place, **options) for place in PLACES]
    best = max(made, key=lambda vector: -math.inf if (x := vector.source["recovered_fit"]) is None else x)
    places = {}
    for source in (vector.source for vector in made):
        shown = [key for name in COMPARED for key in (name, f"{name}_ci95") if key in source]
        places[source["place"]] = {key: source[key] for key in shown}
    return replace(best, source=best.source | {"places": places})


def answer(
    loaded: LoadedModel, requests: Sequence[Request], modifier: str, place: str, *, max_new_tokens: int, seed: int
) -> list[Answered]:
    """What the model answers, sampled, without requests that it answers alike or not at all."""
    prompts = [request_prompt(loaded, each.text, added, place) for added in (modifier, None) for each in requests]
    texts: list[str] = []
    for start in range(0, len(prompts), ANSWER_ROWS):
        some = prompts[start : start + ANSWER_ROWS]
        texts += generate(loaded, some, max_new_tokens=max_new_tokens, seed=seed)
    n = len(requests)
    rows = zip(prompts[:n], prompts[n:], texts[:n], texts[n:], [each.split for each in requests], strict=True)
    return [each for each in map(Answered._make, rows) if _is_told_apart(loaded, each)]


def _is_told_apart(loaded: LoadedModel, each: Answered) -> bool:
    has_tokens = all(loaded.tokenizer(text.strip())["input_ids"] for text in (each.modified_answer, each.plain_answer))
    return has_tokens and each.modified_answer != each.plain_answer


def _at_the_answer(loaded: LoadedModel, point: HookPoint, answered: Sequence[Answered]) -> Sides:
    texts = [each.modified_answer for each in answered]
    prompts = [each.modified for each in answered], [each.plain for each in answered]
    modified, plain = (_means(states(loaded, point, some, texts)) for some in prompts)
    return modified - plain


def _at_the_prompt(loaded: LoadedModel, point: HookPoint, answered: Sequence[Answered]) -> Sides:
    prompts = [each.modified for each in answered], [each.plain for each in answered]
    modified, plain = (_means([x[-1:] for x in states(loaded, point, [""] * len(answered), some)]) for some in prompts)
    return modified - plain


def _in_the_text(loaded: LoadedModel, point: HookPoint, answered: Sequence[Answered]) -> Sides:
    positive, negative, _ = read_sides(loaded, [point], [each.pair for each in answered])[point]
    return positive - negative


READS: dict[str, Callable[[LoadedModel, HookPoint, Sequence[Answered]], Sides]] = {
    "answer": _at_the_answer,
    "prompt": _at_the_prompt,
    "text": _in_the_text,
}
"""Where an instruction is read -> differences, a row a request."""


def _means(readings: Sequence[torch.Tensor]) -> Sides:
    return torch.stack([x.mean(0) for x in readings]).double().numpy()


def recovered(
    loaded: LoadedModel, vector: SteeringVector, answered: Sequence[Answered], doses: Sequence[float], seed: int
) -> dict[float, dict[str, Any]]:
    """How much of what the instruction does for its own answers steering does without it, in nats a token.

    Returns: by dose, `gained_by_prompt`, by how much likelier the instruction makes the answers written with it;
      `gained_by_vector`, by how much steering at the dose does; `recovered`, the second over the first, none where the
      instruction gains nothing; each with a 95% bootstrap interval over answers.
    """
    point, texts = HookPoint.parse(vector.hook_point), [each.modified_answer for each in answered]
    plain = [each.plain for each in answered]

    def costs(prompts: Sequence[str]) -> Float[np.ndarray, " answer"]:
        return np.array([reading.nll for reading in reread(loaded, point, prompts, texts)])

    alone, instructed = costs(plain), costs([each.modified for each in answered])
    found = {}
    for dose in doses:
        push = Add(torch.from_numpy(vector.direction), vector.coefficient_of(dose))
        with steering(loaded, [Intervention(push, point)]):
            found[dose] = _compared(alone - instructed, alone - costs(plain), seed)
    return found


def _compared(
    by_prompt: Float[np.ndarray, " answer"], by_vector: Float[np.ndarray, " answer"], seed: int
) -> dict[str, Any]:
    found = means({"gained_by_prompt": by_prompt, "gained_by_vector": by_vector}, seed)
    share = _share(np.array([[by_prompt.sum(), by_vector.sum()]])).item()
    found["recovered"] = share if math.isfinite(share) else None
    ends = bootstrap(np.column_stack([by_prompt, by_vector]), {"recovered_ci95": _share}, seed)
    return found | {name: list(both) for name, both in ends.items()}


def _share(sums: Float[np.ndarray, "draw 2"]) -> Float[np.ndarray, " draw"]:
    return np.divide(sums[:, 1], sums[:, 0], out=np.full(len(sums), math.nan), where=sums[:, 0] > 0)

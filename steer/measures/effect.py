"""Receipts: what a steering vector measurably does.

The effect travels through text alone. Flow:
1. continue held-out prompts without steering, with it, with random unit directions at the same coefficient, and, for
   comparison, without steering but with an instruction in front of the prompt;
2. let the unsteered model re-read each continuation, and count the tokens on which the concept shows: the latent is
   active, or the residual stream is on the positive side of a contrast's midpoint. That share is the rate;
3. effect = rate(steered) - rate(unsteered), with a bootstrap interval over prompts; the random directions give the
   effect that any push of this size would have;
4. damage: KL(unsteered || steered) a token over the unsteered texts, and the negative log-likelihood of each
   continuation under the unsteered model, which rises when steered text falls apart.

Left out: choosing a window (`steer.receipts.calibrate`), and judges, skill and refusal (`steer.receipts.score`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from sae.torch_view import TorchSae
from steer.batches import Batch, TokenRow, logits_of, nlls, padded, token_rows
from steer.generate import generate_conditions
from steer.groups import group_of
from steer.operations import Intervention
from steer.plan import Interventions
from steer.runtime import steering
from steer.vectors import SteeringVector

READ_ROWS = 8

Judges = Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, " text"]]
"""from prompts and their continuations to how much a concept shows in each, mostly 0 to 1"""


class Concept(NamedTuple):
    """What a vector stands for, as it is read off a text."""

    hook_point: HookPoint
    """where the unsteered model is read; where a transcoder reads, not where it writes and is steered at"""
    shows: Callable[[Float[Tensor, "token d_model"]], Bool[Tensor, " token"]]
    """on which tokens it shows, of what is read there"""
    judges: Judges | None = None
    """of a concept of whole texts; none: the share of tokens on which it shows"""


class Reread(NamedTuple):
    """One continuation as the unsteered model reads it."""

    x: Float[Tensor, "token d_model"]
    """activations at a hook point on the continuation's tokens"""
    nll: float
    """nats that a continuation token costs, on average; 0 for an empty continuation"""
    repetition: float
    """as `repetition` of its tokens"""


class DoseTrial(NamedTuple):
    """One step of a dose sweep; rises are from the unsteered texts of the same batch."""

    dose: float
    coefficient: float
    rate: float
    effect: float
    effect_low: float
    """lower end of its 95% interval"""
    effect_high: float
    nll: float
    nll_rise: float
    repetition: float
    repetition_rise: float
    kl: float
    """KL(unsteered || steered) in nats a token, over the unsteered texts"""


class Bounds(NamedTuple):
    """How far steered text may be from unsteered text."""

    max_nll_rise: float
    """nats a token"""
    max_repetition_rise: float
    """share of three-token runs"""
    max_kl: float = math.inf
    """nats a token"""

    def allow(self, trial: DoseTrial) -> bool:
        """Whether a trial is within all of them."""
        return (
            trial.nll_rise <= self.max_nll_rise
            and trial.repetition_rise <= self.max_repetition_rise
            and trial.kl <= self.max_kl
        )


class Arm(NamedTuple):
    """One way to treat prompts, of several that are compared."""

    name: str
    """unsteered, steered, prompt, or random"""
    interventions: list[Intervention]
    instruction: str = ""
    """put in front of each prompt"""

    def asked(self, prompt: str) -> str:
        """The prompt as this arm has it."""
        return f"{self.instruction}\n\n{prompt}" if self.instruction else prompt


class Outcome(NamedTuple):
    """What came of prompts, by arm and prompt."""

    texts: list[list[str]]
    rates: Float[np.ndarray, "arm prompt"]
    nlls: Float[np.ndarray, "arm prompt"]
    repetitions: Float[np.ndarray, "arm prompt"]


def latent_reader(sae: TorchSae, latent: int, hook_point: HookPoint) -> Concept:
    """The concept shows where the latent of an SAE that reads `hook_point` is active."""
    return latents_reader(sae, {latent: 1.0}, hook_point)


def latents_reader(sae: TorchSae, weights: Mapping[int, float], hook_point: HookPoint) -> Concept:
    """The concept shows where Σ weight * activation is above 0, of latents of an SAE that reads `hook_point`.

    With weights above 0 that is where one of them is active; latents of weights below 0 speak against it.
    """
    latents, by = torch.tensor([*weights]), torch.tensor([*weights.values()], dtype=torch.float32)
    return Concept(hook_point, lambda x: sae.encode_some(x, latents) @ by > 0)


def contrast_reader(vector: SteeringVector) -> Concept:
    """The concept shows where the residual stream is on the positive side of the midpoint that `vector.reads` has."""
    assert vector.reads is not None
    direction, midpoint = torch.from_numpy(vector.reads.direction), vector.reads.midpoint
    return Concept(HookPoint.parse(vector.reads.hook_point), lambda x: x @ direction > midpoint)


def states(
    loaded: LoadedModel, hook_point: HookPoint, prompts: Sequence[str], texts: Sequence[str]
) -> list[Float[Tensor, "token d_model"]]:
    """The `x` of `reread` alone, for which the model runs no further than to the hook point."""
    return [row[hook_point] for row in states_at(loaded, [hook_point], prompts, texts)]


def states_at(
    loaded: LoadedModel, hook_points: Sequence[HookPoint], prompts: Sequence[str], texts: Sequence[str]
) -> Iterator[dict[HookPoint, Float[Tensor, "token d_model"]]]:
    """Text by text, what the model holds at each hook point on a continuation's tokens, all read in one pass."""
    for start in range(0, len(texts), READ_ROWS):
        batch = _encode(loaded, prompts[start : start + READ_ROWS], texts[start : start + READ_ROWS])
        with capture(loaded.model, loaded.family, hook_points, stop_after_last=True) as captured:
            run_until(loaded.model, _inputs(loaded, batch))
        x = {point: captured[point].float().cpu() for point in hook_points}
        yield from ({point: values[row][new] for point, values in x.items()} for row, new in enumerate(batch.new))


def reread(loaded: LoadedModel, hook_point: HookPoint, prompts: Sequence[str], texts: Sequence[str]) -> list[Reread]:
    """Let the unsteered model re-read continuations of prompts."""
    out = []
    for start in range(0, len(texts), READ_ROWS):
        batch = _encode(loaded, prompts[start : start + READ_ROWS], texts[start : start + READ_ROWS])
        with torch.inference_mode(), capture(loaded.model, loaded.family, [hook_point]) as captured:
            logits = _logits(loaded, batch)
            x = captured[hook_point].float().cpu()
        for row, (new, nll) in enumerate(zip(batch.new, nlls(logits, batch), strict=True)):
            out.append(Reread(x[row][new], nll, repetition(batch.ids[row][new].tolist())))
    return out


def repetition(tokens: Sequence[int]) -> float:
    """Share of runs of three tokens that were there before (seq-rep-3 of Welleck et al., arXiv:1908.04319).

    Text that goes round in circles costs an unsteered model little, so its `nll` does not tell.

    >>> repetition([1, 2, 3, 4, 5]), repetition([1, 2, 1, 2, 1, 2])
    (0.0, 0.5)
    """
    runs = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def rate(reading: Reread, concept: Concept) -> float:
    """Share of a continuation's tokens on which the concept shows; 0 for an empty one."""
    return float(concept.shows(reading.x).float().mean()) if len(reading.x) else 0.0


def kl_per_token(
    loaded: LoadedModel, vector: SteeringVector, coefficient: float, prompts: Sequence[str], texts: Sequence[str]
) -> float:
    """Mean KL(unsteered || steered) in nats over the next-token distributions of prompts and texts."""
    return kl_of(loaded, [[Intervention.of(vector, coefficient)]], prompts, texts)[0]


def kl_of(
    loaded: LoadedModel, conditions: Sequence[Interventions], prompts: Sequence[str], texts: Sequence[str]
) -> list[float]:
    """`kl_per_token` of several conditions, for which the unsteered model runs once."""
    totals, count = [0.0] * len(conditions), 0
    for start in range(0, len(texts), READ_ROWS):
        batch = _encode(loaded, prompts[start : start + READ_ROWS], texts[start : start + READ_ROWS])
        with torch.inference_mode():
            plain = _logits(loaded, batch).log_softmax(-1)
            for i, interventions in enumerate(conditions):
                with steering(loaded, interventions, prompt_lengths=batch.heads, force=True):
                    steered = _logits(loaded, batch).log_softmax(-1)
                kl = (plain.exp() * (plain - steered)).sum(-1)
                totals[i] += float(kl[:, 1:][batch.attend[:, 1:]].sum())
        count += int(batch.attend[:, 1:].sum())
    return [total / max(count, 1) for total in totals]


def sweep_doses(
    loaded: LoadedModel,
    vectors: SteeringVector | Sequence[SteeringVector],
    concept: Concept,
    prompts: Sequence[str],
    doses: Sequence[float],
    *,
    max_new_tokens: int,
    seed: int,
    unsteered: Outcome | None = None,
) -> list[DoseTrial]:
    """What each dose does; the first trial is dose 0.

    Args:
      vectors: one, or several that steer together; doses and coefficients are then those of the lead (`steer.groups`).
      unsteered: what came of the prompts without steering; none: found out in the same batch. Sweeps whose trials are
        compared with each other need the same, since sampled texts differ from batch to batch.
    """
    group = group_of(vectors)
    coefficients = [0.0, *(group.lead.coefficient_of(dose) for dose in doses)]
    arms = [Arm("steered", group.interventions(coefficient)) for coefficient in coefficients]
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    if unsteered is None:
        texts, *tables = try_arms(loaded, concept, prompts, arms, **limits)
    else:
        found = try_arms(loaded, concept, prompts, arms[1:], **limits)
        texts = unsteered.texts + found.texts
        tables = [np.concatenate(both) for both in zip(unsteered[1:], found[1:], strict=True)]
    gains = tables[0] - tables[0][0]
    rates, nlls, repetitions = (table.mean(axis=1) for table in tables)
    kls = kl_of(loaded, [arm.interventions for arm in arms[1:]], prompts, texts[0])
    return [
        DoseTrial(
            dose=group.lead.dose(coefficient),
            coefficient=coefficient,
            rate=float(rates[i]),
            effect=float(gains[i].mean()),
            **dict(zip(("effect_low", "effect_high"), bootstrap_interval(gains[i], seed), strict=True)),
            nll=float(nlls[i]),
            nll_rise=float(nlls[i] - nlls[0]),
            repetition=float(repetitions[i]),
            repetition_rise=float(repetitions[i] - repetitions[0]),
            kl=[0.0, *kls][i],
        )
        for i, coefficient in enumerate(coefficients)
    ]


def choose_dose(trials: Sequence[DoseTrial], bounds: Bounds) -> DoseTrial:
    """The trial with the highest rate among those within bounds; the smallest dose if there is none."""
    _, *steered = trials
    sound = [trial for trial in steered if bounds.allow(trial)]
    return max(sound, key=lambda trial: trial.rate) if sound else steered[0]


def arms_of(
    vectors: SteeringVector | Sequence[SteeringVector], coefficient: float, instruction: str, n_random: int, seed: int
) -> list[Arm]:
    """Unsteered, steered, unsteered but asked in words, and steered with random directions of the same norm.

    Args:
      vectors, coefficient: one, or several that steer together, and the coefficient of their lead (`steer.groups`).
      instruction: put in front of the prompt in the prompt baseline, such as "Write joyfully."
    """
    group, rng = group_of(vectors), np.random.default_rng(seed)
    return [
        Arm("unsteered", []),
        Arm("steered", group.interventions(coefficient)),
        Arm("prompt", [], instruction),
        *(Arm("random", group.random(rng).interventions(coefficient)) for _ in range(n_random)),
    ]


def try_arms(
    loaded: LoadedModel,
    concept: Concept,
    prompts: Sequence[str],
    arms: Sequence[Arm],
    *,
    instructed: Sequence[str] | None = None,
    max_new_tokens: int,
    seed: int,
) -> Outcome:
    """Let each arm continue the prompts, and the unsteered model re-read what it wrote, without the instructions.

    Args:
      instructed: what arms with an instruction continue; none: the instruction is put in front.
    """
    limits, n = {"max_new_tokens": max_new_tokens, "seed": seed}, len(prompts)
    texts: dict[int, list[str]] = {}
    for instruction in dict.fromkeys(arm.instruction for arm in arms):  # a batch for each, as prompts differ in length
        same = [i for i, arm in enumerate(arms) if arm.instruction == instruction]
        conditions, asked = [arms[i].interventions for i in same], [arms[same[0]].asked(prompt) for prompt in prompts]
        given = instructed if instruction and instructed is not None else asked
        texts |= zip(same, generate_conditions(loaded, conditions, given, **limits), strict=True)
    rows = [texts[i] for i in range(len(arms))]
    readings = reread(loaded, concept.hook_point, [*prompts] * len(arms), [text for row in rows for text in row])
    if concept.judges is None:
        rates = [rate(reading, concept) for reading in readings]
    else:
        rates = concept.judges([*prompts] * len(arms), [text for row in rows for text in row])
    figures = (rates, [reading.nll for reading in readings], [reading.repetition for reading in readings])
    return Outcome(rows, *(np.array(values).reshape(-1, n) for values in figures))


def measure(
    loaded: LoadedModel,
    vector: SteeringVector,
    concept: Concept,
    prompts: Sequence[str],
    coefficient: float,
    *,
    instruction: str,
    instructed: Sequence[str] | None = None,
    n_random: int = 3,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """The receipt of one vector at one coefficient, on prompts that nothing was chosen on.

    Args:
      instruction, n_random: as `arms_of`.
      instructed: the prompts with the instruction in them, if it belongs elsewhere, such as into a turn of a chat.
    Returns: a JSON-ready dict; rates are shares of tokens, `kl` and `nll` are nats a token.
    """
    arms = arms_of(vector, coefficient, instruction, n_random, seed)
    texts, rates, nlls, repetitions = try_arms(
        loaded, concept, prompts, arms, instructed=instructed, max_new_tokens=max_new_tokens, seed=seed
    )
    gain, random = rates[1] - rates[0], rates[3:] - rates[0]
    return {
        "coefficient": coefficient,
        "dose": vector.dose(coefficient),
        "n_prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "rate_unsteered": float(rates[0].mean()),
        "rate_steered": float(rates[1].mean()),
        "effect": float(gain.mean()),
        "effect_ci95": bootstrap_interval(gain, seed),
        "random_control_effect": float(random.mean()),
        "random_control_effects": random.mean(axis=1).tolist(),
        "instruction": instruction,
        "prompt_baseline_effect": float((rates[2] - rates[0]).mean()),
        "kl": kl_per_token(loaded, vector, coefficient, prompts, texts[0]),
        "nll_unsteered": float(nlls[0].mean()),
        "nll_steered": float(nlls[1].mean()),
        "nll_random": float(nlls[3:].mean()),
        "nll_prompt_baseline": float(nlls[2].mean()),
        "repetition_unsteered": float(repetitions[0].mean()),
        "repetition_steered": float(repetitions[1].mean()),
        "examples": examples_of_arms(prompts, texts),
    }


def examples_of_arms(prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """What the arms of `arms_of` made of each prompt, of the random directions the first."""
    names = ("unsteered", "steered", "prompt_baseline", "random")
    return [
        {"prompt": prompt, **dict(zip(names, row, strict=True))}
        for prompt, *row in zip(prompts, *texts[: len(names)], strict=True)
    ]


def drift(
    loaded: LoadedModel, arms: Sequence[Arm], texts: Sequence[str]
) -> tuple[Float[np.ndarray, "arm text"], Float[np.ndarray, "arm text"]]:
    """What arms do to text that has nothing to do with them.

    An instruction is put in front of a text as tokens of its own, so that all arms predict the same tokens.

    Returns: KL(unsteered || arm) and the text's own cost, both in nats a token, a text's first token left out.
    """
    rows = [loaded.tokenizer(text)["input_ids"] for text in texts]
    heads = [loaded.tokenizer(arm.asked(""))["input_ids"] if arm.instruction else [] for arm in arms]
    kls, nlls = np.zeros((2, len(arms), len(texts)))
    for start in range(0, len(texts), READ_ROWS):
        own = rows[start : start + READ_ROWS]
        plain, _ = _predicted(loaded, own, [], [])
        for i, (arm, head) in enumerate(zip(arms, heads, strict=True)):
            predicted, found = _predicted(loaded, own, head, arm.interventions)
            nlls[i, start : start + len(own)] = found
            for j, (p, q) in enumerate(zip(plain, predicted, strict=True)):
                kls[i, start + j] = float((p.exp() * (p - q)).sum(-1).mean())
    return kls, nlls


def next_tokens(
    loaded: LoadedModel, prompts: Sequence[str], interventions: Interventions = ()
) -> Float[Tensor, "prompt vocab"]:
    """Log-probabilities of the token after each prompt."""
    found = []
    for start in range(0, len(prompts), READ_ROWS):
        batch = _encode(loaded, prompts[start : start + READ_ROWS], [""] * len(prompts[start : start + READ_ROWS]))
        with torch.inference_mode(), steering(loaded, interventions, prompt_lengths=batch.heads, force=True):
            logits = _logits(loaded, batch)
        found += [row[head - 1].log_softmax(-1) for row, head in zip(logits, batch.heads, strict=True)]
    return torch.stack(found)


def _encode(loaded: LoadedModel, prompts: Sequence[str], texts: Sequence[str]) -> Batch:
    return padded(token_rows(loaded, prompts, texts), torch.device("cpu"))


def _predicted(
    loaded: LoadedModel, rows: Sequence[list[int]], head: list[int], interventions: Interventions
) -> tuple[list[Float[Tensor, "token vocab"]], list[float]]:
    """Log-probabilities over the tokens of texts but their first, behind a head, and what those tokens cost."""
    skip = 1 if head and rows[0][0] == head[0] == loaded.tokenizer.bos_token_id else 0
    joined = [TokenRow([*head, *row[skip:]], len(head) - skip + 1) for row in rows]
    batch = padded(joined, torch.device("cpu"))
    with (
        torch.inference_mode(),
        steering(loaded, interventions, prompt_lengths=batch.heads, force=True, max_batch=READ_ROWS),
    ):
        logits = _logits(loaded, batch)
    found = [row[:-1][new[1:]].log_softmax(-1) for row, new in zip(logits, batch.new, strict=True)]
    return found, nlls(logits, batch)


def _logits(loaded: LoadedModel, batch: Batch) -> Float[Tensor, "text pos vocab"]:
    return logits_of(loaded, batch).cpu()


def _inputs(loaded: LoadedModel, batch: Batch) -> dict[str, Tensor]:
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attend.long()}
    return {key: value.to(loaded.device) for key, value in inputs.items()}


def bootstrap_interval(values: Float[np.ndarray, " n"], seed: int, draws: int = 2000) -> list[float]:
    """Ends of the 95% interval of a mean, by drawing again from its values."""
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return np.quantile(values[picks].mean(axis=1), [0.025, 0.975]).tolist()

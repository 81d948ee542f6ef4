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

Left out: judges, benchmarks of skill, safety suites.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from activations.hook_points import HookPoint
from activations.hooks import capture, run_until
from activations.models import LoadedModel
from sae.torch_view import TorchSae
from steer.generate import generate_conditions
from steer.operations import Intervention
from steer.plan import Interventions
from steer.runtime import steering
from steer.vectors import SteeringVector

READ_ROWS = 8


class Concept(NamedTuple):
    """What a vector stands for, as it is read off a text."""

    hook_point: HookPoint
    """where the unsteered model is read; where a transcoder reads, not where it writes and is steered at"""
    shows: Callable[[Float[Tensor, "token d_model"]], Bool[Tensor, " token"]]
    """on which tokens it shows, of what is read there"""


class Reread(NamedTuple):
    """One continuation as the unsteered model reads it."""

    x: Float[Tensor, "token d_model"]
    """activations at a hook point on the continuation's tokens"""
    nll: float
    """nats that a continuation token costs, on average; 0 for an empty continuation"""
    repetition: float
    """as `repetition` of its tokens"""


class DoseTrial(NamedTuple):
    """One step of a dose sweep."""

    dose: float
    coefficient: float
    rate: float
    nll: float
    repetition: float


def latent_reader(sae: TorchSae, latent: int, hook_point: HookPoint) -> Concept:
    """The concept shows where the latent of an SAE that reads `hook_point` is active."""
    return Concept(hook_point, lambda x: sae.encode_some(x, torch.tensor([latent]))[:, 0] > 0)


def contrast_reader(vector: SteeringVector) -> Concept:
    """The concept shows where the residual stream is on the positive side of the midpoint of the fit means."""
    direction, midpoint = torch.from_numpy(vector.direction), vector.source["midpoint"]
    return Concept(HookPoint.parse(vector.hook_point), lambda x: x @ direction > midpoint)


def states(
    loaded: LoadedModel, hook_point: HookPoint, prompts: Sequence[str], texts: Sequence[str]
) -> list[Float[Tensor, "token d_model"]]:
    """The `x` of `reread` alone, for which the model runs no further than to the hook point."""
    out = []
    for start in range(0, len(texts), READ_ROWS):
        batch = _encode(loaded, prompts[start : start + READ_ROWS], texts[start : start + READ_ROWS])
        with capture(loaded.model, loaded.family, [hook_point], stop_after_last=True) as captured:
            run_until(loaded.model, _inputs(loaded, batch))
        x = captured[hook_point].float().cpu()
        out += [x[row][new] for row, new in enumerate(batch.new)]
    return out


def reread(loaded: LoadedModel, hook_point: HookPoint, prompts: Sequence[str], texts: Sequence[str]) -> list[Reread]:
    """Let the unsteered model re-read continuations of prompts."""
    out = []
    for start in range(0, len(texts), READ_ROWS):
        batch = _encode(loaded, prompts[start : start + READ_ROWS], texts[start : start + READ_ROWS])
        with torch.inference_mode(), capture(loaded.model, loaded.family, [hook_point]) as captured:
            logits = _logits(loaded, batch)
            x = captured[hook_point].float().cpu()
        losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none")
        for row, new in enumerate(batch.new):
            costs = losses[row][new[1:]]
            nll = float(costs.mean()) if len(costs) else 0.0
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


def _tables(
    readings: Sequence[Reread], concept: Concept, n_prompts: int
) -> list[Float[np.ndarray, "condition prompt"]]:
    """Rate, cost and repetition of readings that go through the prompts once a condition."""
    figures = zip(*((rate(reading, concept), reading.nll, reading.repetition) for reading in readings), strict=True)
    return [np.array(values).reshape(-1, n_prompts) for values in figures]


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
    vector: SteeringVector,
    concept: Concept,
    prompts: Sequence[str],
    doses: Sequence[float],
    *,
    max_new_tokens: int,
    seed: int,
) -> list[DoseTrial]:
    """Rate and cost at each dose; the first trial is dose 0."""
    coefficients = [0.0, *(vector.coefficient_of(dose) for dose in doses)]
    conditions = [[Intervention.of(vector, coefficient)] for coefficient in coefficients]
    texts = generate_conditions(loaded, conditions, prompts, max_new_tokens=max_new_tokens, seed=seed)
    readings = reread(loaded, concept.hook_point, [*prompts] * len(texts), [text for row in texts for text in row])
    tables = (table.mean(axis=1).tolist() for table in _tables(readings, concept, len(prompts)))
    return [
        DoseTrial(vector.dose(coefficient), coefficient, *figures)
        for coefficient, *figures in zip(coefficients, *tables, strict=True)
    ]


def choose_dose(trials: Sequence[DoseTrial], max_nll_rise: float, max_repetition_rise: float) -> DoseTrial:
    """The trial with the highest rate among those whose text costs at most `max_nll_rise` nats a token more than
    unsteered text, and repeats at most `max_repetition_rise` more; the smallest dose if there is none."""
    plain, *steered = trials
    sound = [
        trial
        for trial in steered
        if trial.nll <= plain.nll + max_nll_rise and trial.repetition <= plain.repetition + max_repetition_rise
    ]
    return max(sound, key=lambda trial: trial.rate) if sound else steered[0]


def measure(
    loaded: LoadedModel,
    vector: SteeringVector,
    concept: Concept,
    prompts: Sequence[str],
    coefficient: float,
    *,
    instruction: str,
    n_random: int = 3,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """The receipt of one vector at one coefficient, on prompts that nothing was chosen on.

    Args:
      instruction: put in front of the prompt in the prompt baseline, such as "Write joyfully."
      n_random: random unit directions that are steered with at the same coefficient.
    Returns: a JSON-ready dict; rates are shares of tokens, `kl` and `nll` are nats a token.
    """
    n, limits = len(prompts), {"max_new_tokens": max_new_tokens, "seed": seed}
    random = [replace(vector, direction=v) for v in _random_directions(n_random, loaded.d_model, seed)]
    steered = [[Intervention.of(each, coefficient)] for each in (vector, *random)]
    texts = generate_conditions(loaded, [[], *steered], prompts, **limits)
    texts += generate_conditions(loaded, [[]], [f"{instruction}\n\n{prompt}" for prompt in prompts], **limits)
    readings = reread(loaded, concept.hook_point, [*prompts] * len(texts), [text for row in texts for text in row])
    rates, nlls, repetitions = _tables(readings, concept, n)
    gain = rates[1] - rates[0]
    return {
        "coefficient": coefficient,
        "dose": vector.dose(coefficient),
        "n_prompts": n,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "rate_unsteered": float(rates[0].mean()),
        "rate_steered": float(rates[1].mean()),
        "effect": float(gain.mean()),
        "effect_ci95": _bootstrap_interval(gain, seed),
        "random_control_effect": float((rates[2 : 2 + n_random] - rates[0]).mean()),
        "random_control_effects": (rates[2 : 2 + n_random] - rates[0]).mean(axis=1).tolist(),
        "instruction": instruction,
        "prompt_baseline_effect": float((rates[-1] - rates[0]).mean()),
        "kl": kl_per_token(loaded, vector, coefficient, prompts, texts[0]),
        "nll_unsteered": float(nlls[0].mean()),
        "nll_steered": float(nlls[1].mean()),
        "nll_random": float(nlls[2 : 2 + n_random].mean()),
        "nll_prompt_baseline": float(nlls[-1].mean()),
        "repetition_unsteered": float(repetitions[0].mean()),
        "repetition_steered": float(repetitions[1].mean()),
        "examples": [
            {"prompt": prompt, "unsteered": before, "steered": after, "random": random_, "prompt_baseline": instructed}
            for prompt, before, after, random_, instructed in zip(
                prompts, texts[0], texts[1], texts[2], texts[-1], strict=True
            )
        ],
    }


class _Batch(NamedTuple):
    ids: Int[Tensor, "text pos"]
    attend: Bool[Tensor, "text pos"]
    new: Bool[Tensor, "text pos"]
    """True on continuation tokens"""
    heads: list[int]
    """tokens of each prompt"""


def _encode(loaded: LoadedModel, prompts: Sequence[str], texts: Sequence[str]) -> _Batch:
    heads = [len(loaded.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    rows = [loaded.tokenizer(prompt + text)["input_ids"] for prompt, text in zip(prompts, texts, strict=True)]
    shape = (len(rows), max(len(row) for row in rows))
    ids, attend, new = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
        ids[i, : len(row)], attend[i, : len(row)], new[i, head : len(row)] = torch.tensor(row), True, 1
    return _Batch(ids, attend, new.bool(), heads)


def _logits(loaded: LoadedModel, batch: _Batch) -> Float[Tensor, "text pos vocab"]:
    return loaded.model(**_inputs(loaded, batch), use_cache=False).logits.float().cpu()


def _inputs(loaded: LoadedModel, batch: _Batch) -> dict[str, Tensor]:
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attend.long()}
    return {key: value.to(loaded.device) for key, value in inputs.items()}


def _random_directions(n: int, d_model: int, seed: int) -> list[Float[np.ndarray, " d_model"]]:
    values = np.random.default_rng(seed).standard_normal((n, d_model)).astype(np.float32)
    return list(values / np.linalg.norm(values, axis=1, keepdims=True))


def _bootstrap_interval(values: Float[np.ndarray, " n"], seed: int, draws: int = 2000) -> list[float]:
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return np.quantile(values[picks].mean(axis=1), [0.025, 0.975]).tolist()

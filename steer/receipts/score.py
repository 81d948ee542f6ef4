"""The full receipt of a vector at one coefficient: what it does for good and bad, beside what else could be done.

Every figure is there for four arms: unsteered, steered, unsteered but asked in words (prompt), and steered with random
directions of the same norm; with its change from unsteered, and a 95% bootstrap interval over prompts, pairs, texts or
questions. Flow, a part each:

    concept      rate of the concept in continuations, and what a classifier of texts says that knows nothing of the
                 vector; their cost, perplexity and repetition
    logits       held-out contrast pairs: by how many nats a token the positive side is likelier than the negative one;
                 and the next tokens that steering raises and lowers most
    drift        questions with their answers, which have nothing to do with the concept: KL, cost and perplexity
    capability   share of multiple-choice questions answered rightly (`steer.measures.capability`)
    refusal      share of harmful and of harmless prompts that are refused (`steer.measures.refusal`)
    latency      tokens a second, timed in turn
    judge        where one is given: concept, instruct and fluency (`steer.measures.judge`)
    transfer     where pairs of another domain are given: whether the direction tells their sides apart, and what
                 steering does to continuations of their prompts

Random directions count as one arm, the mean of them. Vectors NAME@HOOK_POINT are steered with together, the coefficient
being that of their lead (`steer.groups`); concept and transfer are read as of the last one. Left out: choosing
anything; the receipt of an earlier run with the same settings is replaced.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from activations.errors import ConfigError
from activations.models import LoadedModel, Status, load_model
from activations.text import documents
from sae.metrics import means
from steer.batches import costs
from steer.groups import Group, group_of
from steer.library import find_vectors
from steer.making.contrast import heldout_quality
from steer.making.make import add_to_library, load_prompts
from steer.measures.capability import Question, answered_rightly, asked, load_choices
from steer.measures.classifier import TextClassifier, examples_of, fit
from steer.measures.concepts import concept_of, instruction_of
from steer.measures.effect import Arm, Concept, Outcome, arms_of, drift, examples_of_arms, next_tokens, try_arms
from steer.measures.judge import judge_texts, open_judge
from steer.measures.refusal import RefusalPrompt, load_refusal_prompts, refusals
from steer.packs.installed import check_own
from steer.pairs import ContrastPair, contrast_names, load_pairs
from steer.receipts.config import ScoreConfig
from steer.runtime import steering
from steer.vectors import SteeringVector

KINDS = ("unsteered", "steered", "prompt", "random")
N_TOKENS = 8
"""promoted and demoted tokens that are listed"""
KEPT = "judge.jsonl"
"""answers of judges, in the folder of the library"""

Table = Float[np.ndarray, "arm unit"] | Bool[np.ndarray, "arm unit"]
Rows = dict[str, dict[str, Any]]
"""by kind of arm: figures by name, with intervals as NAME_ci95"""


@dataclass(frozen=True)
class Material:
    """All that a vector is scored on, read before anything is computed."""

    vectors: list[SteeringVector]
    """one, or those of NAME@HOOK_POINT that steer together"""
    concept: Concept
    pairs: list[ContrastPair]
    """empty if there are none"""
    transfer: list[ContrastPair]
    prompts: list[str]
    questions: list[Question]
    refusal: list[RefusalPrompt]
    instruction: str


def score_vector(
    config: ScoreConfig, loaded: LoadedModel | None = None, *, on_status: Status | None = None
) -> dict[str, Any]:
    """Measure the vector of `config`, or the group of that name, add the receipt to its library, and return it.

    Args:
      on_status: told in one line which part is measured.
    Raises: ConfigError for a vector that has no coefficient yet, or whose concept nothing tells.
    """
    material = read_material(config)
    group = group_of(material.vectors)
    coefficient = group.lead.coefficient if config.coefficient is None else config.coefficient
    loaded = loaded or load_model(config.model, device=config.device, on_status=on_status)
    settings = {**config.model_dump(mode="json", exclude={"library", "device"}), "coefficient": coefficient}
    receipt = {
        "kind": "score",
        "coefficient": coefficient,
        "dose": group.lead.dose(coefficient),
        "instruction": material.instruction,
        "settings": settings,
        **measured(config, loaded, material, coefficient, on_status or (lambda line: None)),
    }
    add_to_library(config.library, *_stored(group, coefficient, receipt))
    return receipt


def _stored(group: Group, coefficient: float, receipt: dict[str, Any]) -> list[SteeringVector]:
    """The vectors with the receipt, each with its own coefficient in it, and without that of an earlier run like it."""
    stored = []
    for vector, used in zip(group.vectors, group.at(coefficient), strict=True):
        others = [each for each in vector.receipts if each.get("settings") != receipt["settings"]]
        own = {**receipt, "coefficient": used.coefficient, "dose": used.dose(used.coefficient)}
        stored.append(replace(vector, receipts=[*others, own]))
    return stored


def read_material(config: ScoreConfig) -> Material:
    """Vector and data; what is wrong with them is found here."""
    check_own(config.library)
    vectors = find_vectors(config.library, config.vector or None)
    if config.coefficient is None and any(vector.coefficient == 0 for vector in vectors):
        raise ConfigError(
            f"vector '{', '.join(vector.name for vector in vectors)}'",
            expected="a coefficient to score it at",
            got="none yet",
            fix="Run saekit vector calibrate first, or write --set coefficient=...",
        )
    source = vectors[-1].source
    own = source.get("contrast")
    spec = config.pairs or (own if own in contrast_names() else None)
    pairs = load_pairs(spec) if spec else []
    if config.prompts is None:
        prompts = load_prompts("heldout")
    else:
        prompts = list(dict.fromkeys(document.text for document in documents(config.prompts)))
    return Material(
        vectors,
        concept_of(vectors[-1], config.sae, pairs),
        pairs,
        load_pairs(config.transfer) if config.transfer else [],
        prompts[: config.n_prompts],
        load_choices(config.choices)[: config.n_choices],
        load_refusal_prompts(config.refusal, config.refusal_split, config.n_refusal),
        config.instruction or instruction_of(source),
    )


def measured(
    config: ScoreConfig, loaded: LoadedModel, material: Material, coefficient: float, say: Status
) -> dict[str, Any]:
    """Figures by part."""
    seed = config.seed
    arms = arms_of(material.vectors, coefficient, material.instruction, config.n_random, seed)
    found: dict[str, Any] = {}
    if "concept" in config.parts or config.judge is not None:
        say("score: concept")
        tokens = config.max_new_tokens
        outcome = try_arms(loaded, material.concept, material.prompts, arms, max_new_tokens=tokens, seed=seed + 1)
        found |= concept_part(material, arms, outcome, seed)
        if config.judge is not None:
            say("score: judge")
            found["judge"] = judge_part(config, loaded, material, arms, outcome)
    if "logits" in config.parts:
        say("score: logits")
        found |= logits_part(loaded, material, arms, seed)
    if "drift" in config.parts:
        say("score: drift")
        texts = [f"{asked(each)} {each.options[each.answer]}." for each in material.questions]
        kls, nlls = drift(loaded, arms, texts)
        found["drift"] = with_perplexity(compared({"kl": kls, "nll": nlls}, arms, seed))
        found["kl"] = found["drift"]["steered"]["kl"]
    if "capability" in config.parts:
        say("score: capability")
        right = [answered_rightly(loaded, material.questions, arm.interventions, arm.instruction) for arm in arms]
        found["capability"] = compared({"accuracy": np.array(right)}, arms, seed)
    if "refusal" in config.parts:
        say("score: refusal")
        found |= refusal_part(config, loaded, material.refusal, arms)
    if material.transfer:
        say("score: transfer")
        found["transfer"] = transfer_part(config, loaded, material, arms)
    if "latency" in config.parts:
        say("score: latency")
        found["latency"] = latency_part(loaded, arms, material.prompts, config)
    return found


# --- parts -----------------------------------------------------------------------------------------------------------


def concept_part(material: Material, arms: Sequence[Arm], outcome: Outcome, seed: int) -> dict[str, Any]:
    """How much of the concept is in the texts, by the vector's own reader and by a classifier of texts."""
    tables = {"rate": outcome.rates, "nll": outcome.nlls, "repetition": outcome.repetitions}
    found: dict[str, Any] = {}
    judge = classifier_of(material.pairs)
    if judge is not None:
        tables["classifier"] = np.array([judge.probability(row, material.prompts) for row in outcome.texts])
        found["classifier_quality"] = judge.quality
    rows = with_perplexity(compared(tables, arms, seed))
    steered = rows["steered"]
    return {
        "effect": steered["rate_change"],
        "effect_ci95": steered["rate_change_ci95"],
        "random_control_effect": rows["random"]["rate_change"],
        "prompt_baseline_effect": rows["prompt"]["rate_change"],
        "n_prompts": len(material.prompts),
        "concept": rows,
        **found,
        "examples": examples_of_arms(material.prompts, outcome.texts),
    }


def classifier_of(pairs: Sequence[ContrastPair]) -> TextClassifier | None:
    """A classifier of texts alone, if there are pairs to fit it to."""
    return fit(examples_of(pairs)) if any(pair.split == "fit" for pair in pairs) else None


def judge_part(
    config: ScoreConfig, loaded: LoadedModel, material: Material, arms: Sequence[Arm], outcome: Outcome
) -> Rows:
    """What a judge says of the texts."""
    assert config.judge is not None
    chat = open_judge(config.judge, loaded, config.model, config.device)
    texts = [text for row in outcome.texts for text in row]
    wanted = config.judge_concept or material.instruction
    judged = judge_texts(chat, wanted, [*material.prompts] * len(arms), texts, config.library / KEPT)
    tables = {name: ratings.reshape(len(arms), -1) for name, ratings in judged.ratings.items()}
    rows = compared({"score": judged.score.reshape(len(arms), -1), **tables}, arms, config.seed)
    return {name: {**row, "unread": judged.unread} for name, row in rows.items()}


def logits_part(loaded: LoadedModel, material: Material, arms: Sequence[Arm], seed: int) -> dict[str, Any]:
    """Which side of held-out pairs is likelier, and which next tokens."""
    found: dict[str, Any] = {}
    pairs = [pair for pair in material.pairs if pair.split != "fit"]
    if len(pairs) > 1:
        margins = np.array([margins_of(loaded, pairs, arm) for arm in arms])
        found["logits"] = compared({"margin": margins, "pairs_up": margins > margins[0]}, arms, seed)
    moved = next_tokens(loaded, material.prompts, arms[1].interventions) - next_tokens(loaded, material.prompts)
    order = moved.mean(0).argsort(descending=True).tolist()
    for name, tokens in (("promoted", order[:N_TOKENS]), ("demoted", order[::-1][:N_TOKENS])):
        found[name] = [loaded.tokenizer.decode([token]) for token in tokens]
    return found


def margins_of(loaded: LoadedModel, pairs: Sequence[ContrastPair], arm: Arm) -> Float[np.ndarray, " pair"]:
    """Nats a token by which the positive side of each pair is likelier than the negative one."""
    prompts = [arm.asked(pair.prompt) for pair in pairs]
    positive, negative = (
        costs(loaded, prompts, [getattr(pair, side) for pair in pairs], arm.interventions)
        for side in ("positive", "negative")
    )
    return negative - positive


def refusal_part(
    config: ScoreConfig, loaded: LoadedModel, prompts: Sequence[RefusalPrompt], arms: Sequence[Arm]
) -> dict[str, Any]:
    """How often harmful and harmless prompts are refused, and an answer of each kind for people to read."""
    texts, harmful = [prompt.text for prompt in prompts], np.array([prompt.harmful for prompt in prompts])
    refused, answers = refusals(loaded, texts, arms, max_new_tokens=config.refusal_tokens)
    rows = [
        compared({name: refused[:, which]}, arms, config.seed)
        for name, which in (("harmful", harmful), ("harmless", ~harmful))
    ]
    shown = [int(np.flatnonzero(which)[0]) for which in (harmful, ~harmful)]
    return {
        "refusal": {name: row | rows[1][name] for name, row in rows[0].items()},
        "answers": [{"prompt": texts[i], "unsteered": answers[0][i], "steered": answers[1][i]} for i in shown],
    }


def transfer_part(config: ScoreConfig, loaded: LoadedModel, material: Material, arms: Sequence[Arm]) -> dict[str, Any]:
    """Whether the direction holds on pairs that it has nothing from, and what steering does to their prompts."""
    pairs = material.transfer
    quality = heldout_quality(loaded, material.vectors[-1], pairs, config.seed)
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))[: config.n_prompts]
    tokens = config.max_new_tokens
    outcome = try_arms(loaded, material.concept, prompts, arms, max_new_tokens=tokens, seed=config.seed + 2)
    margins = np.array([margins_of(loaded, pairs, arm) for arm in arms])
    rows = compared({"rate": outcome.rates, "nll": outcome.nlls}, arms, config.seed)
    sides = compared({"margin": margins}, arms, config.seed)
    told = {key.replace("heldout_", "").replace("n_heldout", "n_pairs"): value for key, value in quality.items()}
    return {"pairs": config.transfer, **told, "arms": {name: row | sides[name] for name, row in rows.items()}}


def latency_part(loaded: LoadedModel, arms: Sequence[Arm], prompts: Sequence[str], config: ScoreConfig) -> Rows:
    """Tokens a second of one text at a time, each arm in turn, after one that does not count."""
    chosen = {arm.name: arm for arm in arms if arm.name != "random"}
    speeds: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(config.latency_repeats + 1):
        for name, arm in chosen.items():
            ids = loaded.tokenizer(arm.asked(prompts[turn % len(prompts)]), return_tensors="pt")["input_ids"]
            speed = _speed(loaded, arm, ids.to(loaded.device), config.latency_tokens)
            if turn:
                speeds[name].append(speed)
    plain, rng = np.array(speeds["unsteered"]), np.random.default_rng(config.seed)
    picks = rng.integers(config.latency_repeats, size=(2000, config.latency_repeats))
    rows: Rows = {}
    for name, values in speeds.items():
        rows[name] = {}
        for figure, each in (("tokens_s", np.array(values)), ("relative", np.array(values) / plain)):
            ends = np.quantile(np.median(each[picks], axis=1), [0.025, 0.975]).tolist()
            rows[name] |= {figure: float(np.median(each)), f"{figure}_ci95": ends}
    return rows


def _speed(loaded: LoadedModel, arm: Arm, ids: torch.Tensor, n: int) -> float:
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else loaded.tokenizer.eos_token_id
    limits = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": pad}
    lengths = [ids.shape[1]]
    with torch.inference_mode(), steering(loaded, arm.interventions, prompt_lengths=lengths, force=True):
        start = time.perf_counter()
        loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **limits)  # type: ignore[operator]
        if loaded.device.type == "cuda":
            torch.cuda.synchronize(loaded.device)
        return n / (time.perf_counter() - start)


# --- figures ---------------------------------------------------------------------------------------------------------


def compared(tables: Mapping[str, Table], arms: Sequence[Arm], seed: int) -> Rows:
    """Means by kind of arm, and of the changes from unsteered, unit by unit, each with its interval over units."""
    rows: Rows = {}
    for kind in KINDS:
        which = [i for i, arm in enumerate(arms) if arm.name == kind]
        values = {name: table[which].astype(float).mean(axis=0) for name, table in tables.items()}
        changes = {f"{name}_change": values[name] - table[0].astype(float) for name, table in tables.items()}
        rows[kind] = means(values | changes, seed)
    return rows


def with_perplexity(rows: Rows) -> Rows:
    """With exp of the mean cost, and how many times that of unsteered it is."""
    return {
        name: {**row, "perplexity": math.exp(row["nll"]), "perplexity_ratio": math.exp(row["nll_change"])}
        for name, row in rows.items()
    }


def laid_out(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt for a terminal: a table a part, its cells being a figure with its interval."""
    shown: dict[str, Any] = {}
    for key, value in receipt.items():
        if key in ("examples", "answers", "settings"):
            continue
        if isinstance(value, Mapping) and set(value) <= {*KINDS}:
            shown[key] = {name: _cells(row) for name, row in value.items()}
        elif key == "transfer":
            shown["transfer_pairs"] = _cells({name: each for name, each in value.items() if name != "arms"})
            shown["transfer"] = {name: _cells(row) for name, row in value["arms"].items()}
        else:
            shown[key] = value
    return shown


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Each figure with its interval in one cell."""
    return {
        name: _cell(value, row.get(f"{name}_ci95"), "+" if name.endswith("_change") else "")
        for name, value in row.items()
        if not name.endswith("_ci95")
    }


def _cell(value: Any, ends: Sequence[float] | None, sign: str) -> Any:
    if not isinstance(value, float):
        return value
    said = f"{value:{sign}.3g}"
    return said if ends is None else f"{said} ({ends[0]:{sign}.3g} to {ends[1]:{sign}.3g})"

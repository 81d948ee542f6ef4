"""The ways of moving a model along an axis, made from the same pairs, each with what it cost to make.

| name | acts by | made from |
|---|---|---|
| unsteered | | |
| vector | the direction of the fit pairs at a dose chosen on other prompts, or ablated from a block on | fit pairs |
| random | a random direction with the same norm, coefficient and places | |
| instruction | a sentence in front of the prompt | a sentence |
| few_shot | examples in front of the prompt; in a chat, turns in front of it | some fit pairs |
| lora | a fine-tune (`steer.receipts.lora`) | fit pairs |

Left out: what they do to texts (`steer.receipts.compare`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from activations.chat import chat_prompt
from activations.errors import CorruptArtefactError, MissingArtefactError
from activations.fingerprints import digest, digest_of
from activations.hook_points import HookPoint
from activations.models import LoadedModel
from activations.tokens import without_bos
from steer.library import load_library
from steer.making.axes import Axis, shown_texts
from steer.making.contrast import from_contrast
from steer.making.make import add_to_library
from steer.measures.concepts import judged
from steer.measures.effect import Bounds, choose_dose, sweep_doses
from steer.operations import Intervention, schedule
from steer.pairs import ContrastPair
from steer.receipts.config import CompareAxisConfig
from steer.receipts.lora import LoraAdapter, adapted, train
from steer.runtime import steering
from steer.vectors import SteeringVector

Gain = Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, " text"]]
"""from texts and their prompts to how far each is where the axis leads; more is better"""

DEPTH = 0.4
"""share of the blocks after which is steered, unless said otherwise"""


@dataclass(frozen=True, eq=False)
class Condition:
    """One way of moving the model."""

    name: str
    identity: str
    """what decides what it writes, besides the prompt and sampling"""
    interventions: tuple[Intervention, ...] = ()
    head: str = ""
    """in front of the prompt"""
    turns: tuple[dict[str, str], ...] = ()
    """in front of the user's message, in a chat"""
    stop: str | None = None
    """where its texts are cut off"""
    adapter: LoraAdapter | None = None
    cost: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def active(self, loaded: LoadedModel) -> Iterator[None]:
        """Inside, the model is moved."""
        with ExitStack() as stack:
            if self.adapter is not None:
                stack.enter_context(adapted(loaded, self.adapter))
            if self.interventions:
                stack.enter_context(steering(loaded, self.interventions, force=True))
            yield

    def prompt(self, loaded: LoadedModel, axis: Axis, prompt: str) -> str:
        """What the model is given."""
        if not axis.chat:
            return self.head + prompt
        turns = [*self.turns, {"role": "user", "content": prompt if self.turns else self.head + prompt}]
        return without_bos(loaded.tokenizer, chat_prompt(loaded, turns))


UNSTEERED = Condition("unsteered", "unsteered")


def rendered(loaded: LoadedModel, axis: Axis, pairs: Sequence[ContrastPair]) -> list[ContrastPair]:
    """Pairs as the model reads them."""
    if not axis.chat:
        return list(pairs)
    return [
        replace(
            pair,
            prompt=UNSTEERED.prompt(loaded, axis, pair.prompt),
            positive=pair.positive.lstrip(),
            negative=pair.negative.lstrip(),
        )
        for pair in pairs
    ]


def make_conditions(
    loaded: LoadedModel,
    config: CompareAxisConfig,
    name: str,
    axis: Axis,
    pairs: Sequence[ContrastPair],
    select: Sequence[str],
    gain: Gain,
) -> list[Condition]:
    """The unsteered model, and what `config` compares it with, in that order.

    Args:
      pairs: those of the axis, the wanted side being the positive one.
      select: prompts that the dose is chosen on.
      gain: what it is chosen by.
    Raises: whatever making a vector or a fine-tune does.
    """
    read = rendered(loaded, axis, pairs)
    vector = None
    if {"vector", "random"} & set(config.conditions):
        vector = _vector(loaded, config, name, axis, read, select, gain)
    made = [UNSTEERED]
    for each in config.conditions:
        if each == "vector":
            assert vector is not None
            made.append(_steered("vector", loaded, vector, vector.source["cost"]))
        elif each == "random":
            assert vector is not None
            made.append(_steered("random", loaded, vector.random(np.random.default_rng(config.seed)), {}))
        elif each == "instruction":
            head = f"{axis.instruction}\n\n"
            made.append(Condition("instruction", head, head=head, cost=_cost(0.0, 0, len(head.encode()))))
        elif each == "few_shot":
            made.append(_few_shot(config, axis, pairs))
        else:
            made.append(_fine_tuned(loaded, config, name, axis, read))
    return made


def _cost(seconds: float, examples: int, n_bytes: int) -> dict[str, Any]:
    return {"seconds": seconds, "examples": examples, "bytes": n_bytes}


def steer_at(loaded: LoadedModel, config: CompareAxisConfig) -> str:
    """The hook point that is steered at."""
    return config.hook_point or f"resid_post.{round(DEPTH * loaded.n_layers)}"


def _key(loaded: LoadedModel, config: CompareAxisConfig, axis: Axis, **more: Any) -> str:
    """Digest of what decides a vector or a fine-tune."""
    about = {"axis": vars(axis), "model": loaded.fingerprint, "seed": config.seed, "dtype": str(loaded.dtype), **more}
    return digest_of(about)


def _vector(
    loaded: LoadedModel,
    config: CompareAxisConfig,
    name: str,
    axis: Axis,
    pairs: Sequence[ContrastPair],
    select: Sequence[str],
    gain: Gain,
) -> SteeringVector:
    """The vector of an axis with its coefficient; the one in the library, if it was made in the same way.

    The dose is the one of which the axis's own measure says most, which knows nothing of the vector.
    """
    settings = {"doses", "max_nll_rise", "max_repetition_rise", "max_new_tokens", "judge_texts", "judge_label"}
    limits = config.model_dump(mode="json", include=settings) | {"chosen_by": axis.measure}
    texts = [[pair.prompt, pair.positive, pair.negative, pair.split] for pair in pairs]
    point = steer_at(loaded, config)
    key = _key(loaded, config, axis, point=point, pairs=texts, select=list(select), **limits)
    try:
        kept = load_library(config.out / "library").get(name)
    except MissingArtefactError:
        kept = None
    if kept is not None and kept.source.get("key") == key:
        return kept
    start = time.perf_counter()
    vector = from_contrast(loaded, point, axis.contrast, pairs, seed=config.seed)
    vector = replace(vector, name=name, operation=axis.operation, coefficient=1.0)
    if axis.operation == "add":
        limit: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
        concept = judged(vector, lambda prompts, texts: gain(texts, prompts))
        sweep = sweep_doses(loaded, vector, concept, select, config.doses, **limit)
        chosen = choose_dose(sweep, Bounds(config.max_nll_rise, config.max_repetition_rise))
        vector = replace(vector, coefficient=chosen.coefficient)
        vector.source["sweep"] = [trial._asdict() for trial in sweep]
    examples = sum(pair.split == "fit" for pair in pairs)
    cost = _cost(time.perf_counter() - start, examples, vector.direction.nbytes)
    vector = replace(vector, source=vector.source | {"key": key, "cost": cost})
    add_to_library(config.out / "library", vector)
    return vector


def _steered(name: str, loaded: LoadedModel, vector: SteeringVector, cost: dict[str, Any]) -> Condition:
    """A vector is added where it was made; what is ablated is ablated from there on, since later blocks restore it."""
    first = Intervention.of(vector, vector.coefficient)
    start = HookPoint.parse(vector.hook_point).layer
    stop = loaded.n_layers if vector.operation == "ablate" else start + 1
    layers = dict.fromkeys(range(start, stop), 1.0)
    identity = digest(vector.direction.tobytes().hex(), vector.hook_point, vector.operation, repr(vector.coefficient))
    return Condition(name, identity, interventions=tuple(schedule(first, layers)), cost=cost)


def _few_shot(config: CompareAxisConfig, axis: Axis, pairs: Sequence[ContrastPair]) -> Condition:
    """Examples drawn by the seed; of an axis that is to make no difference, both sides of a pair in turn."""
    shown = shown_texts(axis, pairs)
    step = 2 if axis.operation == "ablate" else 1
    order = np.random.default_rng(config.seed).permutation(len(shown) // step) * step
    examples = [shown[i + j] for i in order.tolist() for j in range(step)][: max(step, config.few_shot // step * step)]
    head = "".join(f"{prompt}{text}\n\n" for prompt, text in examples)
    turns = []
    for prompt, text in examples if axis.chat else ():
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text.strip()}]
    cost = _cost(0.0, len(examples), len(head.encode()))
    stop = None if axis.chat else "\n\n"
    return Condition("few_shot", digest(head, repr(turns)), head=head, turns=tuple(turns), stop=stop, cost=cost)


def _fine_tuned(
    loaded: LoadedModel, config: CompareAxisConfig, name: str, axis: Axis, pairs: Sequence[ContrastPair]
) -> Condition:
    """The fine-tune of an axis; the one on disk, if it was trained in the same way."""
    # An answer in a chat has an end, which is to be learned too.
    end = str(loaded.tokenizer.eos_token or "") if axis.chat else ""
    shown = [(prompt, text + end) for prompt, text in shown_texts(axis, pairs)]
    key = _key(loaded, config, axis, shown=shown, training=config.lora.model_dump())
    path = config.out / name / f"lora-{key[:12]}.safetensors"
    try:
        adapter = LoraAdapter.load(path)
    except CorruptArtefactError:
        prompts, texts = [prompt for prompt, _ in shown], [text for _, text in shown]
        adapter = train(loaded, prompts, texts, config.lora, config.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        adapter.save(path)
    cost = _cost(adapter.seconds, len(shown), adapter.n_bytes) | {"last_loss": adapter.losses[-1]}
    return Condition("lora", key, adapter=adapter, cost=cost)

"""Is a vector worth it? The same axis by a vector, by asking in words, by examples and by a fine-tune, side by side.

Flow of `compare`, an axis at a time:
1. make the conditions from the axis's contrast pairs (`steer.receipts.conditions`); the vector's dose is the one of
   which the measure of 3 says most, on prompts that nothing else looks at;
2. continue held-out prompts under each of them; texts are kept as they come, so that an interrupted comparison goes on;
3. measure each text: `value` is what the axis is about (`steer.making.axes`), read by something that knows nothing of
   the vector; and the cost under the unsteered model after the bare prompt, repetition and length, whatever stood in
   front;
4. KL(unsteered || condition) in nats over the next-token distributions of unrelated texts, all but the first token's.
   An instruction or examples stand in front of the text (as plain text, in a chat too) and the distributions at the
   text's own tokens are compared: it is what the words in the context do to everything else that is written there;
5. latency: one batch decoded in turns with all others, several rounds, prompt included;
6. a table, compare.json and a page with charts.

Effects are differences from the unsteered model on the same prompts, with bootstrap 95% intervals over prompts (pairs
of prompts for a disparity). With several seeds all of it is done for each, and figures are means over seeds
(`steer.receipts.over_seeds`). Left out: judges that are language models; a search for the best instruction, examples or
fine-tune, which each are one reasonable choice.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from activations.errors import ConfigError
from activations.fingerprints import digest_of
from activations.generate import generate
from activations.models import LoadedModel, load_model
from activations.text import documents
from sae.metrics import means
from steer.batches import TokenRow, costs, logits_of, padded
from steer.making.axes import Axis, axis_of, pairs_of
from steer.measures.classifier import TextClassifier, examples_of, fit, late_reader, load_examples
from steer.measures.disparity import disparity, outcomes_of
from steer.measures.effect import repetition
from steer.measures.openings import prompts, read_prompts, swapped_prompts
from steer.measures.refusal import is_refusal
from steer.receipts.compare_report import write_report
from steer.receipts.conditions import Condition, make_conditions, rendered, steer_at
from steer.receipts.config import CompareAxisConfig
from steer.receipts.over_seeds import over_seeds

FORMAT = 2
"""of result.json"""
KL_TOKENS = 64
"""tokens of an unrelated text that are read"""
READ_ROWS = 32
"""texts that the unsteered model reads together"""
LATENCY_TOKENS = 16
LONG = 3
"""times as many tokens are allowed where length is measured"""

Progress = Callable[[str], None]


def compare(config: CompareAxisConfig, loaded: LoadedModel | None = None, on_status: Progress | None = None) -> dict:
    """Compare along each axis of `config`, and write compare.json, report.html and what led to them to `config.out`.

    Returns: axis -> what was measured, as in compare.json.
    Raises: UnknownNameError for an axis that is not there; ConfigError for too few prompts, or without peft.
    """
    say = on_status or (lambda line: None)
    own = {key: value for key in ("contrast", "instruction") if (value := getattr(config, key)) is not None}
    recipes = {name: replace(axis_of(name), **own) for name in config.axes}
    loaded = loaded or load_model(config.model, device=config.device)
    config.save(config.out / "config.yaml")
    results = {}
    for name, axis in recipes.items():
        if config.seeds:
            results[name] = over_seeds({seed: _of_seed(loaded, config, name, axis, seed, say) for seed in config.seeds})
        else:
            results[name] = compare_axis(loaded, config, name, axis, say)
            del results[name]["per_text"]
        (config.out / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
        write_report(config.out / "report.html", results)
    return results


def _of_seed(
    loaded: LoadedModel, config: CompareAxisConfig, name: str, axis: Axis, seed: int, say: Progress
) -> dict[str, Any]:
    """What `compare_axis` finds with one of several seeds, kept in a folder of its own."""
    own = config.model_copy(update={"seed": seed, "seeds": (), "out": config.out / f"seed-{seed}"})
    return compare_axis(loaded, own, name, axis, lambda line: say(f"seed {seed}, {line}"))


def compare_axis(
    loaded: LoadedModel, config: CompareAxisConfig, name: str, axis: Axis, say: Progress
) -> dict[str, Any]:
    """What was measured along one axis; read from disk if all of it was measured before.

    Returns: what compare.json has of it, and `per_text`: condition -> figure -> a number for each text or prompt.
    """
    if axis.measure == "tokens":
        config = config.model_copy(update={"max_new_tokens": LONG * config.max_new_tokens})
    folder = config.out / name
    folder.mkdir(parents=True, exist_ok=True)
    held, select = axis_prompts(config, axis)
    pairs = pairs_of(axis)
    say(f"{name}: making what is compared")
    judge_of = cache(lambda: _judge(loaded, config, axis))  # not before it is needed: fitting one may take a while
    given = [_given(loaded, axis, each) for each in select]
    made = make_conditions(
        loaded, config, name, axis, pairs, given, lambda texts, prompts: gains(loaded, axis, judge_of(), prompts, texts)
    )
    settings = config.model_dump(mode="json", exclude={"out", "axes", "device", "conditions", "seeds"})
    key = digest_of(
        {"format": FORMAT, "held": held, "made": [each.identity for each in made], "axis": vars(axis), **settings}
    )
    result = folder / "result.json"
    if result.exists() and (kept := json.loads(result.read_text())).get("key") == key:
        return kept
    texts = {}
    for condition in made:
        say(f"{name}: writing {len(held)} texts, {condition.name}")
        path = folder / f"texts-{condition.name}-{_texts_key(loaded, config, axis, condition, held)[:12]}.jsonl"
        texts[condition.name] = write_texts(loaded, config, axis, condition, held, path)
    judge = judge_of()
    say(f"{name}: measuring")
    rows, per_text = _measured(loaded, config, axis, made, held, texts, judge)
    kl, speed = _kl(loaded, config, made), _latency(loaded, config, axis, made, held)
    for condition in made:
        per_text[condition.name]["kl"] = kl[condition.name]
        drift = means({"kl": np.array(kl[condition.name])}, config.seed)
        rows[condition.name] |= {**drift, **speed[condition.name], "cost": condition.cost}
    found = {
        "key": key,
        "axis": name,
        "measure": axis.measure,
        "wanted": wanted(axis),
        "model": loaded.id,
        "device": str(loaded.device),
        "hook_point": steer_at(loaded, config),
        "coefficient": next((float(m.interventions[0].operation.coefficient) for m in made if _adds(m)), None),  # type: ignore[attr-defined]
        "n_prompts": len(held),
        "max_new_tokens": config.max_new_tokens,
        "judge": None if judge is None else {"reads": judge.reads, **judge.quality},
        "conditions": rows,
        "per_text": per_text,
        "examples": [
            {"prompt": prompt, **{each: texts[each][i] for each in texts}} for i, prompt in enumerate(held[:6])
        ],
    }
    result.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _adds(condition: Condition) -> bool:
    return condition.name == "vector" and hasattr(condition.interventions[0].operation, "coefficient")


def wanted(axis: Axis) -> int:
    """Which way the value is to go: 1 up, -1 down."""
    if axis.measure == "disparity":
        return -1
    return -1 if axis.flip and axis.measure != "classifier" else 1


def axis_prompts(config: CompareAxisConfig, axis: Axis) -> tuple[list[str], list[str]]:
    """Held-out prompts, and others to choose the dose on; of swapped pairs, both sides in turn."""
    n, extra = config.prompts, config.select_prompts
    if axis.measure == "disparity":
        if config.prompts_from is not None:
            expected = "saekit's own pairs of prompts for a disparity"
            raise ConfigError("prompts_from", expected=expected, got=config.prompts_from, fix="Leave it out.")
        return [prompt for pair in swapped_prompts(n) for prompt in pair], []
    every = read_prompts(config.prompts_from, n + extra) if config.prompts_from else prompts(axis.prompts, n + extra)
    return every[:n], every[n:]


def _given(loaded: LoadedModel, axis: Axis, prompt: str) -> str:
    """A prompt as the unsteered model is given it."""
    return Condition("unsteered", "").prompt(loaded, axis, prompt)


# --- texts -----------------------------------------------------------------------------------------------------------


def _texts_key(
    loaded: LoadedModel, config: CompareAxisConfig, axis: Axis, condition: Condition, held: Sequence[str]
) -> str:
    sampling = config.model_dump(include={"max_new_tokens", "temperature", "batch_rows", "seed"})
    about = {"model": loaded.fingerprint, "dtype": str(loaded.dtype), "chat": axis.chat, "prompts": list(held)}
    return digest_of({"condition": condition.identity, **about, **sampling})


def write_texts(
    loaded: LoadedModel,
    config: CompareAxisConfig,
    axis: Axis,
    condition: Condition,
    held: Sequence[str],
    path: Path,
) -> list[str]:
    """A text for each prompt; whole batches that `path` has are kept, the others are written behind them."""
    size = config.batch_rows
    done = _read_texts(path)
    if len(done) < len(held):
        done = done[: len(done) // size * size]
        path.write_text("".join(_line(prompt, text) for prompt, text in zip(held, done, strict=False)))
    with path.open("a") as file, condition.active(loaded):
        for start in range(len(done), len(held), size):
            batch = held[start : start + size]
            given = [condition.prompt(loaded, axis, prompt) for prompt in batch]
            limits = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
            texts = generate(loaded, given, seed=config.seed + start, **limits)
            texts = [text.split(condition.stop)[0] if condition.stop else text for text in texts]
            file.write("".join(map(_line, batch, texts)))
            file.flush()
            done += texts
    return done


def _line(prompt: str, text: str) -> str:
    return json.dumps({"prompt": prompt, "text": text}) + "\n"


def _read_texts(path: Path) -> list[str]:
    """Texts of whole lines; the last one may have been cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line)["text"])
        except json.JSONDecodeError:
            break
    return found


# --- measures --------------------------------------------------------------------------------------------------------


def _judge(loaded: LoadedModel, config: CompareAxisConfig, axis: Axis) -> TextClassifier | None:
    """The classifier of an axis that has one, fitted to labelled texts or to the pairs, on other features than the
    vector."""
    if axis.measure != "classifier":
        return None
    if config.judge_texts is not None:
        examples = load_examples(config.judge_texts, config.judge_label)
    else:
        examples = examples_of(rendered(loaded, axis, pairs_of(axis)))
    if axis.judge == "text":
        return fit(examples, seed=config.seed)
    reader, reads = late_reader(loaded, avoid=steer_at(loaded, config))
    return fit(examples, reader=reader, reads=reads, seed=config.seed)


def _values(
    loaded: LoadedModel, axis: Axis, judge: TextClassifier | None, given: Sequence[str], texts: Sequence[str]
) -> Float[np.ndarray, " text"]:
    """What the axis is about, of each text."""
    if judge is not None:
        return (judge.probability(texts, given) > 0.5).astype(float)
    if axis.measure == "tokens":
        return _lengths(loaded, texts)
    return np.array([is_refusal(text) for text in texts], float)


def gains(
    loaded: LoadedModel, axis: Axis, judge: TextClassifier | None, given: Sequence[str], texts: Sequence[str]
) -> Float[np.ndarray, " text"]:
    """How far each text is where the axis leads, more being better; of a classifier the probability, not a verdict."""
    if judge is not None:
        return judge.probability(texts, given)
    return wanted(axis) * _values(loaded, axis, judge, given, texts)


def _lengths(loaded: LoadedModel, texts: Sequence[str]) -> Float[np.ndarray, " text"]:
    return np.array([len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts], float)


def _measured(
    loaded: LoadedModel,
    config: CompareAxisConfig,
    axis: Axis,
    made: Sequence[Condition],
    held: Sequence[str],
    texts: dict[str, list[str]],
    judge: TextClassifier | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[float]]]]:
    """By condition, figures of its texts, and those of each text."""
    given = [_given(loaded, axis, prompt) for prompt in held]
    own = _lengths(loaded, given)
    is_swap, plain, rows, per_text = axis.measure == "disparity", None, {}, {}
    for condition in made:
        written = texts[condition.name]
        tokens = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in written]
        figures = {
            "nll": costs(loaded, given, written, rows=READ_ROWS),
            "repetition": np.array([repetition(each) for each in tokens]),
            "tokens": np.array([len(each) for each in tokens], float),
            "prompt_tokens": _lengths(loaded, [condition.prompt(loaded, axis, prompt) for prompt in held]) - own,
        }
        if is_swap:
            outcome = outcomes_of(written)
            of_axis = disparity(outcome, plain if plain is not None else outcome, config.seed)
            row = {"value": of_axis["disparity"], "value_ci95": of_axis["disparity_ci95"], **of_axis}
            plain = outcome if plain is None else plain
        else:
            value = _values(loaded, axis, judge, given, written)
            plain = value if plain is None else plain
            figures = {"value": value, "effect": value - plain, **figures}
            row = {}
        rows[condition.name] = row | means(figures, config.seed)
        per_text[condition.name] = {figure: values.tolist() for figure, values in figures.items()}
    return rows, per_text


def _kl(loaded: LoadedModel, config: CompareAxisConfig, made: Sequence[Condition]) -> dict[str, list[float]]:
    """By condition, KL a token on each of the unrelated texts."""
    texts = [document.text for document in islice(documents("corpus"), config.kl_texts)]
    bos = loaded.tokenizer("")["input_ids"]
    bodies = [loaded.tokenizer(each, add_special_tokens=False)["input_ids"][:KL_TOKENS] for each in texts]
    per_text: dict[str, list[float]] = {condition.name: [] for condition in made}
    for start in range(0, len(bodies), READ_ROWS):
        some = bodies[start : start + READ_ROWS]
        plain = _next(loaded, [TokenRow([*bos, *body], len(bos) + 1) for body in some])
        for condition in made:
            head = loaded.tokenizer(condition.head, add_special_tokens=False)["input_ids"]
            rows = [TokenRow([*bos, *head, *body], len(bos) + len(head) + 1) for body in some]
            with condition.active(loaded):
                moved = _next(loaded, rows)
            kl = (plain.exp() * (plain - moved)).sum(-1).clamp(min=0)
            per_text[condition.name] += [float(part.mean()) for part in kl.split([len(body) - 1 for body in some])]
    return per_text


def _next(loaded: LoadedModel, rows: Sequence[TokenRow]) -> Float[torch.Tensor, "token vocab"]:
    """Log-probabilities of the next token, at all tokens of the rows that are not given."""
    batch = padded(rows, loaded.device)
    with torch.inference_mode():
        return logits_of(loaded, batch)[batch.new].log_softmax(-1)


def _latency(
    loaded: LoadedModel, config: CompareAxisConfig, axis: Axis, made: Sequence[Condition], held: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """By condition, milliseconds a token of one batch, all conditions taking turns: median, and range of rounds."""
    batch, taken = list(held[: config.batch_rows]), {condition.name: [] for condition in made}
    for turn in range(config.latency_rounds + 1):
        for condition in made:
            given = [condition.prompt(loaded, axis, prompt) for prompt in batch]
            with condition.active(loaded):
                _wait(loaded)
                start = time.perf_counter()
                texts = generate(loaded, given, max_new_tokens=LATENCY_TOKENS, seed=config.seed)
                _wait(loaded)
                seconds = time.perf_counter() - start
            steps = max(1.0, float(_lengths(loaded, texts).max()))
            if turn:  # the first round warms up
                taken[condition.name].append(1000 * seconds / steps)
    return {
        name: {"latency_ms": float(np.median(each)), "latency_ms_range": [min(each), max(each)]}
        for name, each in taken.items()
    }


def _wait(loaded: LoadedModel) -> None:
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)


def table(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """What the terminal shows: axis -> condition -> figures."""
    return {
        name: {
            each: {
                "value": row["value"],
                "effect": row["effect"],
                "95%": " to ".join(f"{end:+.3f}" for end in row["effect_ci95"] or ()),
                "KL": row["kl"],
                "nll": row["nll"],
                "repetition": row["repetition"],
                "ms": row["latency_ms"],
                "prompt tokens": row["prompt_tokens"],
                "seconds to make": row["cost"].get("seconds", 0.0),
                "examples": row["cost"].get("examples", 0),
                "bytes": row["cost"].get("bytes", 0),
            }
            for each, row in result["conditions"].items()
        }
        for name, result in results.items()
    }

"""The whole pipeline in one run: text to store to SAE to index to vectors to a report.

Flow:
1. load the model, time a few forward passes, and size the token budget to the machine;
2. harvest, train, evaluate, index: the same library calls as the verbs of those names;
3. try the best candidates among the latents for steering; make one vector from the winner and one from contrast pairs;
4. write library, report.html and summary.json.

A stage whose artefact is already there and was made with the same settings goes on from it, so an interrupted demo
resumes. PyTorch and JAX stages run one after the other and meet on disk only.
"""

import json
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from activations.config import HarvestConfig
from activations.errors import UnknownNameError
from activations.harvest import CONFIG_KEY, HarvestResult, harvest, store_meta
from activations.hook_points import HookPoint
from activations.models import LoadedModel, Status, load_model
from activations.plan import measure_speed
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.config import EvaluateConfig, IndexConfig, SaeConfig, TrainConfig
from sae.evaluate import evaluate
from sae.index import build_index
from sae.index_db import FeatureIndex, LatentRow
from steer.config import DemoConfig
from steer.making.config import VectorConfig
from steer.making.make import load_prompts, make_vector
from steer.making.select import Trial, candidates, try_latents
from steer.report import write_report
from steer.vectors import SteeringVector

ARCHITECTURE = "batchtopk"
SHOWN_FEATURES, CURVE_POINTS = 16, 12
TRIAL_DOSE, TRIAL_PROMPTS, TRIAL_TOKENS = 0.4, 4, 20
ROUND_TOKENS = 1000


def run_demo(config: DemoConfig, *, on_status: Status | None = None) -> dict[str, Any]:
    """Run the pipeline into `config.out` and return the summary that summary.json holds."""
    say, start = on_status or (lambda line: None), time.perf_counter()
    config.save(config.out / "demo.yaml")
    with _stage(say, f"loading {config.model}"):
        loaded = load_model(config.model, on_status=on_status)
    layer = config.layer if config.layer is not None else loaded.n_layers * 2 // 5
    hook_point = str(HookPoint("resid_post", layer).check(loaded.n_layers))
    with _stage(say, f"harvesting {hook_point} of {loaded.n_layers} layers"):
        harvested = harvest(_harvest_config(config, loaded, hook_point), loaded)
    with _stage(say, f"training an SAE on {harvested.n_tokens:,} tokens"):
        trained = _train(_train_config(config, hook_point))
    paths: dict[str, Any] = {"model": config.model, "store": config.out / "store", "sae": config.out / "sae" / "sae"}
    with _stage(say, "evaluating it on held-out text, and inside the model"):
        scores = evaluate(EvaluateConfig(**paths, ce_sequences=config.ce_sequences, baselines=False), loaded)
    with _stage(say, "indexing what each latent responds to"):
        index_path = build_index(IndexConfig(**paths, out=config.out / "index", output_scores=False), loaded)
    index = FeatureIndex.open(index_path)
    with _stage(say, f"trying {config.candidates} latents for steering"):
        trials = _try(config, loaded, index, SaeArtefact.load(paths["sae"]))
    with _stage(say, f"dosing and measuring latent {trials[0].latent} and {config.contrast}"):
        row = index.latent(trials[0].latent)
        settings = _vector_configs(config, row, loaded.tokenizer)
        vectors = [make_vector(each, loaded) for each in settings]
    summary = {
        **_figures(harvested, trained, scores, paths["sae"]),
        "model": loaded.id,
        "hook_point": hook_point,
        "text": config.text,
        "steering": _steering(vectors[0]),
        "steering_contrast": _steering(vectors[1]),
        "latents_tried": [{**trial._asdict(), "score": trial.score} for trial in trials],
        "device": _device(loaded),
        "wall_s": round(time.perf_counter() - start, 1),
        "peak_rss_mb": round(_peak_rss_mb(), 1),
    }
    write_report(
        config.out / "report.html",
        summary=summary,
        log=config.out / "sae" / "train.jsonl",
        index=index,
        tokenizer=loaded.tokenizer,
        features=_shown(trials),
        vectors=vectors,
    )
    index.close()
    (config.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _harvest_config(config: DemoConfig, loaded: LoadedModel, hook_point: str) -> HarvestConfig:
    """A token budget that takes about `harvest_s` here; an earlier run's budget, if there is one."""
    settings = HarvestConfig(
        model=config.model,
        text=config.text,
        hook_points=(hook_point,),
        out=str(config.out / "store"),
        outlier_norm=config.outlier_norm,
    )
    saved = config.out / "store" / CONFIG_KEY
    if saved.exists():
        return settings.model_copy(update={"max_tokens": HarvestConfig.load(saved).max_tokens})
    affordable = measure_speed(settings, loaded, store_meta(settings, loaded)) * config.harvest_s
    budget = int(min(max(affordable, config.min_tokens), config.max_tokens)) // ROUND_TOKENS * ROUND_TOKENS
    return settings.model_copy(update={"max_tokens": budget})


def _train_config(config: DemoConfig, hook_point: str) -> TrainConfig:
    base = TrainConfig(
        store=str(config.out / "store"),
        hook_points=(hook_point,),
        out=config.out / "sae",
        sae=SaeConfig(architecture=ARCHITECTURE, expansion=config.expansion, k=config.k),
        train_tokens=config.train_tokens,
        seed=config.seed,
    )
    n_steps = base.train_tokens // base.batch_size
    return base.model_copy(update={"eval_every": max(1, n_steps // CURVE_POINTS)})


def _train(config: TrainConfig) -> dict[str, float]:
    # JAX would otherwise claim most of a GPU's memory, which PyTorch is using too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from sae.train import train

    (trained,) = train(config).saes.values()
    return trained.metrics


def _try(config: DemoConfig, loaded: LoadedModel, index: FeatureIndex, artefact: SaeArtefact) -> list[Trial]:
    latents = [row.latent for row in candidates(index, config.candidates)]
    if not latents:
        raise UnknownNameError(
            "latents to steer with",
            expected="some that are strongest in several documents and on several kinds of tokens",
            got="none",
            fix="Use more tokens: raise min_tokens, with another out.",
        )
    mean_norm = ActivationStore.open(config.out / "store").stats(artefact.hook_point).mean_norm
    prompts = load_prompts("select")[-TRIAL_PROMPTS:]
    limits = {"max_new_tokens": TRIAL_TOKENS, "seed": config.seed}
    return try_latents(loaded, artefact, latents, prompts, TRIAL_DOSE * mean_norm, **limits)


def _vector_configs(config: DemoConfig, row: LatentRow, tokenizer: Any) -> list[VectorConfig]:
    """One vector from the chosen latent, one from the contrast; in words, the latent is the tokens that it fires on."""
    peaks = [tokenizer.decode([int(context.tokens[context.peak])]).strip() for context in row.contexts]
    topic = ", ".join(list(dict.fromkeys(peaks))[:5])
    base = VectorConfig(
        model=config.model,
        store=str(config.out / "store"),
        sae=config.out / "sae" / "sae",
        out=config.out / "library",
        measure=config.measure,
    )
    latent = {"kind": "latent", "latent": row.latent, "instruction": f"Write about: {topic}."}
    contrast = {"kind": "contrast", "contrast": config.contrast}
    return [base.model_copy(update=latent), base.model_copy(update=contrast)]


def _figures(harvested: HarvestResult, trained: Any, scores: dict[str, Any], sae: Path) -> dict[str, Any]:
    artefact = SaeArtefact.load(sae)
    return {
        "tokens_harvested": harvested.n_tokens,
        "harvest_tok_s": round(harvested.tok_s, 1),
        "train_tok_s": round(trained["train_tok_s"], 1),
        "train_tokens": trained["train_tokens"],
        "architecture": ARCHITECTURE,
        "n_latents": artefact.d_sae,
        "l0": scores["l0"],
        "fvu": scores["fvu"],
        "ce_loss_recovered": scores["ce_loss_recovered"],
        "ce_loss_recovered_zero": scores["ce_loss_recovered_zero"],
        "ce": {name: scores[f"ce_{name}"] for name in ("clean", "sae", "mean", "zero")},
        "dead_fraction": scores["dead_fraction"],
        "heldout_tokens": scores["n_tokens"],
    }


def _steering(vector: SteeringVector) -> dict[str, Any]:
    """What summary.json says of a vector: the receipt without its texts but two."""
    receipt = {key: value for key, value in vector.receipts[-1].items() if key not in ("examples", "sweep")}
    examples = vector.receipts[-1]["examples"][:2]
    return {"kind": vector.source["kind"], "latent_or_vector": vector.name, **receipt, "examples": examples}


def _shown(trials: Sequence[Trial]) -> list[int]:
    return [trial.latent for trial in trials[:SHOWN_FEATURES]]


def transcript(config: DemoConfig, summary: dict[str, Any]) -> str:
    """What the demo prints at its end: texts before and after, figures, and what to try next."""
    lines: list[str] = []
    for key in ("steering", "steering_contrast"):
        steering = summary[key]
        lines += [
            f"\n{steering['latent_or_vector']}, coefficient {steering['coefficient']:.1f}, dose {steering['dose']:.2f}"
        ]
        for example in steering["examples"]:
            lines += [f"  prompt     {example['prompt']}"]
            lines += [
                f"  unsteered  {_one_line(example['unsteered'])}",
                f"  steered    {_one_line(example['steered'])}\n",
            ]
        lines += [
            f"  effect {steering['effect']:+.3f} on the share of tokens with the concept "
            f"({steering['rate_unsteered']:.3f} -> {steering['rate_steered']:.3f}, 95% interval "
            f"{steering['effect_ci95'][0]:+.3f} to {steering['effect_ci95'][1]:+.3f})",
            f"  random directions {steering['random_control_effect']:+.3f}, asking in words "
            f"{steering['prompt_baseline_effect']:+.3f}, KL {steering['kl']:.2f} nats a token",
        ]
    out, first, tried = config.out, summary["steering"], summary["latents_tried"]
    other = tried[min(1, len(tried) - 1)]["latent"]
    return "\n".join(
        [
            *lines,
            f"\n{summary['tokens_harvested']:,} tokens of {summary['hook_point']} harvested at "
            f"{summary['harvest_tok_s']:,.0f} tok/s; {summary['n_latents']:,} latents trained at "
            f"{summary['train_tok_s']:,.0f} tok/s",
            f"held out: FVU {summary['fvu']:.3f}, L0 {summary['l0']:.1f}, CE loss recovered "
            f"{summary['ce_loss_recovered']:.3f} (mean ablation), {summary['dead_fraction']:.1%} of latents not active",
            f"{summary['wall_s']:.0f} s, {summary['peak_rss_mb']:,.0f} MB at most, {summary['device']}",
            f"\nlook at    {out / 'report.html'}",
            "try next",
            f"  saekit browse {out}",
            f"  saekit chat --set library={out / 'library'} --set vectors={first['latent_or_vector']} "
            f'"Tell me about your day."',
            f"  saekit inspect {out / 'index'} --latent {other}",
            f"  saekit vector make --set store={out / 'store'} --set sae={out / 'sae' / 'sae'} "
            f"--set out={out / 'library'} --set latent={other}\n",
        ]
    )


def _one_line(text: str, width: int = 150) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


@contextmanager
def _stage(say: Status, what: str) -> Iterator[None]:
    start = time.perf_counter()
    say(what)
    yield
    say(f"... {time.perf_counter() - start:.1f} s")


def _device(loaded: LoadedModel) -> str:
    if loaded.device.type == "cuda":
        return torch.cuda.get_device_name(loaded.device)
    return f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores, {str(loaded.dtype).removeprefix('torch.')}"


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

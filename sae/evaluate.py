"""How good an SAE is, on text it was not trained on, beside what it has to beat.

Flow:
1. take the held-out tail of the store that the SAE was trained from;
2. from stored activations: reconstruction, sparsity and their histograms (`sae.metrics`), of the SAE and of baselines;
3. from the weights: how alike decoder rows are, and how many latents other SAEs have too;
4. from the model: what it loses when what the SAE writes takes the place of the residual stream;
5. where texts are given: k-sparse probing and concept detection; where it is asked for: feature absorption;
6. write evaluation.json, evaluation.html, and SAEBench's files for what SAEBench measures too.

Each measure is defined once, in the module of its family in `sae.evaluation`, with its source. An interval X_ci95
stands beside most measures X. Left out: automatic labels.
"""

import json
import math
from typing import Any

import numpy as np
from jaxtyping import Int

from activations.errors import MismatchError, ShapeError
from activations.models import LoadedModel, load_model
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.belongs import check_belongs
from sae.config import EvaluateConfig
from sae.data import held_out, holdout
from sae.evaluation.absorption import absorption
from sae.evaluation.baselines import FIT_TOKENS, pca_sae, random_sae
from sae.evaluation.concepts import concept_detection, read_concepts
from sae.evaluation.core import cosine_spectrum, reconstruction
from sae.evaluation.probing import probing, read_labelled
from sae.evaluation.report import write_report
from sae.evaluation.saebench import write_saebench
from sae.evaluation.splice import spliced_losses
from sae.evaluation.stability import load_others, stability
from sae.evaluation.texts import Subject
from sae.metrics import Evaluation
from sae.torch_view import TorchSae
from sae.wiring import Wiring, side_by_side

FORMAT_VERSION = 2


def evaluate(config: EvaluateConfig, loaded: LoadedModel | None = None) -> dict[str, Any]:
    """Evaluate the SAE at `config.sae`, and write evaluation.json and evaluation.html into its directory.

    Returns: what evaluation.json holds; docs/formats.md lists it.
    Raises: MismatchError if store, SAE and model do not belong together.
    """
    store, artefact = ActivationStore.open(config.store), SaeArtefact.load(config.sae)
    loaded = loaded or load_model(config.model, device=config.device)
    check_belongs(store, loaded, artefact)
    _check_share(config, artefact)
    others = load_others(config.compare_to, artefact)
    labelled = read_labelled(config.probing, config.seed)
    concepts = read_concepts(config.concepts) if config.concepts.data else None
    start, stop = held_out(store, config.holdout_fraction)
    if not store.mask(start, stop).any():
        raise ShapeError(
            f"{store.path}: held-out tokens", expected="some that are unmasked", got=0, fix="Raise holdout_fraction."
        )
    sae, wiring = TorchSae(artefact).to(loaded.device), Wiring.parse(artefact.hook_point)
    evaluation = reconstruction(store, wiring, sae, start, stop)
    baselines = _baselines(config, store, wiring, sae, evaluation, start) if config.baselines else {}
    coders = {} if wiring.transcodes else baselines
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "about": _about(config, store, artefact, loaded),
        **_scalars(evaluation, config.seed),
        **evaluation.frequent(),
        **spliced_losses(
            store, wiring, sae, loaded, _spread(start, stop, config.ce_sequences), coders, seed=config.seed
        ),
        "baselines": {
            name: _scalars(reconstruction(store, wiring, other, start, stop), config.seed)
            for name, other in coders.items()
        },
        "quantiles": evaluation.quantiles(),
        "histograms": {
            **evaluation.histograms(),
            "decoder_cosine": cosine_spectrum(sae.W_dec, config.seed),
            "encoder_cosine": cosine_spectrum(sae.W_enc.T, config.seed),
        },
    }
    if others:
        result["stability"] = stability(sae, others, evaluation.density > 0, config.seed)
    saes = {"sae": sae} | {name: other for name, other in baselines.items() if name != "pca"}
    subject = Subject(store, wiring, loaded, saes, config.seed)
    if labelled:
        result["probing"] = probing(labelled, config.probing.k, subject)
    if concepts:
        result["concepts"] = concept_detection(*concepts, subject)
    if config.absorption.enabled:
        result["absorption"] = absorption(config.absorption, subject)
    result = _finite(result)
    (config.sae / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    write_report(config.sae / "evaluation.html", result)
    write_saebench(config.sae / "saebench", result, config.sae)
    return result


def _scalars(evaluation: Evaluation, seed: int) -> dict[str, Any]:
    intervals = {f"{name}_ci95": list(both) for name, both in evaluation.intervals(seed).items()}
    return {**evaluation.summary(), **evaluation.means(), **intervals, "n_tokens": evaluation.n_tokens}


def _baselines(
    config: EvaluateConfig, store: ActivationStore, wiring: Wiring, sae: TorchSae, evaluation: Evaluation, start: int
) -> dict[str, TorchSae]:
    """The SAEs of `sae.evaluation.baselines`, fitted to text that is not tested on, where the store keeps any."""
    trained = store.kept()[-1] if store.meta.ring else range(start)
    fitted = holdout(store, wiring.hook_points, trained.start, trained.stop, FIT_TOKENS)
    x = side_by_side(fitted, wiring.reads)
    k = min(max(round(evaluation.l0), 1), sae.d_model)
    return {"random_sae": random_sae(sae, x, config.seed), "pca": pca_sae(sae, x, k)}


def _about(
    config: EvaluateConfig, store: ActivationStore, artefact: SaeArtefact, loaded: LoadedModel
) -> dict[str, Any]:
    return {
        "model": loaded.id,
        "hook_point": artefact.hook_point,
        "architecture": artefact.saved_name,
        "d_sae": artefact.d_sae,
        "sae": str(config.sae),
        "sae_sha256": artefact.sha256,
        "store_fingerprint": store.fingerprint,
        "text": store.meta.text,
        "ctx": store.ctx,
        "seed": config.seed,
    }


def _check_share(config: EvaluateConfig, artefact: SaeArtefact) -> None:
    trained = artefact.metadata.get("config", {}).get("holdout_fraction", config.holdout_fraction)
    if trained != config.holdout_fraction:
        raise MismatchError(
            "holdout_fraction",
            expected=f"{trained}, as in training, so that no text is tested that was trained on",
            got=config.holdout_fraction,
            fix=f"Use --set holdout_fraction={trained}.",
        )


def _spread(start: int, stop: int, n: int) -> Int[np.ndarray, " seq"]:
    """Up to `n` sequences, evenly over start..stop."""
    return np.unique(np.linspace(start, stop - 1, n).astype(int))


def _finite(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

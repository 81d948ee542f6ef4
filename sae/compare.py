"""Two SAEs of one model beside each other: which latents both have, which split or merge, which one has alone.

Flow:
1. open both, and see that they can be compared;
2. what their latents do on the same tokens (`sae.same_tokens`), from a store that is named, or from two indices over
   the same text; latents that are active on fewer than `min_active` of them are left out as silent;
3. pairs and their classes (`sae.matching`); and what chance gives: random directions in the other's place, with its own
   activations on shuffled tokens;
4. counts, quantiles of the nearest, and the clearest examples of each class with their words; all pairs, if asked for.

Left out: scores of single SAEs, which `sae.evaluate` gives.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from activations.errors import ConfigError, MismatchError, MissingArtefactError
from activations.store import ActivationStore
from sae import compare_summary
from sae.artefact import CONFIG, SaeArtefact
from sae.config import CompareConfig, IndexConfig
from sae.index import CONFIG_NAME
from sae.index_db import FILE_NAME, FeatureIndex
from sae.index_state import STATE_NAME
from sae.matching import Found, Latents, Side, by_chance, classify
from sae.same_tokens import Activity, from_indices, from_store
from sae.tables import check_table, write_table

N_WORDS = 4
_FIX = "Compare SAEs of one model, which read and write alike."


class Opened(NamedTuple):
    """One of the two."""

    path: Path
    artefact: SaeArtefact
    database: FeatureIndex | None


class Comparison(NamedTuple):
    """What was found of two SAEs."""

    summary: dict[str, Any]
    """JSON-ready"""
    found: Found
    kept: Sequence[Latents]
    """numbers in either SAE of the latents that were compared, to which those of `found` refer"""


def compare(one: str | Path, other: str | Path, config: CompareConfig, out: Path | None = None) -> dict[str, Any]:
    """Compare the SAEs at two paths, each an SAE, the index of one, or the run that trained it.

    Args:
      out: a file for all pairs; docs/formats.md lists its columns.
    Returns: the comparison, JSON-ready.
    Raises: MismatchError for SAEs of different models or widths, or a store of another model.
    """
    if out is not None:
        check_table(out)
    result = compare_whole(one, other, config)
    if out is not None:
        write_table(out, compare_summary.table(result.found, result.kept))
    return result.summary


def compare_whole(one: str | Path, other: str | Path, config: CompareConfig) -> Comparison:
    """As `compare`, with all pairs that it rests on."""
    both = _open(Path(one)), _open(Path(other))
    try:
        return _compared(both, config)
    finally:
        for sae in both:
            if sae.database:
                sae.database.close()


def _compared(both: tuple[Opened, Opened], config: CompareConfig) -> Comparison:
    _check(both)
    activities, origin = _activities(both, config)
    kept = [_not_silent(part, sae, config) for part, sae in zip(activities, both, strict=True)]
    sides = [_side(*parts) for parts in zip(both, kept, activities, strict=True)]
    is_one_place = both[0].artefact.hook_point == both[1].artefact.hook_point
    found = classify(sides[0], sides[1], config, is_one_place)
    chance = classify(sides[0], by_chance(sides[1], config.seed), config, is_one_place)

    def words(side: int, latent: int) -> list[str]:
        index = both[side].database
        return [token for token, _ in index.latent(latent).top_logits[:N_WORDS]] if index else []

    summary = {
        "artefact": "comparison",
        "one": _described(both[0]),
        "other": _described(both[1]),
        "activations": origin,
        "tokens": None if activities[0] is None else activities[0].shape[0],
        "latents": compare_summary.counts(found, chance, [sae.artefact.d_sae for sae in both]),
        "nearest": compare_summary.nearest(found, chance),
        "examples": compare_summary.examples(found, kept, words, config.n_examples),
    }
    return Comparison(summary, found, kept)


def _open(path: Path) -> Opened:
    """The SAE at a path, and its index where the path is one."""
    if (path / FILE_NAME).exists():
        settings = IndexConfig.load(path / CONFIG_NAME)
        artefact, index = SaeArtefact.load(settings.sae), FeatureIndex.open(path)
        if artefact.sha256 != index.info.get("sae_sha256"):
            index.close()
            raise MismatchError(
                path, expected=f"an index of the SAE at {settings.sae}", got="one of another", fix="Build it again."
            )
        return Opened(path, artefact, index)
    inside = next((part for part in (path, path / "sae") if (part / CONFIG).exists()), None)
    if inside is None:
        several = sorted(str(part.parent) for part in path.glob(f"sae/*/{CONFIG}"))
        got = f"several, such as {several[0]}" if several else "none of them"
        raise MissingArtefactError(path, expected="an SAE, its index, or a run of one", got=got, fix="Check the path.")
    return Opened(path, SaeArtefact.load(inside), None)


def _check(both: tuple[Opened, Opened]) -> None:
    one, other = (sae.artefact for sae in both)
    models = [sae.metadata.get("model", {}) for sae in (one, other)]
    fingerprints = [str(model.get("fingerprint") or "") for model in models]
    if all(fingerprints) and fingerprints[0] != fingerprints[1]:
        ids = [f"{model.get('id')} ({own[:12]})" for model, own in zip(models, fingerprints, strict=True)]
        raise MismatchError(both[1].path, expected=f"an SAE of {ids[0]}", got=f"one of {ids[1]}", fix=_FIX)
    widths = [f"widths {sae.d_model} and {sae.d_out}" for sae in (one, other)]
    if widths[0] != widths[1]:
        raise MismatchError(both[1].path, expected=f"an SAE of {widths[0]}", got=widths[1], fix=_FIX)


def _activities(both: tuple[Opened, Opened], config: CompareConfig) -> tuple[Sequence[Activity], str | None]:
    """What both do on the same tokens, if that can be known, and where it is from."""
    artefacts = [sae.artefact for sae in both]
    if config.store is not None:
        store = ActivationStore.open(config.store)
        for sae in artefacts:
            model = sae.metadata.get("model", {})
            if model.get("fingerprint", store.meta.model.fingerprint) != store.meta.model.fingerprint:
                got = f"one of {store.meta.model.id}"
                fix = "Name the store that the SAEs were trained on."
                raise MismatchError(store.path, expected=f"a store of {model.get('id')}", got=got, fix=fix)
        return from_store(store, artefacts, config.tokens), store.path
    if all((sae.path / STATE_NAME).exists() for sae in both):
        parts = from_indices(both[0].path, both[1].path, (artefacts[0].d_sae, artefacts[1].d_sae))
        if parts[0].shape[0]:
            return parts, "indices"
    return (None, None), None


def _not_silent(activity: Activity, sae: Opened, config: CompareConfig) -> Latents:
    if activity is None:
        return np.arange(sae.artefact.d_sae)
    kept = np.flatnonzero(np.bincount(activity.indices, minlength=sae.artefact.d_sae) >= config.min_active)
    if not len(kept):
        expected = f"latents that are active on {config.min_active} tokens or more"
        fix = "Name a store with more text, or lower min_active."
        raise ConfigError(sae.path, expected=expected, got=f"none on {activity.shape[0]} tokens", fix=fix)
    return kept


def _side(sae: Opened, kept: Latents, activity: Activity) -> Side:
    def rows(weights: Float[np.ndarray, "d_sae d"]) -> Float[Tensor, "n d"]:
        return torch.from_numpy(np.ascontiguousarray(weights if len(kept) == len(weights) else weights[kept]))

    artefact = sae.artefact
    return Side(rows(artefact.W_dec), rows(artefact.W_enc.T), None if activity is None else activity[:, kept])


def _described(sae: Opened) -> dict[str, Any]:
    artefact = sae.artefact
    return {
        "path": str(sae.path),
        "model": artefact.metadata.get("model", {}).get("id"),
        "hook_point": artefact.hook_point,
        "architecture": artefact.saved_name,
        "d_sae": artefact.d_sae,
    }

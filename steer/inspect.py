"""What an artefact is and holds, from its own files alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from activations.errors import CorruptArtefactError, MissingArtefactError
from activations.progress import progress
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.index_db import BLOBS, FILE_NAME, FeatureIndex
from steer.gates import gates_of
from steer.library import load_library

SHOWN_DAMAGES, SHOWN_LATENTS = 3, 6


def describe(where: str, latent: int | None = None, verify: bool = False) -> dict[str, Any]:
    """A JSON-ready description of the store, SAE, feature index or library at a path, or of a store at s3://.

    Args:
      latent: show this latent of a feature index instead of the index.
      verify: read a store whole, and compare every checksum.
    Raises: MissingArtefactError if there is no artefact; CorruptArtefactError if a store does not verify.
    """
    path = Path(where)
    if (path / FILE_NAME).exists():
        return _index(path, latent)
    if where.startswith("s3://") or (path / "zarr.json").exists():
        return _store(ActivationStore.open(where), verify)
    if (path / "cfg.json").exists():
        return _sae(path)
    if (path / "manifest.json").exists():
        return _library(path)
    raise MissingArtefactError(
        path, expected="a store, SAE, feature index or library", got="none of them", fix="Check the path."
    )


def _store(store: ActivationStore, verify: bool) -> dict[str, Any]:
    meta, state = store.meta, store.state
    missing = store.missing()
    if verify:
        _verify(store)
    return {
        "artefact": "activation store",
        "model": meta.model.id,
        "text": meta.text,
        "sequences": state.committed,
        "ctx": meta.ctx,
        "tokens": state.tokens,
        "masked": state.masked,
        "complete": state.complete,
        "ring": {**meta.ring.model_dump(), "released_sequences": state.released} if meta.ring else None,
        "dtype": meta.store_dtype,
        "hook_points": {name: _statistics(store, name) for name in store.hook_points},
        "gigabytes": sum(store.storage.sizes().values()) / 1e9,
        "fingerprint": store.fingerprint,
        "health": {
            "checksums": "all match" if verify else "not read; --verify does",
            "missing_shards": len(missing),
            **({"first_missing": missing[0]} if missing else {}),
        },
    }


def _statistics(store: ActivationStore, hook_point: str) -> dict[str, Any]:
    stats = store.stats(hook_point)
    limit = store.state.hooks[hook_point].outlier_limit if hook_point in store.state.hooks else None
    return {"mean_norm": stats.mean_norm, "norm_quantiles": stats.norm_quantiles, "outlier_limit": limit}


def _verify(store: ActivationStore) -> None:
    found = []
    with progress("verify", store.n_sequences * store.n_arrays, "seq") as advance:
        for n, damage in store.verify():
            advance(n)
            if damage:
                found.append(damage)
    if found:
        places = [f"'{damage.array}' in sequences {damage.start} to {damage.stop - 1}" for damage in found]
        more = f", and {len(places) - SHOWN_DAMAGES} more" if len(places) > SHOWN_DAMAGES else ""
        raise CorruptArtefactError(
            store.path,
            expected="intact shards",
            got=f"{len(found)} damaged: {', '.join(places[:SHOWN_DAMAGES])}{more} ({found[0].reason})",
            fix="Copy the store again, or harvest it again.",
        )


def _sae(path: Path) -> dict[str, Any]:
    artefact = SaeArtefact.load(path)
    shape = {"architecture": artefact.architecture, "d_model": artefact.d_model, "d_sae": artefact.d_sae}
    return {"artefact": "SAE", **shape, **artefact.metadata}


def _index(path: Path, latent: int | None) -> dict[str, Any]:
    index = FeatureIndex.open(path)
    if latent is None:
        alive = len(index.latents(min_density=1e-12))
        return {"artefact": "feature index", **index.info, "live_latents": alive}
    row = index.latent(latent)
    counts = {name: len(getattr(row, name)) for name in BLOBS}
    return {**vars(row), **counts, "labels": [asdict(label) for label in index.labels(latent)]}


LONG = ("examples", "sweep", "picked", "answers", "settings")
"""what a receipt holds besides its figures"""


def _library(path: Path) -> dict[str, Any]:
    vectors = {
        vector.name: {
            "hook_point": vector.hook_point,
            "operation": vector.operation,
            "scope": vector.scope,
            "gates": [gate.name for gate in gates_of(vector.gate)],
            "coefficient": vector.coefficient,
            "dose": vector.dose(vector.coefficient),
            "model": vector.model.id,
            "source": vector.source,
            "window": vector.window,
            "receipts": [
                {key: value for key, value in receipt.items() if key not in LONG} for receipt in vector.receipts
            ],
        }
        for vector in load_library(path).values()
    }
    return {"artefact": "library", "vectors": vectors}


def laid_out(comparison: dict[str, Any]) -> dict[str, Any]:
    """A comparison for a terminal: its examples as a table for each class."""
    shown = {key: value for key, value in comparison.items() if key != "examples"}
    shown["latents"] = {
        name: {key: "" if value is None else value for key, value in row.items()}
        for name, row in comparison["latents"].items()
    }
    for name, examples in comparison["examples"].items():
        rows = [
            {
                "one": _latents(row["one"]),
                "other": _latents(row["other"]),
                "decoder cosine": _figures(row["decoder_cosine"]),
                "correlation": _figures(row["correlation"]),
            }
            for row in examples
        ]
        if rows:
            shown[name] = {str(number): row for number, row in enumerate(rows, 1)}
    return shown


def _latents(latents: list[dict[str, Any]]) -> str:
    return "; ".join(" ".join([str(each["latent"]), *map(repr, each["words"])]) for each in latents[:SHOWN_LATENTS])


def _figures(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values[:SHOWN_LATENTS])

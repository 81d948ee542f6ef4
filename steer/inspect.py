"""What an artefact is and holds, from its own files alone."""

from pathlib import Path
from typing import Any

from activations.errors import MissingArtefactError
from activations.store import ActivationStore
from sae.artefact import SaeArtefact
from sae.index_db import FILE_NAME, FeatureIndex
from steer.library import load_library


def describe(path: Path, latent: int | None = None) -> dict[str, Any]:
    """A JSON-ready description of the store, SAE, feature index or library at `path`.

    Args:
      latent: show this latent of a feature index instead of the index.
    Raises: MissingArtefactError if there is no artefact at `path`.
    """
    if (path / FILE_NAME).exists():
        return _index(path, latent)
    if (path / "zarr.json").exists():
        return _store(path)
    if (path / "cfg.json").exists():
        return _sae(path)
    if (path / "manifest.json").exists():
        return _library(path)
    raise MissingArtefactError(
        path, expected="a store, SAE, feature index or library", got="none of them", fix="Check the path."
    )


def _store(path: Path) -> dict[str, Any]:
    store = ActivationStore.open(path)
    meta, state = store.meta, store.state
    norms = {name: store.stats(name) for name in store.hook_points}
    return {
        "artefact": "activation store",
        "model": meta.model.id,
        "text": meta.text,
        "sequences": state.committed,
        "ctx": meta.ctx,
        "tokens": state.tokens,
        "masked": state.masked,
        "complete": state.complete,
        "dtype": meta.store_dtype,
        "hook_points": {
            name: {"mean_norm": stats.mean_norm, "norm_quantiles": stats.norm_quantiles}
            for name, stats in norms.items()
        },
        "gigabytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e9,
        "fingerprint": store.fingerprint,
    }


def _sae(path: Path) -> dict[str, Any]:
    artefact = SaeArtefact.load(path)
    shape = {"architecture": artefact.architecture, "d_model": artefact.d_model, "d_sae": artefact.d_sae}
    return {"artefact": "SAE", **shape, **artefact.metadata}


def _index(path: Path, latent: int | None) -> dict[str, Any]:
    index = FeatureIndex.open(path)
    if latent is None:
        alive = len(index.rows(min_density=1e-12))
        return {"artefact": "feature index", **index.info, "live_latents": alive}
    row = index.latent(latent)
    return {**vars(row), "contexts": len(row.contexts)}


def _library(path: Path) -> dict[str, Any]:
    vectors = {
        vector.name: {
            "hook_point": vector.hook_point,
            "coefficient": vector.coefficient,
            "dose": vector.dose(vector.coefficient),
            "model": vector.model.id,
            "source": vector.source,
            "receipts": [
                {key: value for key, value in receipt.items() if key not in ("examples", "sweep")}
                for receipt in vector.receipts
            ],
        }
        for vector in load_library(path).values()
    }
    return {"artefact": "library", "vectors": vectors}

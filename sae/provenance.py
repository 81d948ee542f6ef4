"""Where an SAE came from: the content of saekit.json, apart from the weights' hash."""

import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from activations.store import ActivationStore
from activations.store_schema import HookStats
from sae.config import TrainConfig
from sae.wiring import Wiring

PACKAGES = ("saekit", "jax", "flax", "optax", "numpy")


def provenance(
    config: TrainConfig,
    wiring: Wiring,
    store: ActivationStore,
    stats: Mapping[str, HookStats],
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Model, store, hook points, resolved config, versions and metrics."""
    n_tokens = min(stats[name].n_tokens for name in wiring.hook_points)
    mean_norms = {name: stats[name].mean_norm for name in wiring.hook_points}
    return {
        "format_version": 1,
        "model": {"id": store.meta.model.id, "fingerprint": store.meta.model.fingerprint},
        "hook_point": str(wiring),
        "store": {"fingerprint": store.fingerprint, "n_tokens": n_tokens, "mean_norms": mean_norms},
        "config": config.model_dump(mode="json"),
        "metrics": dict(metrics),
        "versions": {name: _version(name) for name in PACKAGES},
        "git_sha": git_sha(),
    }


def git_sha() -> str | None:
    """Commit of the working tree that this file is in, if it is in one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

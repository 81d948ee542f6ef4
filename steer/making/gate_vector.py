"""A calibrated gate for a vector of a library.

Flow of `gate_vector`: 1. every second quiet text chooses the thresholds (`steer.gates.calibrate`), for a share of false
alarms; 2. the other quiet texts, and those on which it should open, which nothing was chosen on, say how often it
opens; 3. the gate is stored in the vector, with those figures, and steers with it from then on.

Left out: gates on latents and probes of their own, which Python makes, and a library keeps too.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from activations.errors import ConfigError, MismatchError, TextError
from activations.hook_points import HookPoint
from activations.models import LoadedModel, load_model
from activations.text import read_file
from steer.gates import Gate, Readout, calibrate, cosine, energy, peak, probe
from steer.library import find_vectors
from steer.making.config import GateConfig
from steer.making.make import add_to_library
from steer.packs.installed import check_own
from steer.vectors import SteeringVector

READOUTS = {
    "energy": energy,
    "cosine": cosine,
    "probe": lambda direction, hook_point: probe(direction, 0.0, hook_point),
}
"""What is read of a vector's direction; a probe of bias 0 is the projection."""


def gate_vector(config: GateConfig, loaded: LoadedModel | None = None) -> dict[str, Any]:
    """Calibrate a gate and store it in the vector, or in all of NAME@HOOK_POINT, which then open and shut as one.

    Returns: thresholds and how often it opens, JSON-ready.
    Raises: TextError for a file without texts; ConfigError for too few quiet ones, or a hook point behind the vector;
      MismatchError for another model;
      HookPointError where the model has no such hook point.
    """
    fires, quiet = read_texts(config.fires), read_texts(config.quiet)
    check_own(config.library)
    vectors = find_vectors(config.library, config.vector)
    loaded = loaded or load_model(config.model, device=config.device)
    readout = _readout(config, loaded, vectors[0])
    name, rates = config.name or config.vector, {"rate": config.rate, "off_rate": config.off_rate}
    found = calibrate(loaded, readout, quiet[::2], min_tokens=config.min_tokens, name=name, **rates)
    figures = {
        **found.calibration,
        "false_alarms": _opens(loaded, found, quiet[1::2]),
        "hits": _opens(loaded, found, fires),
    }
    gate = replace(found, calibration=figures)
    add_to_library(config.library, *(replace(vector, gate=gate) for vector in vectors))
    about = {"gate": name, "kind": config.kind, "hook_point": str(readout.hook_point), "on": gate.on, "off": gate.off}
    return {"vectors": [vector.name for vector in vectors], **about, **figures}


def read_texts(path: Path) -> list[str]:
    """The lines of a file that are not blank. Raises: TextError if there are none."""
    found = [line.strip() for line in read_file(path).splitlines() if line.strip()]
    if not found:
        raise TextError(path, expected="a text a line", got="none", fix="Add some.")
    return found


def _readout(config: GateConfig, loaded: LoadedModel, first: SteeringVector) -> Readout:
    if first.model.fingerprint != loaded.fingerprint:
        fix = "Name the model that it was made from."
        raise MismatchError(
            f"vector '{first.name}'", expected=f"one of {loaded.id}", got=f"one of {first.model.id}", fix=fix
        )
    point = HookPoint.parse(config.hook_point or first.hook_point)
    point.check(loaded.n_layers, loaded.family.sites(loaded.model.config))
    if point.depth > HookPoint.parse(first.hook_point).depth:
        expected = f"a hook point no later than {first.hook_point}, where the vector acts"
        raise ConfigError("key 'hook_point'", expected=expected, got=point, fix="Read it earlier.")
    return READOUTS[config.kind](torch.from_numpy(first.direction), str(point))


def _opens(loaded: LoadedModel, gate: Gate, texts: Sequence[str]) -> dict[str, Any]:
    """On which share of texts it opens, with a 95% interval (Clopper and Pearson)."""
    from scipy.stats import beta

    n, k = len(texts), sum(peak(loaded, gate.readout, text) > gate.on for text in texts)
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return {"share": k / max(n, 1), "low": low, "high": high, "n": n}

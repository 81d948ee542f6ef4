"""Vectors of a library as weights: `bake`, behind `saekit library bake`.

Flow: 1. what is not exact is refused, before anything large is read or written; 2. the model runs as it is, steered,
and steered on its first token too; 3. a LoRA, or a copy of the model, is written under a name of its own; 4. what was
written is loaded again and compared; 5. only what equals the steered model appears at its place, with `bake.json`.

Left out: several models, and what engines make of the files.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from activations.errors import MismatchError, ModelError, NumericsError
from activations.models import LoadedModel, find_source, load_model, read_config
from sae.formats.base import check_target, new_directory
from steer.baking.adapter import with_adapter, write_adapter
from steer.baking.edits import edits_of
from steer.baking.receipt import Logits, compared, largest, logits_of, read_texts, steered_logits
from steer.baking.weights import write_weights
from steer.config import BakeConfig
from steer.library import find_vectors
from steer.show import status
from steer.vectors import SteeringVector

TOLERANCE = 5e-5
"""of the largest logit: what float32 rounds through a model's depth"""
RECEIPT = "bake.json"


def bake(config: BakeConfig) -> dict[str, Any]:
    """Write what `config` says, and give the receipt that is kept beside it.

    Raises: MismatchError for what weights cannot do, another model, or a target that is taken; NumericsError if what
      was written does something else than steering does; ConfigError for a dose that the runtime would refuse.
    """
    vectors = find_vectors(config.library, config.vector)
    if config.coefficient is not None:
        vectors = [replace(vector, coefficient=config.coefficient) for vector in vectors]
    check_target(config.out)
    _check_not_quantised(config.model)
    loaded = load_model(config.model, device=config.device, dtype="float32", on_status=status)
    _check_model(vectors, loaded)
    edits = edits_of(vectors, loaded)
    texts = read_texts(loaded, config.prompts, config.texts)
    lefts = steered_logits(loaded, vectors, texts, config.force)
    with new_directory(config.out) as folder:
        if config.form == "lora":
            changed = write_adapter(edits, loaded, folder)
            with with_adapter(loaded.model, folder):
                baked = logits_of(loaded, texts)
        else:
            changed = write_weights(edits, loaded, folder)
            device = str(loaded.device)
            del loaded  # the model is held once
            baked = logits_of(load_model(str(folder), device=device, dtype="float32"), texts)
        receipt = _receipt(config, vectors, changed, lefts, baked)
        (folder / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
    return receipt


def _receipt(
    config: BakeConfig, vectors: list[SteeringVector], changed: list[str], lefts: dict[str, Logits], baked: Logits
) -> dict[str, Any]:
    """All that was measured. Raises: NumericsError if it is not what steering does."""
    tolerance = TOLERANCE * largest(lefts["every_token"])
    figures = {name: compared(lefts[name], baked) for name in ("every_token", "runtime", "effect")}
    worst = max(each["max_abs"] for each in figures["every_token"].values())
    if not worst <= tolerance:
        raise NumericsError(
            config.out,
            expected=f"logits that are at most {tolerance:.2g} from those of the steered model",
            got=f"{worst:.2g}",
            fix="Steer with it while the model runs. Nothing was written.",
        )
    kl = max(each["kl"] for each in figures["runtime"].values())
    if not kl <= config.first_token_kl:
        raise NumericsError(
            config.out,
            expected=f"a model within {config.first_token_kl:g} nats of the runtime, which skips the first token",
            got=f"{kl:.3g} nats",
            fix="Raise first_token_kl if the first token may be steered too. Nothing was written.",
        )
    model = vectors[0].model
    return {
        "format": "saekit-bake-1", "form": config.form, "out": str(config.out),
        "model": {"id": model.id, "fingerprint": model.fingerprint},
        "vectors": [
            {"name": each.name, "sha256": each.sha256, "hook_point": each.hook_point, "operation": each.operation,
             "coefficient": each.coefficient}
            for each in vectors
        ],
        "changed": changed, "prompts": config.prompts, "texts": config.texts, "tolerance": tolerance, **figures,
    }  # fmt: skip


def _check_not_quantised(spec: str) -> None:
    """Raises: ModelError for weights that are rounded in their files, which an edit cannot be exact in."""
    folder = find_source(spec, status).folder
    if "quantization_config" in read_config(folder):
        fix = "Bake into the weights that it was made from."
        raise ModelError(folder, expected="weights that are not quantised", got="quantised ones", fix=fix)


def _check_model(vectors: list[SteeringVector], loaded: LoadedModel) -> None:
    """Raises: MismatchError for vectors of another model, or of another width; NumericsError for NaN."""
    for vector in vectors:
        if vector.model.fingerprint != loaded.fingerprint or len(vector.direction) != loaded.d_model:
            raise MismatchError(
                f"vector '{vector.name}'",
                expected=f"one of {loaded.id}",
                got=f"one of {vector.model.id}, {vector.model.fingerprint[:12]}",
                fix="Name the model that it was made from with model=.",
            )
        if not math.isfinite(vector.coefficient):
            fix = "Calibrate it again."
            raise NumericsError(
                f"vector '{vector.name}'", expected="a finite coefficient", got=vector.coefficient, fix=fix
            )


def summary(receipt: dict[str, Any], out: Path) -> dict[str, Any]:
    """The receipt for people: how it is used, and its figures as one table."""
    use = {
        "lora": f"PeftModel.from_pretrained(model, '{out}')",
        "weights": f"saekit chat --set model={out}",
    }[receipt["form"]]
    rows = {
        f"{name}, {texts}": figures
        for name in ("every_token", "runtime", "effect")
        for texts, figures in receipt[name].items()
    }
    return {"out": str(out), "changed": ", ".join(receipt["changed"]), "use": use, "figures": rows}

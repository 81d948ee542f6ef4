"""Logits of three projects that steer, with vectors in their own forms. Runs in the environment of the three.

    check_steering.py MODEL TOKENS.json OUT.npz FORM FILE STRENGTH

FORM is repeng, steering_vectors or lm_eval; MODEL a folder of transformers. Writes `none` and `steered`, the logits
behind each token, and where the form can be written by the project itself, its own file beside OUT.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

np.float_ = np.float64  # type: ignore[reportAttributeAccessIssue]  # as NumPy 1 calls it, and repeng 0.4.0


def repeng(model: Any, ids: torch.Tensor, file: str, strength: float, out: Path) -> Any:
    from repeng import ControlModel, ControlVector

    vector = ControlVector.import_gguf(file)
    vector.export_gguf(out.with_suffix(".gguf"))
    controlled = ControlModel(model, sorted(vector.directions))
    controlled.set_control(vector, strength)
    logits = controlled(ids).logits
    controlled.reset()
    controlled.unwrap()
    return logits


def steering_vectors(model: Any, ids: torch.Tensor, file: str, strength: float, out: Path) -> Any:
    from steering_vectors import SteeringVector

    vector = SteeringVector(**torch.load(file, weights_only=True))
    with vector.apply(model, multiplier=strength):
        return model(ids).logits


def lm_eval(model: Any, ids: torch.Tensor, file: str, strength: float, out: Path) -> Any:
    from lm_eval.models.hf_steered import SteeredModel, steer

    steered = SteeredModel.__new__(SteeredModel)  # its hooks for a model that is there, not another loaded by name
    made: dict[str, Any] = {}

    def remember(self: Any, **_: Any) -> None:
        self._device, self._model = torch.device("cpu"), model
        made["self"] = self

    parent = SteeredModel.__mro__[1]
    kept, parent.__init__ = parent.__init__, remember
    try:
        SteeredModel.__init__(steered, pretrained="unused", steer_path=file)
    finally:
        parent.__init__ = kept
    with steer(model, steered.hook_to_steer):
        return model(ids).logits


FORMS = {"repeng": repeng, "steering_vectors": steering_vectors, "lm_eval": lm_eval}


@torch.no_grad()
def main(folder: str, tokens: str, out: str, form: str, file: str, strength: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([json.loads(Path(tokens).read_text())])
    plain = model(ids).logits
    steered = FORMS[form](model, ids, file, float(strength), Path(out))
    assert torch.equal(model(ids).logits, plain), "nothing is left behind"
    np.savez(out, none=plain[0].numpy(), steered=steered[0].numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])

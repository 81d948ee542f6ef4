"""Edits as a LoRA in the layout of the library peft (Hu et al. 2021, arXiv:2106.09685).

    y' = W x + b + B (A x) + c          A = Uᵀ W [r, d_in], B = -U strength [d_model, r], r ablations at one writer
                                        c = constant - Σ strength u (u·b), `lora_bias` of peft

`adapter_config.json` and `adapter_model.safetensors` are what peft and whatever reads its files load beside the model.
alpha is r, so that the scale is 1; writers with fewer ablations than r have rows of zeros. Biases make an adapter that
peft cannot merge into a layer without one, which it says itself.

Left out: MLPs with experts, whose maps are one tensor and no module; peft takes a shared expert beside them for one of
them.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from activations.hook_points import HookPoint
from activations.models import LoadedModel
from steer.baking.edits import Edit, Linear, changed_by, unbakeable, writers_of

PREFIX = "base_model.model."
"""in front of the paths of modules, in files of peft"""


class Rows(NamedTuple):
    """The adapter of one linear map, in float64."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_model r"]
    bias: Float[Tensor, " d_model"]


def write_adapter(edits: Mapping[HookPoint, Edit], loaded: LoadedModel, folder: Path) -> list[str]:
    """Write the two files; gives the paths of the modules that they change.

    Raises: MismatchError for an MLP with experts.
    """
    rows: dict[str, Rows] = {}
    linears = [(home, each) for home in edits for each in writers_of(loaded, home)]
    for home, linear in linears:
        if linear.is_expert:
            got = f"{linear.path}, whose experts share one tensor"
            raise unbakeable(f"{home} as LoRA", "linear modules, or form=weights", got)
    for home, edit in edits.items():
        changed = changed_by(edit, [each for at, each in linears if at == home], home)
        rows |= {linear.path: _rows(linear, edit, constant) for linear, constant in changed}
    rank = max(1, *(len(each.a) for each in rows.values()))
    has_bias = any(bool(each.bias.any()) for each in rows.values())
    save_file(_tensors(rows, rank, has_bias), folder / "adapter_model.safetensors", {"format": "pt"})
    is_conv = any(linear.axis == 1 for _, linear in linears)
    config = _config(loaded, list(rows), rank, has_bias, is_conv)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return list(rows)


@contextmanager
def with_adapter(model: nn.Module, folder: Path) -> Iterator[None]:
    """Run `model` with the adapter of a folder, read from its file, without peft."""
    tensors = load_file(folder / "adapter_model.safetensors")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, kind = name.removeprefix(PREFIX).partition(".lora_")
        parts.setdefault(path, {})[kind] = tensor
    with ExitStack() as stack:
        for path, part in parts.items():
            hook = partial(_adapted, part["A.weight"], part["B.weight"], part.get("B.bias"))
            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        yield


def _adapted(a: Tensor, b: Tensor, bias: Tensor | None, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Any:
    x = args[0]
    return y + nn.functional.linear(x @ a.to(x).T, b.to(x), None if bias is None else bias.to(x))


def _rows(linear: Linear, edit: Edit, constant: Tensor | None) -> Rows:
    weight = getattr(linear.module, linear.weight).detach().double().cpu()
    weight = weight if linear.axis == 0 else weight.T
    old = getattr(linear.module, linear.bias, None)
    bias = torch.zeros(len(weight), dtype=torch.double) if old is None else old.detach().double().cpu()
    new = -edit.taken(bias) + (0 if constant is None else constant)
    if not edit.ablations:
        return Rows(torch.zeros(1, weight.shape[1]).double(), torch.zeros(len(weight), 1).double(), new)
    directions = torch.stack([u for _, u in edit.ablations])
    strengths = torch.tensor([s for s, _ in edit.ablations]).double()
    return Rows(directions @ weight, -directions.T * strengths, new)


def _tensors(rows: Mapping[str, Rows], rank: int, has_bias: bool) -> dict[str, Tensor]:
    found = {}
    for path, each in rows.items():
        a, b = torch.zeros(rank, each.a.shape[1]), torch.zeros(len(each.b), rank)
        a[: len(each.a)], b[:, : len(each.a)] = each.a, each.b
        found |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
        found |= {f"{PREFIX}{path}.lora_B.bias": each.bias.float()} if has_bias else {}
    return found


def _config(loaded: LoadedModel, paths: list[str], rank: int, has_bias: bool, is_conv: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": loaded.id, "inference_mode": True,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "lora_bias": has_bias,
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": is_conv, "target_modules": paths,
    }  # fmt: skip

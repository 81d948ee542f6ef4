"""Edits in a copy of the model: a folder that transformers, and `saekit chat --set model=FOLDER`, load as any other.

    W' = W - Σ strength u (uᵀ W)        b' = b - Σ strength u (u·b) + constant

of every linear map that writes, experts and their biases among them. Where a layer has no bias and a constant needs
one, a switch of the model's config is looked for that gives it one (`mlp_bias`, `attention_bias` and so on); the other
biases that come with it are zeros. Changed tensors are kept in float32, whose rounding the receipt measures; all others
stay in the dtype in which the model had them. Whoever loads the folder in bfloat16 rounds the changed ones too.

Left out: sizes beyond memory; the model is held in float32 once.
"""

import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from activations.hook_points import HookPoint
from activations.models import DTYPES, LoadedModel, find_source, read_config, weight_files
from activations.quiet import quiet_transformers
from sae.checked_files import safetensors_heads
from steer.baking.edits import Edit, Linear, changed_by, unbakeable, writers_of

SWITCHES = ("mlp_bias", "attention_out_bias", "attention_bias", "use_bias")
"""keys of configs that give linear layers biases"""
STORED = {"BF16": torch.bfloat16, "F16": torch.float16}


def write_weights(edits: Mapping[HookPoint, Edit], loaded: LoadedModel, folder: Path) -> list[str]:
    """Edit `loaded.model`, which is in float32, in place, and save it with its tokenizer; gives the changed tensors.

    Raises: MismatchError for a constant without a bias that could hold it.
    """
    changed = [
        (linear, edits[home], constant)
        for home in edits
        for linear, constant in changed_by(edits[home], writers_of(loaded, home), home)
    ]
    for linear, _, constant in changed:
        if constant is not None and getattr(linear.module, linear.bias, None) is None:
            _switch_on(loaded, linear)
    names = [name for linear, edit, constant in changed for name in _edit(linear, edit, constant)]
    source = find_source(loaded.spec, lambda line: None).folder
    _as_stored(loaded.model, source, set(names))
    with quiet_transformers():
        loaded.model.save_pretrained(folder)
    for path in source.iterdir():
        is_beside = path.suffix in (".json", ".jinja", ".txt", ".model") and not path.name.endswith(".index.json")
        if is_beside and path.is_file() and path.name != "config.json":
            shutil.copy(path, folder / path.name)
    return names


@torch.no_grad()
def _edit(linear: Linear, edit: Edit, constant: torch.Tensor | None) -> list[str]:
    """Change a map in place, and give the names of the tensors that changed."""
    weight, bias = getattr(linear.module, linear.weight), getattr(linear.module, linear.bias, None)
    names = []
    if edit.ablations:
        old = weight.double().cpu().movedim(linear.axis, -1)
        weight.copy_((old - edit.taken(old)).movedim(-1, linear.axis))
        names.append(f"{linear.path}.{linear.weight}")
    if bias is not None:
        old = bias.double().cpu()
        bias.copy_(old - edit.taken(old) + (0 if constant is None else constant))
        names.append(f"{linear.path}.{linear.bias}")
    return names


def _switch_on(loaded: LoadedModel, linear: Linear) -> None:
    """Give a layer a bias by a switch of the model's config, the one that adds the fewest; all of them are zeros.

    Raises: MismatchError if there is none.
    """
    wanted = f"{linear.path}.{linear.bias}"
    found = [(switch, new) for switch in SWITCHES for new in [_new_biases(loaded.model, switch)] if wanted in new]
    if not found:
        got = f"none, and no switch for one in the config of {loaded.id}"
        raise unbakeable(linear.path, "a bias, or form=lora, whose adapter has its own", got)
    switch, new = min(found, key=lambda each: len(each[1]))
    setattr(loaded.model.config, switch, True)
    for name, width in new.items():
        path, _, key = name.rpartition(".")
        zeros = torch.zeros(width, dtype=torch.float32, device=loaded.device)
        setattr(loaded.model.get_submodule(path), key, nn.Parameter(zeros, requires_grad=False))


def _new_biases(model: Any, switch: str) -> dict[str, int]:
    """What a switch of the config adds, name -> width, if that is biases alone; nothing if it is on or not there."""
    from transformers import AutoModelForCausalLM

    if getattr(model.config, switch, None) is not False:
        return {}
    config = deepcopy(model.config)
    setattr(config, switch, True)
    with torch.device("meta"), quiet_transformers():
        other = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(each.shape) for name, each in other.named_parameters()}
    old = {name: tuple(each.shape) for name, each in model.named_parameters()}
    new = {name: shape for name, shape in shapes.items() if name not in old}
    is_safe = old.items() <= shapes.items() and all(name.endswith(".bias") and len(new[name]) == 1 for name in new)
    return {name: shape[0] for name, shape in new.items()} if is_safe else {}


def _as_stored(model: Any, source: Path, changed: set[str]) -> None:
    """Give all other tensors the dtype that they have in the model's files, or by other names that of its config."""
    stored: dict[str, str] = {}
    for path in weight_files(source):
        stored |= {name: head.dtype for name, head in safetensors_heads(path).items()}
    config = read_config(source)
    usual = DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32)
    for name, parameter in model.named_parameters():
        if name not in changed:
            dtype = STORED.get(stored[name], torch.float32) if name in stored else usual
            parameter.data = parameter.data.to(dtype)

"""Train sparsify's TopK SAE on batches that are given; runs in sparsify's own environment.

    python sparsify_train.py DATA          one run a line on standard input, see _batches.py

sparsify's own: its Trainer, whole, with all that it calls: SparseCoder, the optimisers (schedule-free signum by
default, Adam with `"set": {"optimizer": "adam"}`), warm-up and decay, unit-norm decoder rows, the count of dead
latents, bfloat16 autocast on a GPU, and saving. The Trainer takes what it learns from out of a model while it reads a
text. Ours is that model, whose one module returns the tokens of the numbers that it is given, and that text, whose rows
are the batches' numbers. `set` holds fields of TrainConfig, and of SparseCoderConfig with `sae.` before them. Where it
has `lr_warmup_steps` below 1, that is a share of the run; sparsify's default is 1000 steps.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _batches import Tokens, serve
from torch import nn
from torch.utils.data import Dataset

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read on import; its Triton kernels need a GPU

import sparsify

SITE = "site"


class Text(Dataset):
    """The batches' numbers, a batch a row."""

    def __init__(self, order: np.ndarray):
        self._order = torch.from_numpy(order).long()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._order[i]}


class Model(nn.Module):
    """Returns the tokens of the numbers that it is given, from a module that can be hooked."""

    def __init__(self, tokens: Tokens):
        super().__init__()
        self._tokens = tokens
        self.device = tokens.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self.add_module(SITE, nn.Identity())

    @property
    def base_model(self) -> nn.Module:
        """Where sparsify looks for the module."""
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tokens [row, batch, d_model]."""
        return self.get_submodule(SITE)(self._tokens.batch(input_ids))


def train(tokens: Tokens, run: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    """Train and save one SAE."""
    if run["arch"] != "topk":
        raise ValueError(f"sparsify has topk, not {run['arch']}")
    of_sae = {key.removeprefix("sae."): value for key, value in run["set"].items() if key.startswith("sae.")}
    of_trainer = {key: value for key, value in run["set"].items() if not key.startswith("sae.")}
    if 0 < of_trainer.get("lr_warmup_steps", 0) < 1:
        of_trainer["lr_warmup_steps"] = round(of_trainer["lr_warmup_steps"] * len(order))
    config = sparsify.TrainConfig(
        sae=sparsify.SaeConfig(num_latents=run["width"], k=run["k"], **of_sae),
        batch_size=1,
        lr=run["lr"],
        hookpoints=[SITE],
        init_seeds=[run["seed"]],
        save_every=len(order) + 2,
        save_dir=run["out"],
        run_name="run",
        log_to_wandb=False,
        **of_trainer,
    )
    trainer = sparsify.Trainer(config, Text(order), Model(tokens))
    lr = trainer.optimizers[0].param_groups[0]
    peak = lr.get("initial_lr", lr["lr"])
    trainer.fit()
    return {"sae": str(Path(run["out"]) / "run" / SITE), "lr": peak}


if __name__ == "__main__":
    serve(train, {"sparsify": sparsify.__version__, "torch": torch.__version__})
